"""Loading: see the room of this name."""

import contextlib
import hashlib
import json
import os
import re
import shutil

import pytest
import torch
import transformers
from models import FAMILIES, Cnn, Lstm, relative_error, run, seeded, snapshot, tiny_llama
from safetensors.torch import load_file, save_file
from saved import EACH, MANIFEST, QUIET, WEIGHTS, factory, read, saved_once
from torch import nn

import mono_quant as mq
from mono_quant import kernels
from mono_quant.convert.int8_layers import Int8Linear, Int8Module
from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    FormatVersionError,
    LimitExceededError,
    MissingFileError,
    MonoQuantError,
    UnsupportedModelError,
)


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def reseal(folder):
    """Make the manifest agree with the files again, as an attacker would."""
    manifest = read(folder / MANIFEST)
    manifest["files"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in snapshot(folder).items()
        if name != MANIFEST
    }
    write(folder / MANIFEST, manifest)


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    reseal(folder)


def change_json(folder, file, **fields):
    write(folder / file, read(folder / file) | fields)
    reseal(folder)


def codes_of(tensors):
    return next(n for n in sorted(tensors) if f"{n}_scale" in tensors)


def flip(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-100] ^= 1
    (folder / WEIGHTS).write_bytes(data)


DAMAGES = {
    "flipped bit": (flip, rf"{WEIGHTS} has sha256"),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 1000), rf"{WEIGHTS} has 1000 bytes instead of"),
    "missing": (lambda f: (f / WEIGHTS).unlink(), rf"{WEIGHTS} is missing"),
    "report missing": (lambda f: (f / "mono_quant_report.json").unlink(), "mono_quant_report.json is missing"),
    "extra file": (lambda f: (f / "extra.py").write_text(""), "extra.py' is not listed"),
    "extra shard": (lambda f: shutil.copy(f / WEIGHTS, f / "model-00001-of-00001.safetensors"), "is not listed"),
    "link": (lambda f: (shutil.move(f / WEIGHTS, f.parent), (f / WEIGHTS).symlink_to(f.parent / WEIGHTS)), "symbolic link"),
    "swapped": (lambda f: shutil.copy(f / "README.md", f / "mono_quant_report.json"), "mono_quant_report.json has"),
}  # fmt: skip


@EACH
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(folder, name, damage):
    spoil, match = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(CorruptCheckpointError, match=match):
        mq.load(folder, model=factory(name))
    with pytest.raises(CorruptCheckpointError, match=match):
        mq.QuantizedModel.from_folder(folder, factory(name))


@pytest.mark.parametrize("name", ["llama"])
def test_sizes_are_compared_even_without_hashes(folder, name):
    flip(folder)
    assert mq.load(folder, verify=False)
    os.truncate(folder / WEIGHTS, 1000)
    with pytest.raises(CorruptCheckpointError, match="1000 bytes"):
        mq.load(folder, verify=False)


@EACH
def test_an_edited_card_is_no_damage(folder, name):
    (folder / "README.md").write_text("edited on the Hub")
    assert mq.load(folder, model=factory(name))
    (folder / "README.md").unlink()
    assert mq.load(folder, model=factory(name))


@EACH
def test_a_newer_format_says_to_update(folder, name):
    change_json(folder, MANIFEST, format_version=2)
    with pytest.raises(FormatVersionError, match=r"format version 2.*pip install -U mono-quant"):
        mq.load(folder, model=factory(name))


@EACH
@pytest.mark.parametrize("fields", [{"kind": "hologram"}, {"layout": "spiral"}], ids=str)
def test_a_kind_from_the_future_says_to_update(folder, name, fields):
    change_json(folder, MANIFEST, **fields)
    if name == "cnn" and "layout" in fields:
        # the layout of a plain module is told by its table
        return
    with pytest.raises(FormatVersionError, match=f"{next(iter(fields.values()))}.*update mono_quant"):
        mq.load(folder)


def test_what_is_no_saved_model_is_told_apart(tmp_path):
    with pytest.raises(MissingFileError, match=r"is no folder; give the folder that save\(\) wrote"):
        mq.load(tmp_path / "nothing")
    with pytest.raises(MissingFileError, match=r"neither mono_quant\.json nor config\.json"):
        mq.load(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "float")
    with pytest.raises(UnsupportedModelError, match=r"is not quantized; use quantize\("):
        mq.load(tmp_path / "float")


