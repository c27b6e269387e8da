"""int8 folders of others: compressed-tensors itself writes them here, and reads them for comparison; the rest is told its way out."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from models import FAMILIES, relative_error, run
from safetensors.torch import load_file, save_file
from torch import nn

import mono_quant
from mono_quant.convert.int8_layers import tensors_of
from mono_quant.errors import AlreadyQuantizedError, CorruptCheckpointError, UnsupportedModelError

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
# the last layer stays float, but for the test of a tied head
HEADS = {"llama": "lm_head", "bert": "classifier", "vit": "classifier", "llama_tied": None}


def write(name, folder, **changes):
    """Write a family's model as compressed-tensors does, with what `changes` says in the group."""
    model = FAMILIES[name].build()
    group = {
        "targets": ["Linear"],
        "format": "int-quantized",
        "weights": WEIGHTS,
        "input_activations": INPUTS,
    }
    ignore = [HEADS[name]] if HEADS[name] else []
    config = QuantizationConfig(config_groups={"group_0": {**group, **changes}}, ignore=ignore)
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            # no gradient: the library keeps tensors that an earlier test may have made in inference mode
            weight = module.weight.detach()
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            scale, zero = calculate_qparams(low, high, module.quantization_scheme.weights)
            module.weight_scale.data = scale
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data = zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / "config.json")
    state = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    compressor.update_config(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a family's folder once; each caller gets a copy."""
    root, made = tmp_path_factory.mktemp("written"), {}

    def copied(name, to, **changes):
        key = json.dumps([name, changes], sort_keys=True)
        if key not in made:
            made[key] = write(name, root / str(len(made)), **changes)
        return Path(shutil.copytree(made[key], to))

    return copied


def change(folder, block=None, group=None, tensors=None, **fields):
    """Change a folder's config: its quantization block, the group in it, other fields; or its tensors."""
    raw = json.loads((folder / "config.json").read_text())
    if "quantization_config" in raw:
        described = raw["quantization_config"]
        (block or (lambda b: None))(described)
        (group or (lambda g: None))(described["config_groups"]["group_0"])
    (folder / "config.json").write_text(json.dumps(raw | fields))
    if tensors:
        state = load_file(folder / "model.safetensors")
        tensors(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def exact(name, folder):
    """The family's output in float32 with the weights that the folder's codes stand for, activations not rounded."""
    model, state = FAMILIES[name].build(), load_file(folder / "model.safetensors")
    for key, codes in state.items():
        if codes.dtype == torch.int8 and f"{key}_scale" in state:
            module = model.get_submodule(key.removesuffix(".weight"))
            module.weight = nn.Parameter(codes.float() * state[f"{key}_scale"].float())
    return run(model, FAMILIES[name].inputs())


def theirs(name, folder):
    cls = type(FAMILIES[name].build())
    return run(cls.from_pretrained(folder).eval(), FAMILIES[name].inputs())


def ours(name, folder):
    model = mono_quant.load(folder)
    codes = load_file(folder / "model.safetensors")
    held = {n: t for n, t in tensors_of(model).items() if t.dtype == torch.int8}
    assert held and all(torch.equal(t, codes[n]) for n, t in held.items())
    return run(model, FAMILIES[name].inputs())


def says(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("mono_quant")]


# What is valid is loaded


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_what_the_weights_are_is_told_by_the_tensors(written, tmp_path, caplog, name):
    folder = written(name, tmp_path / "theirs")
    reference, output = exact(name, folder), theirs(name, folder)
    # both round activations to 8 bits or more: at worst the errors point in opposite directions
    bound = 2 * relative_error(reference, output)
    for status in ("compressed", "frozen", "initialized", None):
        change(folder, lambda b, s=status: b.update(quantization_status=s))
        assert 0 < relative_error(reference, ours(name, folder)) <= bound, status
    change(folder, lambda b: b.pop("quantization_status"))
    assert 0 < relative_error(reference, ours(name, folder)) <= bound
    assert says(caplog) == []


def bare(group):
    for part in ("weights", "input_activations"):
        for key in ("symmetric", "num_bits", "type", "group_size"):
            group[part].pop(key, None)
    del group["weights"]["dynamic"]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_left_out_has_the_value_of_compressed_tensors(written, tmp_path, caplog, name):
    folder = written(name, tmp_path / "theirs")
    whole = ours(name, folder)
    change(folder, group=bare)
    assert torch.equal(ours(name, folder), whole) and says(caplog) == []
    assert relative_error(exact(name, folder), theirs(name, folder)) < 0.02


def test_zero_points_that_are_zero_say_nothing(written, tmp_path, caplog):
    folder = written("llama", tmp_path / "theirs")
    whole = ours("llama", folder)

    def add(state):
        for key in [k for k in state if k.endswith("weight_scale")]:
            state[key.replace("scale", "zero_point")] = torch.zeros_like(state[key], dtype=torch.int8)

    change(folder, tensors=add)
    assert torch.equal(ours("llama", folder), whole) and says(caplog) == []


# What is computed in another way is said


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"group": lambda g: g.pop("input_activations")}, "W8A16"),
        ({"group": lambda g: g.update(input_activations=None)}, "W8A16"),
        ({"group": lambda g: g.update(output_activations=INPUTS)}, "output_activations"),
        ({"block": lambda b: b.update(kv_cache_scheme={"num_bits": 8, "type": "float"})}, "kv_cache_scheme"),
    ],
    ids=["W8A16", "W8A16 null", "outputs", "cache"],
)
def test_what_is_computed_in_another_way_is_said(written, tmp_path, caplog, edit, words):
    folder = change(written("llama", tmp_path / "theirs"), **edit)
    ours("llama", folder)
    (said,) = says(caplog)
    assert words in said and str(folder) in said
    assert [r.levelno for r in caplog.records if r.name.startswith("mono_quant")] == [logging.WARNING]


