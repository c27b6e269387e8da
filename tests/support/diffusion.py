"""Tiny random models of diffusers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
from models import seeded
from safetensors.torch import save_file
from torch import Tensor, nn

ATTENTION = {"num_attention_heads": 4, "attention_head_dim": 16}


def dit(**changes: Any) -> nn.Module:
    sizes = {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 100,
    }
    return diffusers.DiTTransformer2DModel(**ATTENTION, **sizes | changes)


def flux() -> nn.Module:
    sizes = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    return diffusers.FluxTransformer2DModel(**ATTENTION, **sizes, **text)


def sd3() -> nn.Module:
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    text = {"joint_attention_dim": 32, "caption_projection_dim": 64, "pooled_projection_dim": 64}
    return diffusers.SD3Transformer2DModel(**ATTENTION, **sizes, **text)


def pixart() -> nn.Module:
    sizes = {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "caption_channels": 32}
    text = {"cross_attention_dim": 64, "use_additional_conditions": False}
    return diffusers.PixArtTransformer2DModel(**ATTENTION, **sizes, **text)


def wan() -> nn.Module:
    sizes = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 128,
    }
    return diffusers.WanTransformer3DModel(**ATTENTION, **sizes)


def unet() -> nn.Module:
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
    }
    sizes = {"sample_size": 8, "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 8}
    return diffusers.UNet2DConditionModel(**blocks, **sizes, norm_num_groups=8)


def vae() -> nn.Module:
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (16, 32),
    }
    return diffusers.AutoencoderKL(**blocks, layers_per_block=1, norm_num_groups=8, sample_size=16)


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "dit": dit,
    "flux": flux,
    "sd3": sd3,
    "pixart": pixart,
    "wan": wan,
    "unet": unet,
    "vae": vae,
}


def build(name: str, **changes: Any) -> nn.Module:
    """Return the same model every time."""
    return enlivened(lambda: MODELS[name](**changes))


def enlivened(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the same model every time; what starts as zero (gates, last layers) is random, so that errors show."""

    def made() -> nn.Module:
        model = make()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        return model

    return seeded(made).eval()


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