@pytest.mark.parametrize("name", ["gpt2"])
def test_our_own_format_without_its_manifest_is_refused(folder, name):
    (folder / MANIFEST).unlink()
    with pytest.raises(MissingFileError, match=rf"without its {MANIFEST}; download the whole folder"):
        mq.load(folder)


@pytest.mark.parametrize("name", ["llama"])
def test_the_standard_format_loads_without_its_manifest(base, folder, name):
    (folder / MANIFEST).unlink()
    inputs = FAMILIES[name].inputs()
    assert torch.equal(run(mq.load(folder), inputs), run(mq.load(saved_once(base, name)), inputs))


HOSTILE_FACTS = [
    {"tensors": []},
    {"tensors": {"a": 3}},
    {"tensors": {"a": {"shape": [1, 1], "transposed": False}}},
    {"tensors": None},
    {"buffers": {"nothing": "float16"}},
    {"buffers": {"model.rotary_emb.inv_freq": "load"}},
    {"buffers": ["x"]},
    {"built": 3},
    {"built": "int8"},
    {"kind": None},
    {"kind": "module"},
    {"files": {}},
    {"files": {"../x": {"size": 1, "sha256": ""}}},
]


@EACH
@pytest.mark.parametrize("fields", HOSTILE_FACTS, ids=str)
def test_a_manifest_with_strange_facts_gives_typed_errors_or_none(folder, name, fields):
    write(folder / MANIFEST, read(folder / MANIFEST) | fields)
    try:
        mq.load(folder, model=factory(name))
    except MonoQuantError as error:
        assert str(error)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_folder_of_an_older_version_loads_in_the_dtypes_of_its_file(dtype, tmp_path):
    result = mq.quantize(tiny_llama().bfloat16(), dtype, skip=["lm_head"], **QUIET)
    folder = result.save(tmp_path / "saved")
    older = {key: value for key, value in read(folder / MANIFEST).items() if key != "built"}
    write(folder / MANIFEST, older | {"kept": {"lm_head.weight": "bfloat16"} if dtype == "fp16" else {}})
    inputs = FAMILIES["llama"].inputs()
    assert torch.equal(run(mq.load(folder), inputs), run(result.model, inputs))


def test_a_missing_field_of_the_manifest_is_typed(base, tmp_path):
    folder = shutil.copytree(saved_once(base, "gpt2"), tmp_path / "saved")
    whole = read(folder / MANIFEST)
    for field in whole:
        write(folder / MANIFEST, {k: v for k, v in whole.items() if k != field})
        for verb in (mq.load, mq.QuantizedModel.from_folder):
            with contextlib.suppress(MonoQuantError):
                verb(folder)


def put(suffix, make):
    def change(tensors):
        name = codes_of(tensors)
        tensors[name + suffix] = make(tensors[name + suffix])

    return change


