"""Inputs that a model runs on, found by trying: what its forward asks for, in the forms that are in use."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
_LENGTH, _BATCH = 12, 2
# What is tried beside the inputs that a forward requires.
_BESIDE = (
    (),
    ("decoder_input_ids",),
    ("input_ids", "pixel_values"),
    ("input_ids", "input_features"),
    ("bbox",),
)


class NoInputsError(Exception):
    """The model ran on nothing that was tried; the text is what it said to the last of it."""


def find_inputs(model: nn.Module, special: Callable[[Any], Inputs] | None = None) -> Inputs:
    """Return keyword inputs that the model runs on.

    Args:
        model: in evaluation mode.
        special: makes the inputs of this architecture from its config.

    Raises:
        NoInputsError: it ran on none.
    """
    said = ""
    for inputs in [special(model.config)] if special else _candidates(model):
        try:
            with torch.no_grad():
                model(**copied(inputs))
        except Exception as e:  # noqa: BLE001 - whatever its code raises
            said = said or f"{', '.join(inputs)}: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        else:
            return inputs
    raise NoInputsError(said)


def copied(inputs: Mapping[str, Any]) -> Inputs:
    """Return inputs that a forward may change."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _candidates(model: nn.Module) -> Iterator[Inputs]:
    """Yield inputs to try: what the forward names as its main input and what it requires, then with more beside it."""
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    required = [k for k, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [*([main] if isinstance(main, str) else main), *required]
    if "grid_thw" in takes or "image_grid_thw" in required:
        yield _patches(config, required)
    sets = [
        tuple(k for k in dict.fromkeys([*needed, *also]) if k in takes and k in _MAKERS) for also in _BESIDE
    ]
    for names in dict.fromkeys(sets):
        for forms in product(*(list(_MAKERS[name](config)) for name in names)):
            yield dict(zip(names, forms, strict=True))


def _patches(config: Any, required: list[str]) -> Inputs:
    """Return one image of 4 x 4 patches, each in one row, as the towers of many vision-language models take it."""
    patch = _number(config, "patch_size", default=8)
    frames = _number(config, "temporal_patch_size", default=1)
    width = _number(config, "in_channels", "num_channels", "in_chans", default=3) * frames * patch * patch
    grids = {k: torch.tensor([[1, 4, 4]]) for k in required if k.endswith("grid_thw")}
    first = next((k for k in required if k not in grids), "hidden_states")
    return {first: _noise(16, width), **grids}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _number(config: Any, *names: str, default: int) -> int:
    """Return the first of the fields that the config or a part of it has."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "model_type"))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return default


def _tokens(config: Any) -> Iterator[Tensor]:
    size = _number(config.get_text_config(), "vocab_size", default=0) or _number(
        config, "vocab_size", default=100
    )
    generator = torch.Generator().manual_seed(1)
    yield torch.randint(5, max(6, size // 2), (_BATCH, _LENGTH), generator=generator)
    yield torch.randint(0, 5, (_BATCH, 64), generator=generator)


def _decoder_tokens(config: Any) -> Iterator[Tensor]:
    size = _number(config.get_text_config(decoder=True), "vocab_size", default=0) or _number(
        config, "vocab_size", default=100
    )
    yield torch.randint(5, max(6, size // 2), (_BATCH, 6), generator=torch.Generator().manual_seed(2))


def _images(config: Any) -> Iterator[Tensor]:
    channels = _number(config, "num_channels", "in_channels", "in_chans", default=3)
    own = _number(config, "image_size", default=64)
    for size in dict.fromkeys((own, 32, 64, 128, 224)):
        yield _noise(_BATCH, channels, size, size)
    frames = _number(config, "num_frames", default=2)
    yield _noise(_BATCH, frames, channels, own, own)


def _videos(config: Any) -> Iterator[Tensor]:
    channels, size = (
        _number(config, "num_channels", "in_chans", default=3),
        _number(config, "image_size", default=32),
    )
    yield _noise(_BATCH, _number(config, "num_frames", "frames_per_clip", default=2), channels, size, size)


def _features(config: Any) -> Iterator[Tensor]:
    bins = _number(
        config, "num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "input_dim", default=80
    )
    frames = 2 * _number(config, "max_source_positions", default=32)
    yield _noise(_BATCH, bins, frames)
    yield _noise(_BATCH, 64, bins)
    yield _noise(_BATCH, 64, 2 * bins)


def _waves(config: Any) -> Iterator[Tensor]:
    yield _noise(_BATCH, 4000)
    yield _noise(_BATCH, 1, 4000)
    yield _noise(
        _BATCH, _number(config, "max_length", default=64), _number(config, "num_mel_bins", default=80)
    )


def _past(config: Any) -> Iterator[Tensor]:
    length = _number(config, "context_length", default=32)
    lags = getattr(config, "lags_sequence", None)
    if lags:
        yield _noise(_BATCH, length + max(lags))
    else:
        yield _noise(_BATCH, length, _number(config, "num_input_channels", default=1))
        yield _noise(_BATCH, length + 8)


def _boxes(config: Any) -> Iterator[Tensor]:
    corner = torch.randint(0, 50, (_BATCH, _LENGTH, 2), generator=torch.Generator().manual_seed(3))
    yield torch.cat([corner, corner + 20], dim=2)
    yield torch.cat([corner, corner + 20], dim=2) / 100


def _mask(*shape: int) -> Callable[[Any], Iterator[Tensor]]:
    return lambda config: iter([torch.ones(*shape, dtype=torch.long)])


def _past_mask(config: Any) -> Iterator[Tensor]:
    yield torch.ones_like(next(_past(config)))


def _past_features(config: Any) -> Iterator[Tensor]:
    length = _number(config, "context_length", default=32) + max(
        getattr(config, "lags_sequence", None) or [0]
    )
    yield _noise(_BATCH, length, config.num_time_features)


_MAKERS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _decoder_tokens,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_features": _features,
    "input_values": _waves,
    "past_values": _past,
    "bbox": _boxes,
    "qformer_input_ids": _tokens,
    "input_features_mask": _mask(_BATCH, 64),
    "past_observed_mask": _past_mask,
    "past_time_features": _past_features,
}
