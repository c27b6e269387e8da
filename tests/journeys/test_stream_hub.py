"""From a repository to a repository without the model in memory, with the real client: what a push in memory leaves, and nothing else."""

import json
import re
from functools import partial
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers
from loopback_hub import LoopbackHub
from models import FAMILIES, tiny_llama

import mono_quant
from mono_quant import errors
from mono_quant.io.hub.client import Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ANN = "hf_" + "AnnsCanaryToken" * 2 + "xyz1"
CARD = b"---\nlicense: mit\nlanguage: en\npipeline_tag: text-generation\n---\n# A model\n"
SMALL = {"max_shard_size": "40KB", "token": ANN}


def sharded(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    return {p.name: p.read_bytes() for p in tmp_path.iterdir()} | {"README.md": CARD, "evil.py": b"raise"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    with LoopbackHub() as running:
        running.add_user("ann", ANN)
        running.add_repo("org/model", sharded(tiny_llama(), tmp_path / "source"))
        settings = partial(Hub, endpoint=running.endpoint, cache_dir=tmp_path / "cache")
        for room in ("verbs", "result"):
            monkeypatch.setattr(f"mono_quant.api.{room}.Hub", settings)
        for module in ("huggingface_hub.utils._http", "mono_quant.io.hub.client", "mono_quant.io.hub.push"):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=lambda _: None))
        monkeypatch.chdir(tmp_path)
        yield running
        huggingface_hub.close_session()


def pushed_in_memory(server, dtype="int8", **options):
    """Return the files that the road through memory publishes."""
    result = mono_quant.quantize_from_hub("org/model", dtype, token=ANN, fidelity=False, **options)
    folder = result.save("in-memory", max_shard_size=SMALL["max_shard_size"])
    mono_quant.push_to_hub(folder, "ann/there", token=ANN)
    return server.repo("ann/there").files()


def named(files, name, other):
    """Return files with a repository called otherwise, without what has hashes of them."""
    return {
        path: re.sub(rb"ends: sha256 \w+", b"", data.replace(name.encode(), other.encode()))
        if path == "README.md"
        else data
        for path, data in files.items()
        if path not in ("mono_quant.json", ".gitattributes")
    }


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_what_is_published_is_what_a_push_from_memory_publishes(server, dtype, tmp_path):
    done = mono_quant.quantize_checkpoint("org/model", dtype, push_to="ann/streamed", fidelity=False, **SMALL)
    streamed, expected = server.repo("ann/streamed").files(), pushed_in_memory(server, dtype)
    manifests = [json.loads(files["mono_quant.json"]) for files in (streamed, expected)]
    assert named(streamed, "streamed", "there") == named(expected, "there", "there")
    for manifest in manifests:
        del manifest["files"]["README.md"]  # names the repository
    assert manifests[0] == manifests[1]
    assert done.folder is None
    assert done.pushed.repo_id == "ann/streamed"
    assert len([name for name in streamed if name.endswith(".safetensors")]) > 2
    assert len(server.repo("ann/streamed").commits()) == 2  # the first one makes the repository
    assert not [path for path in tmp_path.iterdir() if "mq" in path.name or path.name.startswith("streamed")]


def test_folder_and_repository_hold_the_same(server):
    done = mono_quant.quantize_checkpoint(
        "org/model", output="out", push_to="ann/both", fidelity=False, **SMALL
    )
    there = server.repo("ann/both").files()
    assert all(
        there[name] == (done.folder / name).read_bytes() for name in there if name.endswith(".safetensors")
    )
    assert mono_quant.verify("ann/both", token=ANN)
    assert mono_quant.verify(str(done.folder))


def test_another_machine_goes_on_from_the_branch(server, tmp_path, monkeypatch):
    server.inject("lfs_put", "drop", times=1000)
    server.repo("org/model")
    with pytest.raises(errors.HubError):
        mono_quant.quantize_checkpoint("org/model", push_to="ann/resumed", fidelity=False, **SMALL)
    server.faults.clear()
    elsewhere = tmp_path / "another"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    done = mono_quant.quantize_checkpoint("org/model", push_to="ann/resumed", fidelity=False, **SMALL)
    assert mono_quant.verify("ann/resumed", token=ANN)
    assert done.report.quantized


def test_other_settings_do_not_go_on_with_it(server, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mono_quant.api.streaming.publish_gathered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mono_quant.quantize_checkpoint("org/model", push_to="ann/once", fidelity=False, **SMALL)
    with pytest.raises(errors.ResumeError, match=r"settings\.dtype was 'int8' and is 'fp16'"):
        mono_quant.quantize_checkpoint(
            "org/model", "fp16", push_to="ann/once", output="once-int8", fidelity=False, **SMALL
        )
    mono_quant.quantize_checkpoint("org/model", push_to="ann/once", fidelity=False, **SMALL)
    assert mono_quant.verify("ann/once", token=ANN)


def test_nothing_to_write_to_is_said_at_once(server):
    with pytest.raises(errors.ConfigError, match="output"):
        mono_quant.quantize_checkpoint("org/model", token=ANN)
    assert not server.calls("resolve")


def test_a_pickle_is_refused_with_the_remedy(server):
    server.add_repo("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(errors.PickleOnlyError, match="allow_pickle"):
        mono_quant.quantize_checkpoint("org/pickle", output="out", **SMALL)


def test_vanilla_transformers_loads_what_was_streamed(server, tmp_path):
    mono_quant.quantize_checkpoint("org/model", output="out", fidelity=False, **SMALL)
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    inputs = FAMILIES["llama"].inputs()
    assert model(**inputs).logits.isfinite().all()