def one(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[1] = value
        return tensor

    return change


def lose(suffix):
    return lambda tensors: tensors.pop(codes_of(tensors) + suffix)


WRONG = {
    "scale is NaN": (put("_scale", one(float("nan"))), "not finite and positive"),
    "scale is infinite": (put("_scale", one(float("inf"))), "not finite and positive"),
    "scale is zero": (put("_scale", one(0.0)), "not finite and positive"),
    "scale is negative": (put("_scale", one(-0.01)), "not finite and positive"),
    "scale is too short": (put("_scale", lambda t: t[:-1].clone()), "expected float"),
    "scale is too long": (put("_scale", lambda t: torch.cat([t, t])), "expected float"),
    "scale is one number": (put("_scale", lambda t: t[0, 0].clone()), "expected float"),
    "scale is an integer": (put("_scale", lambda t: torch.ones_like(t, dtype=torch.int32)), "expected float"),
    "scale is missing": (lose("_scale"), None),
    "codes are missing": (lose(""), None),
    "codes are too few": (put("", lambda t: t.flatten()[:-1].clone()), None),
    "codes are float": (put("", lambda t: t.float()), None),
    "codes are unsigned": (put("", lambda t: t.view(torch.uint8)), None),
    "codes are wide": (put("", lambda t: t.to(torch.int16)), None),
    "a norm is missing": (
        lambda t: t.pop(next(n for n in t if "norm" in n or "ln_" in n or n == "bn.bias")),
        "missing",
    ),
    "a stray int8 tensor": (
        lambda t: t.__setitem__("stray.weight", torch.ones(3, 4, dtype=torch.int8)),
        "stray",
    ),
    "a stray int8 layer": (
        lambda t: t.update({
            "stray.weight": torch.ones(12, dtype=torch.int8),
            "stray.weight_scale": torch.ones(3, 1),
        }),
        "stray",
    ),
}


@EACH
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_codes_and_scales_are_refused(folder, name, wrong):
    change, match = WRONG[wrong]
    change_tensors(folder, change)
    with pytest.raises(CorruptCheckpointError, match=match) as caught:
        mq.load(folder, model=factory(name))
    assert "ignore_mismatched_sizes" not in str(caught.value), (
        "the message is that of transformers and names no tensor"
    )


@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_codes_in_the_shape_of_the_weight_are_not_our_format(folder, name):
    shapes = {n: facts["shape"] for n, facts in read(folder / MANIFEST)["tensors"].items()}
    first = next(iter(shapes))
    change_tensors(folder, lambda t: t.__setitem__(first, t[first].view(shapes[first])))
    with pytest.raises(CorruptCheckpointError, match="flat int8 codes"):
        mq.load(folder, model=factory(name))


@pytest.mark.parametrize("name", ["llama"])
def test_a_config_of_another_size_is_refused(folder, name):
    change_json(folder, "config.json", num_hidden_layers=1)
    with pytest.raises(CorruptCheckpointError):
        mq.load(folder)
    change_json(folder, "config.json", num_hidden_layers=3)
    with pytest.raises(CorruptCheckpointError, match="missing"):
        mq.load(folder)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_plain_module_loads_into_an_instance_or_a_factory(dtype, tmp_path):
    inputs = FAMILIES["cnn"].inputs()
    result = mq.quantize(seeded(Cnn).eval(), dtype, **QUIET)
    folder = result.save(tmp_path / "out")
    instance = seeded(Cnn, seed=5)
    before = {n: (t.data_ptr(), t.clone()) for n, t in instance.state_dict().items()}
    modules = [id(m) for m in instance.modules()]
    loaded = mq.load(folder, model=instance)
    assert loaded is not instance and [id(m) for m in instance.modules()] == modules
    assert all(m.training for m in instance.modules())
    for n, tensor in instance.state_dict().items():
        assert tensor.data_ptr() == before[n][0] and torch.equal(tensor, before[n][1])
    expected = run(result.model, inputs)
    assert torch.equal(run(loaded, inputs), expected)
    assert torch.equal(run(mq.load(folder, model=Cnn), inputs), expected)
    # what is loaded does not share memory with the instance
    for parameter in instance.parameters():
        parameter.data.fill_(7.0)
    assert torch.equal(run(loaded, inputs), expected)


def test_a_plain_module_needs_its_class_and_the_right_one(base):
    folder = saved_once(base, "cnn")
    with pytest.raises(
        ConfigError, match=r"holds a Cnn, which only your code can build.*model=Cnn\(\.\.\.\)"
    ):
        mq.load(folder)
    with pytest.raises(ConfigError, match=r"made a int, not an nn.Module"):
        mq.load(folder, model=int)
    with pytest.raises(CorruptCheckpointError, match="pass the same architecture"):
        mq.load(folder, model=Lstm)

    def wider():
        model = Cnn()
        model.bn2 = nn.BatchNorm2d(65)
        return model

    with pytest.raises(CorruptCheckpointError, match=r"other shape \['bn2"):
        mq.load(folder, model=wider)

    def without():
        model = Cnn()
        del model.bn2
        return model

    with pytest.raises(CorruptCheckpointError, match=r"left over \['bn2"):
        mq.load(folder, model=without)
    with pytest.raises(ConfigError, match="builds itself; leave out model="):
        mq.load(saved_once(base, "llama"), model=tiny_llama())


@pytest.mark.parametrize("name", ["llama"])
def test_swapped_shards_are_refused(name, tmp_path):
    folder = mq.quantize(tiny_llama(), **QUIET).save(tmp_path / "out", max_shard_size=30_000)
    one, two, *_ = sorted(folder.glob("*.safetensors"))
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=re.escape(one.name)):
        mq.load(folder)
    reseal(folder)
    with pytest.raises(CorruptCheckpointError, match="disagree"):
        mq.load(folder)


