"""int8 stays int8 in plain calls of transformers: folders in our own layout always, compressed-tensors where it is asked for."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf
from loopback_hub import LoopbackHub
from models import FAMILIES, OWN, run, snapshot
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import mono_quant as mq
from mono_quant.errors import CorruptCheckpointError, MissingFileError, UnsupportedModelError

AUTO = {
    "bert": hf.AutoModelForSequenceClassification,
    "gpt2": hf.AutoModelForCausalLM,
    "llama": hf.AutoModelForCausalLM,
    "llama_bf16": hf.AutoModelForCausalLM,
    "mixtral": hf.AutoModelForCausalLM,
    "qwen3_moe": hf.AutoModelForCausalLM,
    "t5": hf.AutoModelForSeq2SeqLM,
    "whisper": hf.AutoModelForSpeechSeq2Seq,
}
STANDARD = [name for name in AUTO if FAMILIES[name].layout != OWN]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def folder(name, **options):
        key = (name, *options)
        if key not in made:
            place = tmp_path_factory.mktemp("saved") / name
            made[key] = mq.quantize(FAMILIES[name].build(), fidelity=False, **options).save(place)
        return made[key]

    return folder


def held(model):
    """Bytes of the parameters, and how many of them are int8."""
    sizes = [(p.numel(), p.element_size(), p.dtype) for p in model.parameters()]
    return sum(n * size for n, size, _ in sizes), sum(n for n, _, dtype in sizes if dtype == torch.int8)


def check_same(model, folder, name):
    expected = mq.load(folder)
    assert held(model) == held(expected)
    assert held(model)[1] > 0
    inputs = FAMILIES[name].inputs()
    torch.testing.assert_close(run(model, inputs), run(expected, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", STANDARD)
def test_a_standard_folder_runs_in_int8_where_that_is_asked_for(name, saved, tmp_path):
    with mq.enable():
        model = AUTO[name].from_pretrained(saved(name))
    check_same(model, saved(name), name)
    model.save_pretrained(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(saved(name))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}),
        ("whisper", {"disable_defaults": ["portable"]}),
        ("qwen3_moe", {"skip": ["*experts*"]}),
    ],
    ids=["gpt2", "whisper with convolutions", "qwen3_moe with float experts"],
)
def test_a_folder_in_our_own_layout_loads_wherever_mono_quant_is_imported(name, options, saved, tmp_path):
    folder = saved(name, **options)
    model = AUTO[name].from_pretrained(folder)
    check_same(model, folder, name)
    model.save_pretrained(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(folder)


def test_generate_is_the_same(saved):
    inputs = FAMILIES["t5"].inputs()
    with mq.enable():
        model = AUTO["t5"].from_pretrained(saved("t5"))
    ours = mq.load(saved("t5"))
    asked = {"max_new_tokens": 5, "do_sample": False, "decoder_start_token_id": 0}
    tokens = [m.generate(inputs["input_ids"], **asked) for m in (model, ours)]
    assert torch.equal(*tokens)


def test_a_pipeline_and_a_context_that_ends(saved):
    before = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    with mq.enable() as outer:
        with mq.enable():
            pass
        model = hf.AutoModel.from_pretrained(saved("llama"))
        assert held(model)[1] > 0
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is before
    outer.disable()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is before


def test_what_is_no_w8a8_checkpoint_goes_the_way_it_went(saved):
    block = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            }
        },
    }
    with mq.enable():
        found = hf.quantizers.auto.AutoQuantizationConfig.from_dict(block)
    assert type(found) is hf.CompressedTensorsConfig


def broken(folder, tmp_path, change):
    copy = tmp_path / "broken"
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.update({SCALE: t[SCALE] * float("nan")}), CorruptCheckpointError),
        (lambda t: t.update({SCALE: -t[SCALE]}), CorruptCheckpointError),
        (lambda t: t.update({WEIGHT: t[WEIGHT].float()}), UnsupportedModelError),
    ],
    ids=["NaN scale", "negative scale", "float beside a scale"],
)
def test_a_damaged_folder_is_one_clear_error_on_this_road_too(change, error, saved, tmp_path):
    folder = broken(saved("llama"), tmp_path, change)
    with mq.enable(), pytest.raises(error):
        hf.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_scales_may_come_without_their_last_dimension(name, saved, tmp_path):
    def flatten(tensors):
        tensors.update({n: t.squeeze(-1) for n, t in tensors.items() if n.endswith("_scale")})

    folder = broken(saved(name), tmp_path, flatten)
    (folder / "mono_quant.json").unlink()
    inputs = FAMILIES[name].inputs()
    expected = run(mq.load(saved(name)), inputs)
    with mq.enable():
        model = hf.AutoModelForCausalLM.from_pretrained(folder)
    for found in (model, mq.load(folder)):
        assert {p.dim() for n, p in found.named_parameters() if n.endswith("weight_scale")} <= {2, 3}
        torch.testing.assert_close(run(found, inputs), expected, rtol=0, atol=1e-6)


SCALE = "model.layers.0.mlp.up_proj.weight_scale"
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def test_a_folder_of_ours_without_its_manifest_says_so(saved, tmp_path):
    folder = broken(saved("gpt2"), tmp_path, lambda tensors: None)
    (folder / "mono_quant.json").unlink()
    with pytest.raises(MissingFileError, match=r"mono_quant\.json"):
        hf.AutoModelForCausalLM.from_pretrained(folder)


def test_without_mono_quant_our_own_layout_is_refused_by_name(saved):
    code = f"import transformers as hf; hf.AutoModelForCausalLM.from_pretrained({str(saved('gpt2'))!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mono_quant" in done.stderr
    assert "mismatch" in done.stderr


def test_importing_mono_quant_first_or_last_makes_no_difference(saved):
    for order in ("import mono_quant, transformers as hf", "import transformers as hf, mono_quant"):
        code = f"{order}; m = hf.AutoModelForCausalLM.from_pretrained({str(saved('gpt2'))!r}); print(type(m.transformer.h[0].mlp.c_fc).__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "Int8TransposedLinear"


HUB = """
import sys, contextlib
import torch, transformers as hf, mono_quant as mq
ids = torch.arange(8)[None]
for name in ("gpt2", "llama"):
    with contextlib.nullcontext() if name == "gpt2" else mq.enable():
        model = hf.AutoModelForCausalLM.from_pretrained(f"me/{name}")
    assert torch.equal(model(ids).logits, mq.load(f"me/{name}")(ids).logits)
    model.push_to_hub(f"me/{name}-again")
    assert torch.equal(mq.load(f"me/{name}-again")(ids).logits, model(ids).logits)
model = hf.AutoModelForCausalLM.from_pretrained("org/float", quantization_config=mq.MonoQuantConfig())
model.save_pretrained(sys.argv[1])
"""


def test_an_id_on_the_hub_does_what_a_folder_does(saved, tmp_path):
    model = FAMILIES["llama"].build()
    model.save_pretrained(tmp_path / "float")
    with LoopbackHub() as server:
        server.add_user("me", "hf_" + "x" * 30)
        for name, folder in (
            ("me/gpt2", saved("gpt2")),
            ("me/llama", saved("llama")),
            ("org/float", tmp_path / "float"),
        ):
            server.add_repo(name, snapshot(folder))
        own = {
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": "hf_" + "x" * 30,
            "HF_HOME": str(tmp_path / "cache"),
        }
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", HUB, str(tmp_path / "out")],
            capture_output=True, text=True, check=False, env=os.environ | own,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        commit = server.repo("org/float").head
    source = json.loads((tmp_path / "out" / "mono_quant.json").read_text())["source"]
    assert (source["repo_id"], source["sha"]) == ("org/float", commit)
