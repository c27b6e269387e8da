"""A folder is described from its headers, whoever wrote it, and what it claims is held against them."""

import hashlib
import json

import pytest
import torch
from models import FAMILIES, seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import EACH, MANIFEST, QUIET, WEIGHTS, read
from torch import nn

import mono_quant as mq
from mono_quant.artifact.inspection import inspect, inspect_any, verify
from mono_quant.errors import ConfigError, CorruptCheckpointError, SourceNotFoundError
from mono_quant.sources.source import Access
from mono_quant.version import __version__


class Net(nn.Module):
    """One layer that becomes int8, and a scalar."""

    def __init__(self):
        super().__init__()
        self.fc, self.gain = nn.Linear(64, 64), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.fc(x) * self.gain


def stored(folder):
    """Name -> (dtype, shape) by the official library."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {n: (file.get_slice(n).get_dtype(), tuple(file.get_slice(n).get_shape())) for n in file.keys()}  # noqa: SIM118


@EACH
def test_every_tensor_of_the_file_is_a_code_a_scale_or_kept(folder, name):
    seen, file = inspect(folder), stored(folder)
    scales = {f"{name}_scale" for name in seen.quantized}
    assert {n for n, (dtype, _) in file.items() if dtype == "I8"} == set(seen.quantized)
    assert file.keys() == seen.quantized.keys() | seen.kept.keys() | scales and not scales & seen.kept.keys()
    assert seen.weight_bytes == sum(t.nbytes for t in load_file(folder / WEIGHTS).values())
    if name in ("cnn", "gpt2"):
        rows = {row["name"]: tuple(row["shape"]) for row in read(folder / "mono_quant_report.json")["rows"]}
        assert seen.quantized == {name: rows[name] for name in seen.quantized}
    assert {n: s for n, (_, s) in seen.kept.items()} == {n: file[n][1] for n in seen.kept}


def test_the_table_and_the_data_say_the_same(tmp_path):
    folder = mq.quantize(seeded(Net), **QUIET).save(tmp_path / "net")
    seen = inspect(folder)
    assert seen.table().splitlines() == [
        "folder    net",
        "class     Net",
        "kind      module",
        "dtype     int8",
        "layout    mono_quant",
        f"made by   mono_quant {__version__}",
        "weights   4.6 kB in the files",
        "",
        "int8      1 tensors",
        "  fc.weight  64 x 64",
        "",
        "float     2 tensors",
        f"  fc.bias  64 float32  ({seen.reasons['fc.bias']})",
        f"  gain  scalar float32  ({seen.reasons['gain']})",
    ]
    assert seen.to_dict() == {
        "folder": "net",
        "class": "Net",
        "kind": "module",
        "dtype": "int8",
        "layout": "mono_quant",
        "source": None,
        "made by": f"mono_quant {__version__}",
        "quantized": {"fc.weight": {"dtype": "int8", "shape": [64, 64]}},
        "kept": {
            "fc.bias": {"dtype": "float32", "shape": [64], "reason": seen.reasons["fc.bias"]},
            "gain": {"dtype": "float32", "shape": [], "reason": seen.reasons["gain"]},
        },
        "weight_bytes": 64 * 64 + 4 * 64 + 4 * 64 + 4,
    }
    assert all(seen.reasons.values()) and json.loads(json.dumps(seen.to_dict()))


def test_a_folder_of_somebody_else_is_described_as_far_as_it_says(tmp_path):
    FAMILIES["bert"].build().save_pretrained(tmp_path)
    seen = inspect(str(tmp_path))
    assert seen.facts == {
        "folder": tmp_path.name,
        "class": "BertForSequenceClassification",
        "kind": None,
        "dtype": None,
        "layout": None,
        "source": None,
        "made by": None,
    }
    assert not seen.quantized and not seen.reasons and seen.kept.keys() == stored(tmp_path).keys()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert f"  {name}  64 x 64 float32" in seen.table().splitlines()
    (tmp_path / "config.json").unlink()
    assert inspect(tmp_path).facts["class"] == ""


def test_codes_without_scales_and_scales_without_codes_are_told_as_they_are(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3, dtype=torch.int8),
        "b_scale": torch.ones(2),
        "c": torch.zeros(4, dtype=torch.int8),
        "c_scale": torch.ones(4, 1),
        "d": torch.zeros(4),
        "d_scale": torch.ones(1),
    }
    save_file(tensors, tmp_path / WEIGHTS)
    seen = inspect(tmp_path)
    assert seen.quantized == {"c": (4,)}
    assert seen.kept == {"a": ("int8", (2, 3)), "b_scale": ("float32", (2,)), "d": ("float32", (4,))}


def test_the_layout_of_a_foreign_folder_is_its_quantization_method(tmp_path):
    folder = mq.quantize(FAMILIES["llama"].build(), **QUIET).save(tmp_path / "saved")
    (folder / MANIFEST).unlink()
    seen = inspect(folder)
    assert (seen.facts["layout"], seen.facts["kind"], seen.facts["class"]) == (
        "compressed-tensors",
        None,
        "LlamaForCausalLM",
    )
    assert seen.quantized["model.layers.0.mlp.up_proj.weight"] == (128, 64)


@pytest.mark.parametrize("odd", ["x", 5, [1], True, {}, None])
def test_a_config_with_odd_values_is_described_without_them(tmp_path, odd):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": odd, "quantization_config": odd}))
    seen = inspect(tmp_path)
    assert (seen.facts["layout"], seen.kept) == (None, {"a": ("float32", (2, 3))})
    assert seen.facts["class"] == ("1" if odd == [1] else "")


def test_places_that_cannot_be_inspected(tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"nowhere is no folder; give the folder of a model"):
        inspect(tmp_path / "nowhere")
    folder = mq.quantize(seeded(Net), **QUIET).save(tmp_path / "net")
    assert inspect_any(folder) == inspect_any(str(folder)) == inspect(folder)
    assert inspect_any(str(folder), Access(place="local")) == inspect(folder)
    for place in (folder, str(folder)):
        with pytest.raises(
            ConfigError, match=r"net is a local folder, which has no revision 'v1'; leave it out"
        ):
            inspect_any(place, Access(revision="v1"))


@EACH
def test_a_sound_folder_passes_each_check_by_name(folder, name):
    manifest, codes = read(folder / MANIFEST), len(inspect(folder).quantized)
    others = len(stored(folder)) - 2 * codes
    last = {
        "llama": "loads as LlamaForCausalLM",
        "mixtral": "loads as MixtralForCausalLM",
        "gpt2": "loads as GPT2LMHeadModel",
        "cnn": "codes and scales are sound; Cnn itself can only be built by your code",
    }
    assert verify(folder) == [
        f"{len(manifest['files'])} files have the size and sha256 of the manifest",
        f"{codes} int8 tensors, {others} others, as the report says",
        last[name],
    ]


def test_a_float16_folder_has_no_codes_and_passes(tmp_path):
    folder = mq.quantize(seeded(Net), "fp16", **QUIET).save(tmp_path / "net")
    assert verify(folder)[1] == "no int8 tensors, as the report says"
    assert verify(str(folder)) == verify(folder)


@pytest.mark.parametrize("name", ["cnn"])
def test_a_report_that_does_not_fit_the_weights_is_found(folder, name):
    path = folder / "mono_quant_report.json"
    report = read(path)
    row = next(row for row in report["rows"] if row["action"] == "quantized" and row["shape"] == [100, 64])
    row["shape"] = [100, 65]
    path.write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(match=r"mono_quant_report\.json"):
        verify(folder)
    reseal(folder, path)
    held = sum(t.numel() for t in load_file(folder / WEIGHTS).values() if t.dtype == torch.int8)
    with pytest.raises(
        CorruptCheckpointError,
        match=rf"the report lists {held + 100:,} int8 values, the weight files hold {held:,}; save the model again",
    ):
        verify(folder)


def reseal(folder, path):
    """Let the manifest vouch for a changed file."""
    manifest = read(folder / MANIFEST)
    data = path.read_bytes()
    manifest["files"][path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