def foreign(folder, dtype=torch.float32, one_dimensional=False, **changes):
    """A compressed-tensors checkpoint by its own conventions: absmax / 127.5, codes down to -128, scales in the model's dtype."""
    model = seeded(FAMILIES["llama"].make).to(dtype)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = module.weight.detach().float()
            # the largest magnitude of every row is negative, so that -128 occurs
            weight = weight * -weight.gather(1, weight.abs().argmax(1, keepdim=True)).sign()
            scale = (weight.abs().amax(1, keepdim=True) / 127.5).to(dtype)
            tensors[f"{name}.weight"] = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
            tensors[f"{name}.weight_scale"] = scale[:, 0] if one_dimensional else scale
    assert min(int(t.min()) for t in tensors.values() if t.dtype == torch.int8) == -128
    arguments = {"num_bits": 8, "type": "int", "symmetric": True, "observer": "minmax", "group_size": None}
    group = {
        "targets": ["Linear"],
        "weights": {**arguments, "strategy": "channel", "dynamic": False, **changes.pop("weights", {})},
        "input_activations": {**arguments, "strategy": "token", "dynamic": True, **changes.pop("inputs", {})},
        "output_activations": None,
        **changes.pop("group", {}),
    }
    block = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "version": "0.12.0",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **changes,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    dtype_name = str(dtype).removeprefix("torch.")
    write(folder / "config.json", model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"], "dtype": dtype_name, "quantization_config": block
    })  # fmt: skip
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_foreign_int8_checkpoint_stays_int8_and_matches_transformers(tmp_path, dtype):
    folder = foreign(tmp_path / "theirs", dtype)
    inputs, tensors = FAMILIES["llama"].inputs(), load_file(folder / WEIGHTS)
    model = mq.load(folder)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int8Module)}
    assert len(layers) == 14 and all(isinstance(m, Int8Linear) for m in layers.values())
    for name, layer in layers.items():
        assert torch.equal(layer.codes(), tensors[f"{name}.weight"])
        assert torch.equal(layer.scale(), tensors[f"{name}.weight_scale"].float())
        assert layer.scale().dtype == torch.float32 and layer.weight.dtype == dtype
    with kernels.using("reference"):
        ours = run(model, inputs)
    assert ours.dtype == dtype
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    # the same weights without any rounding of activations
    exact = seeded(FAMILIES["llama"].make).to(dtype).eval()
    for name, layer in layers.items():
        exact.get_submodule(name).weight.data = layer.weight
    exact_output, their_output = run(exact, inputs), run(theirs, inputs)
    # both round activations to 8 bits, on grids that differ by 0.4 %: at worst the errors point in opposite directions
    bound = relative_error(exact_output, ours) + relative_error(exact_output, their_output)
    assert 0 < relative_error(ours, their_output) <= bound < 0.06
    assert {p.dtype for p in model.parameters()} <= {torch.int8, torch.float32, dtype}


def test_a_foreign_checkpoint_with_flat_scales_loads(tmp_path):
    folders = [foreign(tmp_path / str(flat), one_dimensional=flat) for flat in (True, False)]
    one, two = (run(mq.load(f), FAMILIES["llama"].inputs()) for f in folders)
    assert torch.equal(one, two)


def test_a_foreign_checkpoint_can_be_saved_again(tmp_path):
    folder = foreign(tmp_path / "theirs")
    with pytest.raises(MonoQuantError, match="mono_quant"):
        # it has no report, which the result needs
        mq.QuantizedModel.from_folder(folder)
    assert mq.load(folder, verify=True)


