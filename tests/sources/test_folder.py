"""Folder: see the room of this name."""

import json
import os
import pickle
import re
import shutil
import socket
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from models import FAMILIES, run, snapshot, tiny_llama
from safetensors.torch import load_file, save_file
from sources import INDEX, QUIET, SINGLE, VERBS, fails

import mono_quant as mq
from mono_quant.errors import (
    AdapterAttachedError,
    AlreadyQuantizedError,
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    PickleOnlyError,
    RemoteCodeError,
    UnsafeInputError,
    UnsupportedModelError,
)

# peft asks transformers for an attribute that was renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CANARY = "evil/kernel-canary"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLAIN = ("cnn", "lstm", "encoder", "attention")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def change(folder, **fields):
    write(folder / "config.json", read(folder / "config.json") | fields)


def split(folder):
    """Turn the one weight file into two shards and an index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    parts = {FIRST: names[:5], SECOND: names[5:]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
    (folder / SINGLE).unlink()
    write(folder / INDEX, {"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}})
    return names


def remove(name):
    return lambda folder: (folder / name).unlink()


def pickles_only(folder):
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def packed(folder):
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / SINGLE, metadata={"format": "pt"})


def adapter_only(folder):
    (folder / "config.json").unlink()
    write(folder / "adapter_config.json", {"peft_type": "LORA"})


def tensors_changed(change_them):
    def spoil(folder):
        tensors = load_file(folder / SINGLE)
        change_them(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return spoil


def narrow(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 32)


FOLDERS = {
    "pickle_only": (pickles_only, PickleOnlyError, r"pytorch_model\.bin.*allow_pickle=True"),
    "no_config": (remove("config.json"), MissingFileError, "no config.json.*save_pretrained.*pass the object"),
    "no_weights": (remove(SINGLE), MissingFileError, r"weights|safetensors"),
    "missing_shard": (lambda f: (split(f), (f / SECOND).unlink()), MissingFileError, f"lacks '{SECOND}'.*fetch them again"),
    "unknown_architecture": (lambda f: change(f, architectures=["NewForCausalLM"]), UnsupportedModelError, "no model class NewForCausalLM.*Update transformers"),
    "unknown_type": (lambda f: change(f, model_type="new"), UnsupportedModelError, "model_type 'new'.*pass the object"),
    "no_architecture": (lambda f: change(f, architectures=None), UnsupportedModelError, r"names no architecture.*TheClass\.from_pretrained"),
    "architecture_is_no_model": (lambda f: change(f, architectures=["AutoConfig"]), UnsupportedModelError, "no model class AutoConfig"),
    "architecture_is_a_function": (lambda f: change(f, architectures=["pipeline"]), UnsupportedModelError, "no model class pipeline"),
    "architecture_of_another_type": (lambda f: change(f, architectures=["BertModel"]), CorruptCheckpointError, None),
    "diffusers_pipeline": (lambda f: write(f / "model_index.json", {"_class_name": "X"}), UnsupportedModelError, r"diffusers pipeline.*quantize\(pipe\.transformer\)"),
    "diffusers_component": (lambda f: change(f, _class_name="UNet2DModel"), CorruptCheckpointError, "describes no UNet2DModel"),
    "adapter": (adapter_only, AdapterAttachedError, "merge it into its base model"),
    "quantized_config": (lambda f: change(f, quantization_config={"quant_method": "gptq"}), AlreadyQuantizedError, "'gptq'.*quantize the original model"),
    "quantized_config_text": (lambda f: change(f, quantization_config="x"), AlreadyQuantizedError, "quantized already"),
    "quantized_weights": (packed, AlreadyQuantizedError, r"up_proj\.weight is torch\.int8.*pass the original model"),
    "missing_tensor": (tensors_changed(lambda t: t.pop("model.norm.weight")), CorruptCheckpointError, r"missing: model\.norm\.weight"),
    "other_shape": (tensors_changed(narrow), CorruptCheckpointError, "up_proj"),
    "config_of_another_model": (lambda f: change(f, hidden_size=32), CorruptCheckpointError, None),
    "config_with_wrong_types": (lambda f: change(f, hidden_size="wide"), CorruptCheckpointError, None),
    "config_with_negative_size": (lambda f: change(f, num_attention_heads=-4), CorruptCheckpointError, None),
    "config_with_zero_heads": (lambda f: change(f, num_attention_heads=0), CorruptCheckpointError, None),
    "config_with_null": (lambda f: change(f, rms_norm_eps=None, vocab_size=None), CorruptCheckpointError, None),
    "unknown_activation": (lambda f: change(f, hidden_act="evil"), CorruptCheckpointError, None),
    "unknown_dtype": (lambda f: change(f, dtype="int99"), CorruptCheckpointError, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_broken_folder_gives_its_own_error(folder, name):
    spoil, error, match = FOLDERS[name]
    spoil(folder)
    fails(folder, error, match)


def test_a_folder_of_ours_is_refused(folder, tmp_path):
    ours = mq.quantize(folder, **QUIET).save(tmp_path / "ours")
    with pytest.raises(AlreadyQuantizedError, match=r"written by mono_quant; use load\("):
        mq.quantize(ours)
    (ours / "mono_quant.json").unlink()
    with pytest.raises(AlreadyQuantizedError, match=r"'compressed-tensors'.*load\("):
        mq.quantize(ours)
    for field in ("quantization_config",):
        write(ours / "config.json", {k: v for k, v in read(ours / "config.json").items() if k != field})
    with pytest.raises(AlreadyQuantizedError, match=r"torch\.int8"):
        mq.quantize(ours)


def test_a_good_folder_is_converted_as_the_class_it_names(checkpoint):
    result = mq.quantize(checkpoint)
    assert type(result.model) is transformers.LlamaForCausalLM
    assert "random tokens" in result.report.fidelity["probe"]
    inputs = FAMILIES["llama"].inputs()
    assert torch.equal(run(result.model, inputs), run(mq.quantize(tiny_llama(), **QUIET).model, inputs))


def test_shards_and_one_file_give_the_same(checkpoint, folder, tmp_path):
    split(folder)
    one = mq.quantize(checkpoint, **QUIET).save(tmp_path / "one")
    two = mq.quantize(folder, **QUIET).save(tmp_path / "two")
    # card and manifest name the files they were made from
    differ = {n for n, data in snapshot(two).items() if snapshot(one)[n] != data}
    assert differ == {"README.md", "mono_quant.json"}


def test_pickles_beside_safetensors_are_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert mq.quantize(folder, **QUIET).report.quantized


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_plain_pickles_are_read_on_request(folder, checkpoint):
    pickles_only(folder)
    result = mq.quantize(folder, allow_pickle=True, **QUIET)
    assert any("pickle" in note for note in result.report.notes)
    inputs = FAMILIES["llama"].inputs()
    assert torch.equal(run(result.model, inputs), run(mq.quantize(checkpoint, **QUIET).model, inputs))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused(folder):
    (folder / SINGLE).unlink()
    canary = folder / "canary"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil(str(canary))}))
    torch.save({"w": Evil(str(canary))}, folder / "pytorch_model.bin")
    fails(folder, UnsafeInputError, "more than plain tensors|do not use it", allow_pickle=True)
    assert not canary.exists()


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
open({canary!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_code(folder):
    canary = folder.parent.parent / "ran"
    (folder / "modeling_own.py").write_text(CODE.format(canary=str(canary)))
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(folder, model_type="own-llama", architectures=["OwnForCausalLM"], auto_map=names)
    return canary


@pytest.mark.parametrize("typed", ["closed", "y"])
def test_code_is_never_run_and_nobody_is_asked(folder, monkeypatch, tmp_path, typed):
    canary = with_code(folder)
    answers = tmp_path / "answers"
    answers.write_text("y\n" * 10)
    with answers.open() as file:
        monkeypatch.setattr(sys, "stdin", None if typed == "closed" else file)
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
        for verb in (mq.quantize, mq.plan):
            with pytest.raises(RemoteCodeError, match=r"Read that code, then pass trust_remote_code=True"):
                verb(folder)
        assert typed == "closed" or file.tell() == 0
    assert not canary.exists()


def test_code_is_run_when_it_is_trusted(folder, tmp_path):
    canary = with_code(folder)
    result = mq.quantize(folder, trust_remote_code=True, **QUIET)
    assert canary.exists() and type(result.model).__name__ == "OwnForCausalLM"
    assert len(result.report.quantized) == 14


def test_code_for_a_known_class_is_ignored_and_dropped(folder, tmp_path, monkeypatch):
    names = {"AutoConfig": f"{CANARY}--m.C", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(folder, auto_map=names)
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    out = mq.quantize(folder, **QUIET).save(tmp_path / "out")
    assert not list(out.rglob("*.py"))
    for name, data in snapshot(out).items():
        assert b"auto_map" not in data and CANARY.encode() not in data, name


DENIED = [
    "_name_or_path",
    "name_or_path",
    "auto_map",
    "trust_remote_code",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "transformers_weights",
    "custom_pipelines",
    "custom_generate",
    "_commit_hash",
]


@pytest.mark.parametrize("key", DENIED)
def test_fields_that_choose_code_never_reach_the_output(folder, tmp_path, key):
    change(folder, **{key: CANARY, "task_specific_params": {key: CANARY, "deeper": [{key: CANARY}]}})
    generation = read(folder / "generation_config.json")
    write(folder / "generation_config.json", generation | {key: CANARY})
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        write(folder / name, {"tokenizer_class": "X", key: CANARY, "nested": {key: CANARY}})
    result = mq.quantize(folder, **QUIET)
    assert CANARY not in str(result.model.config.to_dict()) and CANARY not in str(vars(result.model.config))
    for name, data in snapshot(result.save(tmp_path / "out")).items():
        assert CANARY.encode() not in data, name


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file"])
def test_paths_of_tokenizers_never_reach_the_output(folder, tmp_path, key):
    write(folder / "tokenizer_config.json", {key: f"/home/ann/{CANARY}", "model_max_length": 5})
    out = mq.quantize(folder, **QUIET).save(tmp_path / "out")
    assert read(out / "tokenizer_config.json") == {"model_max_length": 5}


JSON = {
    "deep": '{"a":' * 900 + "1" + "}" * 900,
    "digits": '{"a": ' + "9" * 10_000 + "}",
    "nan": '{"a": NaN}',
    "infinity": '{"a": 1e999}',
    "twice": '{"a": 1, "a": 2}',
    "bom": '\ufeff{"a": 1}',
    "array": "[1, 2]",
    "text": '"config"',
    "cut": '{"a": ',
    "empty": "",
    "large": '{"a": "' + "x" * (9 << 20) + '"}',
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX])
@pytest.mark.parametrize("name", JSON)
def test_broken_json_is_typed_wherever_it_is(folder, name, file):
    if file == INDEX:
        if name == "large":
            pytest.skip("an index may be large")
        split(folder)
    write(folder / file, JSON[name])
    fails(folder, (CorruptCheckpointError, LimitExceededError), re.escape(file))


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 2**40},
        {"intermediate_size": 2**40},
        {"vocab_size": 2**40},
        {"vocab_size": 2**62, "hidden_size": 2**62},
        {"num_hidden_layers": 10**6},
        {"num_attention_heads": 2**40},
        {"num_key_value_heads": 2**40},
        {"head_dim": 2**40},
        {"text_config": {"num_hidden_layers": 10**6}},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": -1},
    ],
    ids=str,
)
@VERBS
def test_a_config_out_of_proportion_is_refused_at_once(folder, fields, verb):
    change(folder, **fields)
    start = time.monotonic()
    with pytest.raises((LimitExceededError, CorruptCheckpointError)):
        verb(folder)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("key", ["max_position_embeddings", "type_vocab_size"])
def test_tables_out_of_proportion_are_refused_at_once(tmp_path, key):
    folder = tmp_path / "in" / "bert"
    FAMILIES["bert"].build().save_pretrained(folder)
    change(folder, **{key: 2**40})
    fails(folder, (LimitExceededError, CorruptCheckpointError))


def test_a_million_labels_are_refused_before_transformers_names_each(folder, monkeypatch):
    """Its config class makes a dict entry for each: ten million take minutes."""
    change(folder, num_labels=10**7)
    monkeypatch.setattr("mono_quant.hf.models.model_class", lambda *_: pytest.fail("the config was built"))
    fails(folder, LimitExceededError, "num_labels")


@VERBS
@pytest.mark.parametrize("layers", [1, 0])
def test_weights_that_no_layer_takes_are_not_dropped_in_silence(folder, layers, verb):
    """The checkpoint has two layers: a config that asks for fewer loses weights."""
    change(folder, num_hidden_layers=layers)
    try:
        report = verb(folder, **QUIET)
    except CorruptCheckpointError as error:
        assert "model.layers.1." in str(error)
    else:
        notes = getattr(report, "report", report).notes
        assert any("model.layers.1." in note for note in notes), notes


@VERBS
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_tensors_that_are_no_floats_are_not_cast_in_silence(folder, name, dtype, verb):
    tensors_changed(lambda t: t.__setitem__(name, t[name].to(dtype)))(folder)
    with pytest.raises(UnsupportedModelError, match=rf"{name} is {dtype}; save the checkpoint in float32"):
        verb(folder, **QUIET)


@VERBS
def test_integers_that_belong_to_integer_buffers_pass(tmp_path, verb):
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    transformers.ResNetModel(transformers.ResNetConfig(**sizes)).save_pretrained(tmp_path / "resnet")
    found = verb(tmp_path / "resnet", **QUIET)
    rows = {row.name: row for row in getattr(found, "report", found).rows}
    counts = [row for name, row in rows.items() if name.endswith("num_batches_tracked")]
    assert counts and {(row.action, row.dtype_after) for row in counts} == {("kept", "int64")}
    FAMILIES["bert"].build().save_pretrained(tmp_path / "bert")
    tensors_changed(lambda t: t.__setitem__("bert.embeddings.position_ids", torch.arange(512)[None]))(
        tmp_path / "bert"
    )
    found = verb(tmp_path / "bert", **QUIET)
    assert getattr(found, "report", found).quantized


def rename(tensors):
    tensors["model.norm.wait"] = tensors.pop("model.norm.weight")


@VERBS
@pytest.mark.parametrize(
    ("spoil", "missing"),
    [
        (
            tensors_changed(lambda t: t.pop("model.norm.weight")),
            "1 weights of LlamaForCausalLM are missing: model.norm",
        ),
        (tensors_changed(rename), "missing: model.norm.weight"),
        (lambda folder: change(folder, num_hidden_layers=4), r"missing: model\.layers\.2\."),
    ],
    ids=["dropped", "renamed", "too_deep"],
)
def test_a_checkpoint_that_does_not_fill_its_model_is_refused_by_the_plan_too(folder, spoil, missing, verb):
    spoil(folder)
    with pytest.raises(CorruptCheckpointError, match=missing):
        verb(folder, **QUIET)


@VERBS
@pytest.mark.parametrize("name", ["w1", "w2"])
def test_experts_that_are_not_all_there_are_missing(tmp_path, name, verb):
    FAMILIES["mixtral"].build().save_pretrained(tmp_path)
    lost = next(n for n in load_file(tmp_path / SINGLE) if n.endswith(f".3.{name}.weight"))
    tensors_changed(lambda t: t.pop(lost))(tmp_path)
    with pytest.raises(CorruptCheckpointError):
        verb(tmp_path, **QUIET)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(PLAIN)))
def test_every_family_fills_its_plan(family, tmp_path):
    FAMILIES[family].build().save_pretrained(tmp_path)
    assert mq.plan(tmp_path).planned


@VERBS
def test_biases_that_no_layer_takes_are_named(folder, verb):
    tensors_changed(lambda t: t.__setitem__("model.layers.0.mlp.up_proj.bias", torch.ones(128)))(folder)
    try:
        report = verb(folder, **QUIET)
    except CorruptCheckpointError as error:
        assert "up_proj.bias" in str(error)
    else:
        assert any("up_proj.bias" in note for note in getattr(report, "report", report).notes)


def index_names(name):
    def spoil(folder):
        split(folder)
        index = read(folder / INDEX)
        index["weight_map"] = {k: name if v == SECOND else v for k, v in index["weight_map"].items()}
        shutil.copy(folder / SECOND, folder.parent / "outside.safetensors")
        write(folder / INDEX, index)

    return spoil


def index_says(**fields):
    return lambda f: (split(f), write(f / INDEX, {"metadata": {}, **fields}))


def linked(folder):
    target = folder.parent / "outside.safetensors"
    (folder / SINGLE).rename(target)
    (folder / SINGLE).symlink_to(target)


def link(target):
    return lambda f: ((f / SINGLE).unlink(), (f / SINGLE).symlink_to(target))


def fifo(folder):
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


def bound_socket(folder):
    (folder / SINGLE).unlink()
    here = Path.cwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(SINGLE)
    finally:
        os.chdir(here)


def in_the_index_only(folder):
    split(folder)
    index = read(folder / INDEX)
    index["weight_map"]["model.extra.weight"] = FIRST
    write(folder / INDEX, index)


def in_the_shard_only(folder):
    names = split(folder)
    index = read(folder / INDEX)
    del index["weight_map"][names[0]]
    write(folder / INDEX, index)


def in_two_shards(folder):
    names = split(folder)
    tensors = load_file(folder / SECOND)
    name = names[0]
    tensors[name] = torch.zeros_like(load_file(folder / FIRST)[name])
    save_file(tensors, folder / SECOND, metadata={"format": "pt"})


def both(folder):
    single = (folder / SINGLE).read_bytes()
    split(folder)
    (folder / SINGLE).write_bytes(single)


def header(value, data=b"", length=None):
    def spoil(folder):
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / SINGLE).write_bytes(
            struct.pack("<Q", len(text) if length is None else length) + text + data
        )

    return spoil


def raw(data):
    return lambda f: (f / SINGLE).write_bytes(data)


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


def named(name):
    return tensors_changed(lambda t: t.__setitem__(name, torch.zeros(2)))


def resized(by):
    def spoil(folder):
        data = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(data[:by] if by < 0 else data + b"\0" * by)

    return spoil


def sparse(folder):
    size = 1 << 40
    header(entry("I8", (size,), (0, size)))(folder)
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size + size)


HOSTILE = {
    "P1_parent": (index_names("../outside.safetensors"), UnsafeInputError),
    "P1_parent_inside": (index_names("a/../../outside.safetensors"), UnsafeInputError),
    "P1_backslash": (index_names("..\\outside.safetensors"), UnsafeInputError),
    "P1_percent": (index_names("%2e%2e/outside.safetensors"), UnsafeInputError),
    "P1_nul": (index_names("a\0.safetensors"), UnsafeInputError),
    "P1_long": (index_names("a" * 5000 + ".safetensors"), UnsafeInputError),
    "P1_empty": (index_names(""), UnsafeInputError),
    "P1_dot": (index_names("."), UnsafeInputError),
    "P2_absolute": (index_names("/etc/passwd"), UnsafeInputError),
    "P3_link_outside": (linked, UnsafeInputError),
    "P3_link_nowhere": (link("/nowhere/at/all"), UnsafeInputError),
    "P3_link_to_itself": (link(SINGLE), (UnsafeInputError, CorruptCheckpointError)),
    "P3_link_to_a_folder": (link("/tmp"), UnsafeInputError),
    "P3_device": (link("/dev/zero"), UnsafeInputError),
    "P3_fifo": (fifo, UnsafeInputError),
    "P3_socket": (bound_socket, (UnsafeInputError, CorruptCheckpointError)),
    "P3_folder": (lambda f: ((f / SINGLE).unlink(), (f / SINGLE).mkdir()), UnsafeInputError),
    "P6_in_the_index_only": (in_the_index_only, CorruptCheckpointError),
    "P6_in_the_shard_only": (in_the_shard_only, CorruptCheckpointError),
    "P7_in_two_shards": (in_two_shards, CorruptCheckpointError),
    "P8_list": (index_says(weight_map=["a"]), CorruptCheckpointError),
    "P8_number": (index_says(weight_map={"a": 3}), CorruptCheckpointError),
    "P8_none": (index_says(), CorruptCheckpointError),
    "P8_empty": (index_says(weight_map={}), CorruptCheckpointError),
    "P8_metadata": (index_says(metadata=3, weight_map={"a": FIRST}), CorruptCheckpointError),
    "P9_case": (named("MODEL.norm.weight"), CorruptCheckpointError),
    "P10_both": (both, CorruptCheckpointError),
    "P12_newline": (named("a\nb"), (CorruptCheckpointError, UnsafeInputError)),
    "P12_bidi": (named("a\u202eb"), (CorruptCheckpointError, UnsafeInputError)),
    "P12_nul": (named("a\0b"), (CorruptCheckpointError, UnsafeInputError)),
    "P12_long": (named("a" * 2000), (CorruptCheckpointError, UnsafeInputError, LimitExceededError)),
    "S1_empty": (raw(b""), CorruptCheckpointError),
    "S1_seven": (raw(b"1234567"), CorruptCheckpointError),
    "S1_zero": (raw(bytes(8)), CorruptCheckpointError),
    "S1_huge": (header({}, length=2**63), (CorruptCheckpointError, LimitExceededError)),
    "S1_beyond": (header({}, length=5000), CorruptCheckpointError),
    "S1_no_json": (header(b"{nonsense"), CorruptCheckpointError),
    "S1_array": (header([]), CorruptCheckpointError),
    "S2_truncated": (resized(-1), CorruptCheckpointError),
    "S2_trailing": (resized(1), CorruptCheckpointError),
    "S2_hole": (header(entry(offsets=(4, 8)), bytes(8)), CorruptCheckpointError),
    "S2_dtype": (header(entry("F31"), bytes(4)), (CorruptCheckpointError, UnsupportedModelError)),
    "S2_shape": (header(entry(shape=(2,)), bytes(4)), CorruptCheckpointError),
    "S2_negative": (header(entry(shape=(-1,)), bytes(4)), CorruptCheckpointError),
    "S2_overflow": (header(entry(shape=(2**32, 2**32)), bytes(4)), (CorruptCheckpointError, LimitExceededError)),
    "S2_claim": (header(entry("I8", (2**40,), (0, 2**40))), CorruptCheckpointError),
    "S3_zero_times_huge": (header(entry(shape=(0, 2**62), offsets=(0, 0))), (CorruptCheckpointError, LimitExceededError)),
    "S3_dimensions": (header(entry("I8", (1,) * 5000, (0, 1)), bytes(1)), (CorruptCheckpointError, LimitExceededError)),
    "S3_unknown_field": (header(entry(extra=1), bytes(4)), CorruptCheckpointError),
    "S3_twice": (header(b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"\0"), CorruptCheckpointError),
    "S5_sparse": (sparse, (LimitExceededError, CorruptCheckpointError, AlreadyQuantizedError)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_typed_and_leaves_nothing(folder, name):
    spoil, error = HOSTILE[name]
    spoil(folder)
    text = fails(folder, error)
    assert len(text) < 3000
    with pytest.raises(error):
        mq.plan(folder)


def test_the_error_does_not_tell_whether_a_file_exists(folder, tmp_path):
    index_names(str(tmp_path / "secret"))(folder)
    texts = []
    for _ in range(2):
        texts.append(fails(folder, UnsafeInputError))
        (tmp_path / "secret").write_text("x")
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "LICENSE", "generation_config.json", "README.md"]
)
def test_side_files_that_lead_outside_are_not_followed(folder, tmp_path, file):
    secret = tmp_path / "secret"
    secret.write_text(json.dumps(read(folder / "config.json") | {"license": CANARY}))
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(secret)
    if file == "README.md":
        # the card of the source is only looked at, and may be left alone
        for data in snapshot(mq.quantize(folder, **QUIET).save(tmp_path / "out")).values():
            assert CANARY.encode() not in data
    else:
        fails(folder, UnsafeInputError)


def test_a_download_in_the_hub_cache_is_fine(checkpoint, tmp_path):
    store = tmp_path / "models--a--b"
    where = store / "snapshots" / ("0" * 40)
    (store / "blobs").mkdir(parents=True)
    where.mkdir(parents=True)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        blob = store / "blobs" / f"{number:064x}"
        shutil.copy(path, blob)
        (where / path.name).symlink_to(os.path.relpath(blob, where))
    assert mq.quantize(where, **QUIET).report.quantized


PLANTED = [
    "optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", ".env", ".git/config", ".netrc", "id_rsa", "tf_model.h5", "flax_model.msgpack",
    "model.onnx", "onnx/model.onnx", "model.gguf", "run.py", "setup.sh", "notes.txt", "events.out.tfevents.1", "wandb/run.log", "data.csv", "a.ipynb", "x.pkl",
]  # fmt: skip
BELONG = [
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "chat_template.jinja",
    "tokenizer.json",
    "special_tokens_map.json",
    "vocab.txt",
]


def test_only_what_belongs_to_the_model_travels(folder, tmp_path):
    for name in PLANTED + BELONG:
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, {"planted": CANARY} if name in PLANTED else {"kept": 1})
    out = mq.quantize(folder, **QUIET).save(tmp_path / "out")
    ours = [
        "README.md",
        "config.json",
        "generation_config.json",
        SINGLE,
        "mono_quant.json",
        "mono_quant_report.json",
    ]
    assert sorted(snapshot(out)) == sorted(ours + BELONG)
    assert not [n for n, data in snapshot(out).items() if CANARY.encode() in data]
    for name in BELONG:
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_the_folder_of_the_source_is_not_told(folder, tmp_path):
    out = mq.quantize(folder, **QUIET).save(tmp_path / "result")
    for name, data in snapshot(out).items():
        assert str(tmp_path).encode() not in data and socket.gethostname().encode() not in data, name


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": -1},
        {"early_stopping": "x"},
        {"watermarking_config": 5},
        {"cache_implementation": "nope"},
        {"dtype": 3},
        {"suppress_tokens": 4},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_bad_generation_config_is_typed(folder, fields):
    write(folder / "generation_config.json", fields)
    fails(
        folder,
        CorruptCheckpointError,
        r"generation_config\.json: transformers cannot use it \(.*correct the file",
    )
