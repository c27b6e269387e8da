"""Which kinds of fp8 a config describes, and what is said of those that are not read."""

import pytest
import torch
from fp8 import CODES
from transformers import FineGrainedFP8Config

from mono_quant.errors import AlreadyQuantizedError, CorruptCheckpointError
from mono_quant.hf.fp8 import fp8_weights, told
from mono_quant.io.tensors.blockwise import Scaled

BLOCK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
SHAPES = {
    "a.weight": (CODES, (130, 257)),
    "a.weight_scale_inv": (torch.float32, (2, 3)),
    "norm.weight": (torch.bfloat16, (257,)),
}


def weights(block, shapes=SHAPES, **more):
    return fp8_weights({"quantization_config": block, **more}, shapes, "this")


def test_deepseeks_config_and_that_of_transformers():
    for block in (BLOCK, FineGrainedFP8Config().to_dict(), {"quant_method": "fp8"}):
        found = weights(block)
        assert found.scaled == {"a.weight": Scaled("a.weight_scale_inv", (128, 128))}
        assert found.dtype == torch.bfloat16 and found.hidden == {"a.weight_scale_inv"}
    assert told(found) == (
        "the source holds 1 weights in fp8 (e4m3, blocks of 128 x 128), which were dequantized to bfloat16 before they were "
        "converted; sizes before are those in bfloat16"
    )


def test_a_model_with_several_parts_says_it_of_its_text():
    nested = fp8_weights({"text_config": {"quantization_config": BLOCK}}, SHAPES, "this")
    assert nested == weights(BLOCK)


@pytest.mark.parametrize(
    "raw", [{}, {"quantization_config": None}, {"text_config": {}}, {"text_config": None}]
)
def test_other_configs_say_nothing_of_fp8(raw):
    assert fp8_weights(raw, SHAPES, "this") is None
    assert fp8_weights({"quantization_config": {"quant_method": "gptq"}}, SHAPES, "this") is None


def test_one_scale_per_matrix():
    shapes = SHAPES | {
        "a.weight_scale_inv": (torch.bfloat16, ()),
        "a.activation_scale": (torch.bfloat16, ()),
    }
    found = weights(BLOCK | {"weight_block_size": None, "activation_scheme": "static"}, shapes)
    assert found.scaled == {"a.weight": Scaled("a.weight_scale_inv", (130, 257))}
    assert found.hidden == {"a.weight_scale_inv", "a.activation_scale"}
    assert found.shapes(shapes) == {
        "a.weight": (torch.bfloat16, (130, 257)),
        "norm.weight": SHAPES["norm.weight"],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_get_the_dtype_of_what_stayed_in_float(dtype):
    shapes = SHAPES | {
        "norm.weight": (dtype, (257,)),
        "a.weight_scale_inv": (torch.float32, (2, 3)),
        "bias": (torch.float64, (999,)),
    }
    assert weights(BLOCK, shapes).dtype == dtype
    del shapes["norm.weight"]
    assert weights(BLOCK, shapes).dtype == torch.bfloat16


OTHER = {
    "fmt": (BLOCK | {"fmt": "e5m2"}, SHAPES, "fmt is 'e5m2', and 'e4m3' alone is read here"),
    "fp4": (BLOCK | {"expert_dtype": "fp4"}, SHAPES, "expert_dtype is 'fp4', and 'fp8' alone"),
    "tables": (BLOCK | {"modules_to_convert": ["embed"]}, SHAPES, r"tables are fp8, too: \['embed'\]"),
    "float": (BLOCK, {"a.weight": (torch.bfloat16, (4, 4))}, "but no tensor is float8_e4m3fn"),
    "AutoFP8": (
        BLOCK,
        {
            "a.weight": (CODES, (4, 4)),
            "a.weight_scale": (torch.float32, ()),
            "a.input_scale": (torch.float32, ()),
        },
        r"a\.weight has no scales that transformers reads, a\.weight_scale_inv, but \['a\.input_scale', 'a\.weight_scale'\]",
    ),
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_kinds_of_fp8_are_named_with_their_way_out(kind):
    block, shapes, words = OTHER[kind]
    with pytest.raises(
        AlreadyQuantizedError,
        match=rf"this is quantized already \(quant_method 'fp8'; {words}.*\); run it with transformers; to convert",
    ):
        weights(block, shapes)


@pytest.mark.parametrize("size", [128, [128], [128, 0], [128, 1.5], [True, 128], "128x128", [1, 2, 3]])
def test_a_block_size_is_two_numbers(size):
    with pytest.raises(
        CorruptCheckpointError, match=r"this: weight_block_size of config\.json is .* correct it"
    ):
        weights(BLOCK | {"weight_block_size": size})