VARIANTS = {
    "four bits": ({"weights": {"num_bits": 4}}, "not symmetric int8 per channel"),
    "asymmetric": ({"weights": {"symmetric": False}}, "not symmetric int8 per channel"),
    "float8": ({"weights": {"type": "float"}}, "not symmetric int8 per channel"),
    "groups": ({"weights": {"strategy": "group", "group_size": 32}}, "not symmetric int8 per channel"),
    "per tensor": ({"weights": {"strategy": "tensor"}}, "not symmetric int8 per channel"),
    "static inputs": ({"inputs": {"dynamic": False, "strategy": "tensor"}}, "activations are not"),
    "local inputs": ({"inputs": {"dynamic": "local"}}, "activations are not"),
    "asymmetric inputs": ({"inputs": {"symmetric": False}}, "activations are not"),
    "four bit inputs": ({"inputs": {"num_bits": 4}}, "activations are not"),
    "packed": ({"format": "pack-quantized"}, "format is 'pack-quantized'"),
    "packed group": ({"group": {"format": "pack-quantized"}}, "format is 'pack-quantized'"),
    "no format": ({"format": None}, "format is None"),
    "transforms": ({"transform_config": {"config_groups": {"u": {}}}}, "it uses transforms"),
    "other method": ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    "groups are a list": ({"config_groups": [1]}, "config_groups"),
    "groups are missing": ({"config_groups": None}, "config_groups"),
    "a group is a text": ({"config_groups": {"group_0": "W8A8"}}, "group_0"),
    "a group is nothing": ({"config_groups": {"group_0": None}}, "group_0"),
    "weights are a text": ({"group": {"weights": "int8"}}, "group_0"),
    "inputs are a text": ({"group": {"input_activations": "int8"}}, "group_0"),
    "no groups": ({"config_groups": {}}, "config_groups"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_variants_of_compressed_tensors_are_refused(tmp_path, variant):
    changes, match = VARIANTS[variant]
    folder = foreign(tmp_path / "theirs", **changes)
    with pytest.raises(UnsupportedModelError, match=match):
        mq.load(folder)


def test_weights_only_int8_is_loaded_as_int8(tmp_path):
    """Without input_activations the checkpoint promises nothing about them: ours are rounded to 8 bits or more."""
    folder = foreign(tmp_path / "theirs", group={"input_activations": None, "format": "int-quantized"})
    assert sum(isinstance(m, Int8Linear) for m in mq.load(folder).modules()) == 14


BAD_FOREIGN = {
    "negative scale": (put("_scale", one(-1.0)), "not finite and positive"),
    "NaN scale": (put("_scale", one(float("nan"))), "not finite and positive"),
    "no scale": (lose("_scale"), "incomplete"),
    "short scale": (put("_scale", lambda t: t[:-1].clone()), "expected float"),
    "zero point": (lambda t: t.__setitem__(codes_of(t) + "_zero_point", torch.full((64, 1), 3, dtype=torch.int8)), "zero_point"),
    "missing norm": (lambda t: t.pop("model.norm.weight"), "missing"),
    "int8 where no layer is": (lambda t: t.update({"x.weight": torch.ones(3, 4, dtype=torch.int8), "x.weight_scale": torch.ones(3, 1)}), "x.weight"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FOREIGN)
def test_a_broken_foreign_checkpoint_is_refused(tmp_path, bad):
    change, match = BAD_FOREIGN[bad]
    folder = foreign(tmp_path / "theirs")
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match=match):
        mq.load(folder)


def test_a_config_out_of_proportion_stops_loading_at_once(base, tmp_path):
    folder = shutil.copytree(saved_once(base, "llama"), tmp_path / "saved")
    config = read(folder / "config.json") | {"num_hidden_layers": 100_000}
    write(folder / "config.json", config)
    data = (folder / "config.json").read_bytes()
    manifest = read(folder / MANIFEST)
    manifest["files"]["config.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write(folder / MANIFEST, manifest)
    with pytest.raises(LimitExceededError, match="num_hidden_layers is 100000"):
        mq.load(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(LimitExceededError, match="num_hidden_layers is 100000"):
        mq.load(folder)


def test_int8_codes_are_not_loaded_as_a_plain_checkpoint(base, tmp_path):
    folder = shutil.copytree(saved_once(base, "llama"), tmp_path / "saved")
    write(folder / MANIFEST, read(folder / MANIFEST) | {"layout": "plain", "tensors": {}})
    with pytest.raises(CorruptCheckpointError, match="holds int8 codes"):
        mq.load(folder)


def test_a_model_argument_that_makes_nothing_is_refused(base):
    with pytest.raises(ConfigError, match="model= is a int"):
        mq.load(saved_once(base, "cnn"), model=3)