def test_an_int8_head_in_a_tied_config_is_used_and_said(written, tmp_path, caplog):
    folder = written("llama_tied", tmp_path / "theirs")
    state = load_file(folder / "model.safetensors")
    assert (
        state["lm_head.weight"].dtype == torch.int8
        and state["model.embed_tokens.weight"].dtype == torch.float32
    )
    found = ours("llama_tied", folder)
    (said,) = says(caplog)
    assert "lm_head.weight" in said and "tie_word_embeddings" in said
    caplog.clear()
    # the remedy that is named: the same, without a word
    change(folder, tie_word_embeddings=False)
    assert torch.equal(ours("llama_tied", folder), found) and says(caplog) == []
    model = FAMILIES["llama_tied"].build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    assert relative_error(run(model, FAMILIES["llama_tied"].inputs()), found) < 0.03
    loaded = mono_quant.load(folder)
    assert not loaded.config.tie_word_embeddings


# What is not is refused, with a way that works


def test_weights_that_are_not_compressed_are_refused(written, tmp_path):
    def widen(state):
        for key in [k for k in state if f"{k}_scale" in state]:
            state[key] = state[key].float() * state[f"{key}_scale"]

    folder = change(
        written("llama", tmp_path / "theirs"), lambda b: b.update(quantization_status="frozen"), tensors=widen
    )
    with pytest.raises(
        UnsupportedModelError, match=r"float32 beside its scale.*'frozen'.*quantize the original"
    ):
        mono_quant.load(folder)


def test_zero_points_that_are_not_zero_are_refused(written, tmp_path):
    asymmetric = written("llama", tmp_path / "theirs", weights={**WEIGHTS, "symmetric": False})
    assert torch.any(
        load_file(asymmetric / "model.safetensors")["model.layers.0.mlp.up_proj.weight_zero_point"]
    )
    with pytest.raises(
        UnsupportedModelError, match=r"not symmetric int8 per channel.*transformers and the package"
    ):
        mono_quant.load(asymmetric)
    reference = theirs("llama", asymmetric)
    change(asymmetric, group=lambda g: g["weights"].pop("symmetric"))
    with pytest.raises(
        CorruptCheckpointError, match=r"weight_zero_point is not zero.*symmetric: false"
    ) as caught:
        mono_quant.load(asymmetric)
    assert "codes" not in str(caught.value)
    change(asymmetric, group=lambda g: g["weights"].update(symmetric=False))
    assert torch.equal(theirs("llama", asymmetric), reference)


def test_transforms_are_not_sent_to_transformers_which_leaves_them_out(written, tmp_path):
    folder = change(
        written("llama", tmp_path / "theirs"),
        lambda b: b.update(transform_config={"config_groups": {"u": {}}}),
    )
    with pytest.raises(UnsupportedModelError, match="transforms; run it with vLLM"):
        mono_quant.load(folder)
    with pytest.raises(AlreadyQuantizedError) as caught:
        mono_quant.quantize(folder)
    assert "load(" not in str(caught.value)


# Each method has one way out, and both verbs name it

METHODS = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "transformers and the package bitsandbytes"),
    "old bitsandbytes": ({"load_in_4bit": True}, "transformers and the package bitsandbytes"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "transformers and the package torchao"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "transformers and the package gptqmodel"),
    "fp8": ({"quant_method": "fp8"}, "run it with transformers;"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "optimum-quanto"),
    "quanto's own": (None, "optimum-quanto"),
    "exl3": ({"quant_method": "exl3", "bits": 4}, "the library that wrote it"),
    "four bits": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": WEIGHTS | {"num_bits": 4}}}},
        "transformers and the package compressed-tensors",
    ),
    "a text": ("int8", "the library that wrote it"),
}  # fmt: skip


@pytest.mark.parametrize("method", list(METHODS))
def test_both_verbs_name_the_same_way_out_for_a_method_of_others(tmp_path, method):
    block, way = METHODS[method]
    folder = tmp_path / "theirs"
    model = FAMILIES["llama"].build()
    model.save_pretrained(folder)
    if block is None:
        (folder / "quanto_qmap.json").write_text("{}")
    else:
        change(folder, quantization_config=block)
    said = []
    for verb, error in (
        (mono_quant.load, UnsupportedModelError),
        (mono_quant.quantize, AlreadyQuantizedError),
    ):
        with pytest.raises(error) as caught:
            verb(folder)
        said.append(str(caught.value))
    for message in said:
        assert way in message and "quantize the original model" in message
        assert "load(" not in message and f"quantize({str(folder)!r})" not in message


def test_what_can_be_kept_in_int8_is_sent_to_load(written, tmp_path):
    folder = written("llama", tmp_path / "theirs")
    with pytest.raises(AlreadyQuantizedError, match=r"'compressed-tensors'\); use load\("):
        mono_quant.quantize(folder)
    with pytest.raises(AlreadyQuantizedError, match=r"'compressed-tensors'\); use load\("):
        mono_quant.plan(folder)


def test_codes_that_no_config_explains_are_not_called_float(tmp_path):
    folder = tmp_path / "theirs"
    FAMILIES["llama"].build().save_pretrained(folder)

    def pack(state):
        key = "model.layers.0.mlp.up_proj.weight"
        state[key] = torch.ones_like(state[key], dtype=torch.int8)

    change(folder, tensors=pack)
    with pytest.raises(
        UnsupportedModelError, match=r"up_proj.weight is torch.int8, but config.json has no"
    ) as caught:
        mono_quant.load(folder)
    assert "is not quantized" not in str(caught.value)
