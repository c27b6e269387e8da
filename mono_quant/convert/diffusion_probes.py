"""Inputs to measure a diffusion model with: noise in the place of latents, of embedded text and of what else conditions it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.convert.probes import Probe, ProbeError, probing
from mono_quant.planning.walk import common_dtype

_SEED = 20
_BATCH, _TOKENS, _FRAMES = 2, 16, 5
# Where a config names no size of the latents, and the largest that is measured with.
_SIZE, _LARGEST = 16, 64


@dataclass(frozen=True)
class _Family:
    """What the forward of a class takes.

    Attributes:
        latents: the argument that is to be denoised, or encoded.
        text: field of the config with the width of embedded text; empty when it takes none.
        more: further arguments, which have a maker in `_MAKERS`.
        steps: what one unit of `timestep` is: 1000 of them make the way from noise to image, or one.
        form: of the latents: `image`, `video`, or `packed` into a sequence.
    """

    latents: str
    text: str = ""
    more: tuple[str, ...] = ("timestep",)
    steps: int = 1000
    form: str = "image"


_FAMILIES: Mapping[str, _Family] = {
    "AutoencoderKL": _Family("sample", more=()),
    "UNet2DModel": _Family("sample", more=("timestep", "class_labels")),
    "UNet2DConditionModel": _Family(
        "sample", "cross_attention_dim", ("timestep", "class_labels", "added_cond_kwargs")
    ),
    "DiTTransformer2DModel": _Family("hidden_states", more=("timestep", "class_labels")),
    "PixArtTransformer2DModel": _Family(
        "hidden_states", "caption_channels", ("timestep", "added_cond_kwargs")
    ),
    "SD3Transformer2DModel": _Family(
        "hidden_states", "joint_attention_dim", ("timestep", "pooled_projections")
    ),
    "AuraFlowTransformer2DModel": _Family("hidden_states", "joint_attention_dim", steps=1),
    "SanaTransformer2DModel": _Family("hidden_states", "caption_channels"),
    "FluxTransformer2DModel": _Family(
        "hidden_states",
        "joint_attention_dim",
        ("timestep", "pooled_projections", "img_ids", "txt_ids", "guidance"),
        steps=1,
        form="packed",
    ),
    "WanTransformer3DModel": _Family("hidden_states", "text_dim", form="video"),
    "HunyuanVideoTransformer3DModel": _Family(
        "hidden_states",
        "text_embed_dim",
        ("timestep", "encoder_attention_mask", "pooled_projections", "guidance"),
        form="video",
    ),
}


def make_diffusion_probe(model: nn.Module) -> Probe:
    """Make inputs for a diffusers model from its config.

    Args:
        model: on the device where it runs.

    Raises:
        ProbeError: what its class takes is not known here.
    """
    name = type(model).__name__
    family = _FAMILIES.get(name)
    if family is None:
        raise ProbeError(f"what a {name} takes is not known; pass probe=<inputs>")
    with probing("no inputs could be made"):
        makers = _Makers(model, family)
        inputs = {family.latents: makers.latents()}
        if family.text and makers.width(family.text):
            inputs["encoder_hidden_states"] = makers.noise(_BATCH, _TOKENS, makers.width(family.text))
        found = {argument: _MAKERS[argument](makers) for argument in family.more}
        inputs |= {argument: value for argument, value in found.items() if value is not None}
        where = (
            common_dtype((p.dtype, p.numel()) for p in model.parameters()),
            next(model.parameters()).device,
        )
        shape = " x ".join(map(str, inputs[family.latents].shape))
        return Probe((), {k: _placed(v, *where) for k, v in inputs.items()}, f"noise of {shape}")


class _Makers:
    """Makes the arguments of one model, the same every time."""

    def __init__(self, model: nn.Module, family: _Family) -> None:
        self.config: Any = model.config
        self.family = family
        self._generator = torch.Generator().manual_seed(_SEED)

    def get(self, field: str) -> Any:
        return getattr(self.config, field, None)

    def width(self, field: str) -> int:
        value = self.get(field)
        value = max(value) if isinstance(value, (list, tuple)) else value
        return value if isinstance(value, int) else 0

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def integers(self, high: int) -> Tensor:
        return torch.randint(0, high, (_BATCH,), generator=self._generator)

    def size(self) -> tuple[int, int]:
        given = self.get("sample_size")
        pair = given if isinstance(given, (list, tuple)) else (given, given)
        height, width = (min(int(n or _SIZE), _LARGEST) for n in pair)
        return height, width

    def latents(self) -> Tensor:
        channels, (height, width) = self.width("in_channels"), self.size()
        if self.family.form == "packed":
            return self.noise(_BATCH, height * width, channels)
        frames = (_FRAMES,) if self.family.form == "video" else ()
        return self.noise(_BATCH, channels, *frames, height, width)


def _timestep(makers: _Makers) -> Tensor:
    """One step near the noise, one near the image."""
    steps = torch.tensor([0.9, 0.1]) * makers.family.steps
    return steps if makers.family.steps == 1 else steps.long()


def _class_labels(makers: _Makers) -> Tensor | None:
    count = makers.get("num_embeds_ada_norm") or (
        makers.get("class_embed_type") is None and makers.get("num_class_embeds")
    )
    return makers.integers(count) if count else None


def _added(makers: _Makers) -> dict[str, Any] | None:
    if makers.get("addition_embed_type") == "text_time":
        # six numbers beside the text: the size of the image, and what was cut from it
        times = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(_BATCH, 1)
        wide = makers.width("projection_class_embeddings_input_dim") - 6 * makers.width(
            "addition_time_embed_dim"
        )
        return {"text_embeds": makers.noise(_BATCH, wide), "time_ids": times}
    if makers.get("addition_embed_type") is not None:
        raise ProbeError(f"addition_embed_type {makers.get('addition_embed_type')!r} is not known")
    if "caption_channels" not in makers.config:
        return None
    asks = makers.get("use_additional_conditions")
    asks = makers.get("sample_size") == 128 if asks is None else asks
    sizes = {"resolution": torch.full((_BATCH, 2), 64.0), "aspect_ratio": torch.ones(_BATCH, 1)}
    return sizes if asks else dict.fromkeys(sizes)


def _image_places(makers: _Makers) -> Tensor:
    """Row and column of each latent in the sequence, behind the number of the image."""
    height, width = makers.size()
    places = torch.zeros(height, width, 3)
    places[..., 1] += torch.arange(height)[:, None]
    places[..., 2] += torch.arange(width)[None, :]
    return places.reshape(-1, 3)


_MAKERS: Mapping[str, Callable[[_Makers], Any]] = {
    "timestep": _timestep,
    "class_labels": _class_labels,
    "pooled_projections": lambda m: m.noise(_BATCH, m.width("pooled_projection_dim")),
    "encoder_attention_mask": lambda m: torch.ones(_BATCH, _TOKENS),
    "guidance": lambda m: torch.full((_BATCH,), 4.0) if m.get("guidance_embeds") else None,
    "img_ids": _image_places,
    "txt_ids": lambda m: torch.zeros(_TOKENS, 3),
    "added_cond_kwargs": _added,
}


def _placed(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _placed(v, dtype, device) for key, v in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    return value
