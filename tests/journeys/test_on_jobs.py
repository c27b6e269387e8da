"""What runs on Hugging Face Jobs, run here against the loopback Hub: an attempt goes on from what another machine finished."""

from functools import partial
from pathlib import Path

import huggingface_hub
import on_jobs
import pytest
from huggingface_hub.cli._uv_script_header import parse_uv_script_header
from loopback_hub import LoopbackHub
from models import tiny_llama

import mono_quant
from mono_quant import errors
from mono_quant.io.hub.client import Hub
from mono_quant.stream.hub_delivery import HubDelivery

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_" + "JobsCanaryToken" * 2 + "xyz1"
CARD = b"---\nlicense: mit\n---\n# A model\n"


@pytest.fixture
def server(tmp_path, monkeypatch):
    source = tmp_path / "source"
    tiny_llama().save_pretrained(source, max_shard_size="60KB")
    with LoopbackHub() as running:
        running.add_user("ann", TOKEN)
        running.add_repo(
            "org/model", {p.name: p.read_bytes() for p in source.iterdir()} | {"README.md": CARD}
        )
        monkeypatch.setattr(
            "mono_quant.api.verbs.Hub", partial(Hub, endpoint=running.endpoint, cache_dir=tmp_path / "cache")
        )
        verb = partial(mono_quant.quantize_checkpoint, max_shard_size="40KB")
        monkeypatch.setattr(mono_quant, "quantize_checkpoint", verb)
        yield running
        huggingface_hub.close_session()


def run_on_another_machine(tmp_path, monkeypatch, name, target):
    here = tmp_path / name
    here.mkdir()
    with monkeypatch.context() as patched:
        patched.chdir(here)
        patched.setenv("HF_TOKEN", TOKEN)
        patched.setattr("sys.argv", ["on_jobs.py", "org/model", target])
        on_jobs.main()


def weights(server, repo_id):
    files = server.repo(repo_id).files()
    return {name: data for name, data in files.items() if ".safetensors" in name}


def test_a_second_attempt_goes_on_where_the_first_was_cut_off(server, tmp_path, monkeypatch, capsys):
    run = partial(run_on_another_machine, tmp_path, monkeypatch)
    put, sent, fits = HubDelivery.put, [], 2

    def until_it_is_cut_off(delivery, record, path):
        if len(sent) == fits:
            raise errors.OutputError("the job is at its end")
        put(delivery, record, path)
        sent.append(record.file)

    monkeypatch.setattr(HubDelivery, "put", until_it_is_cut_off)
    with pytest.raises(errors.OutputError, match="at its end"):
        run("first", "ann/model")
    assert not weights(server, "ann/model")
    fits = None
    run("second", "ann/model")
    made = weights(server, "ann/model")
    assert sorted(sent) == sorted(name for name in made if name.endswith(".safetensors"))  # each once
    assert len(server.repo("ann/model").commits()) == 2  # the first one makes the repository
    out = capsys.readouterr().out
    assert "ann/model" in out and TOKEN not in out
    run("undisturbed", "ann/whole")
    assert weights(server, "ann/whole") == made


def test_the_header_of_the_script_is_what_the_client_reads():
    header = parse_uv_script_header(Path(on_jobs.__file__).read_text(encoding="utf-8"))
    assert header.secrets == ["HF_TOKEN"]
    assert (header.flavor, header.timeout) == ("cpu-upgrade", "6h")
