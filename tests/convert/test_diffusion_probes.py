"""Inputs for diffusion models: of the shapes that the config says, the same every time, and all of them matter to the output."""

import diffusers
import pytest
import torch

import mono_quant as mq
from mono_quant.convert.diffusion_probes import make_diffusion_probe
from mono_quant.convert.probes import ProbeError
from mono_quant.errors import ConfigError
from tests.support import diffusion
from tests.support.diffusion import ATTENTION


def sdxl():
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    sizes = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return diffusers.UNet2DConditionModel(
        **blocks, **added, **sizes, cross_attention_dim=32, attention_head_dim=8
    )


def pixart_with_sizes():
    sizes = {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 4,
        "num_layers": 1,
        "sample_size": 128,
    }
    return diffusers.PixArtTransformer2DModel(**sizes, cross_attention_dim=48, caption_channels=32)


def hunyuan():
    text = {
        "text_embed_dim": 32,
        "pooled_projection_dim": 32,
        "rope_axes_dim": (4, 4, 8),
        "guidance_embeds": True,
    }
    sizes = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
    }
    return diffusers.HunyuanVideoTransformer3DModel(**ATTENTION, **text, **sizes)


def aura():
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
    }
    text = {"joint_attention_dim": 32, "caption_projection_dim": 64, "pos_embed_max_size": 64}
    return diffusers.AuraFlowTransformer2DModel(**ATTENTION, **sizes, **text)


def sana():
    crossed = {"num_cross_attention_heads": 4, "cross_attention_head_dim": 16, "cross_attention_dim": 64}
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "caption_channels": 32, "sample_size": 8}
    return diffusers.SanaTransformer2DModel(**ATTENTION, **crossed, **sizes)


def unet_of_classes():
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return diffusers.UNet2DModel(**blocks, **sizes, num_class_embeds=10)


FURTHER = {
    "sdxl": sdxl,
    "pixart of sizes": pixart_with_sizes,
    "hunyuan": hunyuan,
    "aura": aura,
    "sana": sana,
    "unet of classes": unet_of_classes,
}
BUILDERS = {**diffusion.MODELS, **FURTHER}


def parts(inputs):
    """The tensors of the inputs, by name, those inside of dictionaries too."""
    for name, value in inputs.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{own}", t) for own, t in value.items() if t is not None)
        else:
            yield name, value


def changed(inputs, which):
    def other(name, value):
        if isinstance(value, dict):
            return {own: other(f"{name}.{own}", v) for own, v in value.items()}
        if name != which:
            return value
        return value * 0.5 + 0.1 if value.is_floating_point() else (value + 1) % 10

    return {name: other(name, value) for name, value in inputs.items()}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_input_matters_to_the_output(name):
    model = diffusion.enlivened(BUILDERS[name])
    probe, again = make_diffusion_probe(model), make_diffusion_probe(model)
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(parts(probe.kwargs), parts(again.kwargs), strict=True)
    )
    with torch.no_grad():
        expected = model(**probe.kwargs).sample
        assert expected.isfinite().all()
        for which, _ in parts(probe.kwargs):
            assert not torch.equal(model(**changed(probe.kwargs, which)).sample, expected), which


@pytest.mark.parametrize(
    ("name", "shape"),
    [("dit", (2, 4, 8, 8)), ("flux", (2, 256, 16)), ("wan", (2, 4, 5, 16, 16)), ("vae", (2, 3, 16, 16))],
)
def test_noise_has_the_shape_that_the_config_says(name, shape):
    probe = make_diffusion_probe(diffusion.build(name))
    latents = next(iter(probe.kwargs.values()))
    assert tuple(latents.shape) == shape and probe.name == f"noise of {' x '.join(map(str, shape))}"


def test_inputs_have_the_dtype_of_the_weights():
    kwargs = make_diffusion_probe(diffusion.build("unet").bfloat16()).kwargs
    assert {t.dtype for t in kwargs.values() if t.is_floating_point()} == {torch.bfloat16}


def test_of_a_class_that_is_not_known_nothing_is_measured_and_that_is_said():
    model = diffusers.VQModel(norm_num_groups=8, block_out_channels=(16,), sample_size=8).eval()
    with pytest.raises(ProbeError, match="what a VQModel takes is not known; pass probe="):
        make_diffusion_probe(model)
    report = mq.quantize(model, min_params=0).report
    assert report.fidelity is None and "VQModel" in report.fidelity_note
    with pytest.raises(ConfigError, match="what a VQModel takes is not known"):
        mq.quantize(model, fidelity=True)
    measured = mq.quantize(model, probe=torch.randn(1, 3, 8, 8)).report.fidelity
    assert measured is not None and measured["output"] == "sample"
