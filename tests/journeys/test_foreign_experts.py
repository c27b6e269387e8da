"""int8 checkpoints of others, dense and with experts: all of int8 stays int8, and computes what the codes stand for.

They are written by compressed-tensors' compressor, which sees no experts, and by its arithmetic tensor by tensor, one matrix per
expert: that is what llm-compressor's `model_free_ptq` does, and scripts/interop llmcompressor runs that itself.
"""

import json
import re

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from models import FAMILIES, relative_error, run, seeded, text, transformer
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import mono_quant
from mono_quant import kernels
from mono_quant.convert.int8_layers import Int8Module

HEADS = {"num_key_value_heads": 2, "head_dim": 16}
DEEPSEEK = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
            "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1}  # fmt: skip
MODELS = {
    "llama": FAMILIES["llama"].make,
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**transformer, **HEADS)),
    "qwen3_moe": FAMILIES["qwen3_moe"].make,
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**transformer, **DEEPSEEK)),
}
# as people give it to llm-compressor: the head, the tables and the routers
IGNORE = ["lm_head", "re:.*embed_tokens$", r"re:.*mlp\.gate$"]
SCHEME = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=8, strategy="channel"),
    input_activations=QuantizationArgs(num_bits=8, strategy="token", dynamic=True),
    format="int-quantized",
)


def is_ignored(module):
    return any(re.match(x[3:], module) if x.startswith("re:") else x == module for x in IGNORE)


def scale_of(weight):
    return calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), SCHEME.weights)


def compress(model, folder):
    """Save a model that compressed-tensors has compressed in memory."""
    apply_quantization_config(model, QuantizationConfig(config_groups={"W8A8": SCHEME}, ignore=IGNORE))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.weight_scale.data, _ = scale_of(module.weight.detach())
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def write(model, folder):
    """Save a float model, and turn its matrices into codes where they lie."""
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [n for n, t in state.items() if t.dim() == 2 and not is_ignored(n.removesuffix(".weight"))]:
        weight = state[name]
        scale, zero = scale_of(weight)
        state[name] = quantize(weight, scale, zero, SCHEME.weights, dtype=torch.int8)
        state[f"{name}_scale"] = scale
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"W8A8": SCHEME.model_dump(mode="json")}, "ignore": IGNORE, "transform_config": {},
        "kv_cache_scheme": None, "global_compression_ratio": None, "version": "0.19.0",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def meant(state, folder):
    """The float model that transformers reads from what the codes stand for."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    wide = {
        name: tensor.float() * state[f"{name}_scale"] if tensor.dtype == torch.int8 else tensor
        for name, tensor in state.items()
        if not name.endswith("_scale")
    }
    (folder / "meant").mkdir()
    save_file(wide, folder / "meant" / "model.safetensors", {"format": "pt"})
    (folder / "meant" / "config.json").write_text(json.dumps(config))
    cls = getattr(hf, config["architectures"][0])
    return cls.from_pretrained(folder / "meant", experts_implementation="eager").eval()


class RoundedInputs(TorchFunctionMode):
    """Rounds what goes into a product with one of some weights, or a part of one, per token to 8 bits."""

    def __init__(self, weights):
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear and args[1].untyped_storage().data_ptr() in self.weights:
            scale = args[0].abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
            args = ((args[0] / scale).round() * scale, *args[1:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("writer", [compress, write])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_int8_stays_so_and_computes_what_it_stands_for(name, writer, tmp_path):
    made = seeded(MODELS[name]).eval()
    for parameter in made.parameters():
        # so that experts, of which such small weights leave next to nothing, count
        parameter.data *= 3 if parameter.dim() > 1 else 1
    writer(made, tmp_path / "theirs")
    state, inputs = load_file(tmp_path / "theirs" / "model.safetensors"), seeded(text)
    model = mono_quant.load(tmp_path / "theirs")
    in_file = sum(t.nbytes for t in state.values() if t.dtype == torch.int8)
    in_memory = sum(p.nbytes for p in model.parameters() if p.dtype == torch.int8)
    assert in_memory == in_file > 0
    reference = meant(state, tmp_path / "theirs")
    layers = {n for n, m in model.named_modules() if isinstance(m, Int8Module)}
    weights = [p for n, p in reference.named_parameters() if p.dim() > 1 and n.rpartition(".")[0] in layers]
    with kernels.using("reference"):
        ours = run(model, inputs)
    exact = run(reference, inputs)
    with RoundedInputs(weights):
        rounded = run(reference, inputs)
    rounding = relative_error(exact, rounded)
    # not equal: a value next to the edge of a step may fall on its other side
    assert 0 < relative_error(exact, ours) < 1.1 * rounding < 0.1
    assert relative_error(rounded, ours) < 0.1 * rounding
