"""Which method quantized a foreign checkpoint, and which package transformers wants for it."""

import inspect
import re

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from mono_quant.hf.methods import method_of, way_out

METHODS = "aqlm auto-round awq bitsandbytes compressed-tensors gptq higgs hqq torchao vptq"


@pytest.mark.parametrize(
    ("block", "method"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "gptq", "load_in_8bit": True}, "gptq"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_4bit": False, "load_in_8bit": False}, "unknown"),
        ({}, "unknown"),
        ("int8", "unknown: 'int8'"),
    ],
)
def test_a_block_tells_its_method(block, method):
    assert method_of({"quantization_config": block}, ["quanto_qmap.json"]) == method


def test_without_a_block_only_a_file_of_quanto_tells_one():
    assert method_of({}, ["config.json", "quanto_qmap.json"]) == "quanto"
    assert method_of({"quantization_config": None}, ["config.json"]) == ""


@pytest.mark.parametrize("method", METHODS.split())
def test_transformers_runs_it_with_the_package_that_its_own_code_asks_for(method):
    found = re.fullmatch(
        r"run it with transformers and the package (\S+); to convert the model, quantize the original model in float",
        way_out(method),
    )
    (name, *_) = (n for n in AUTO_QUANTIZER_MAPPING if n in (method, f"{method}_4bit"))
    code = inspect.getsource(inspect.getmodule(AUTO_QUANTIZER_MAPPING[name]))
    assert re.search(rf"(?<![\w-]){re.escape(found[1])}(?![\w-])", code)


def test_other_methods():
    assert way_out("mxfp4").startswith("run it with transformers; to convert")
    assert way_out("quanto").startswith("run it with optimum-quanto (")
    assert way_out("bitsandbytes_4bit").startswith("run it with the library that wrote it; to convert")
