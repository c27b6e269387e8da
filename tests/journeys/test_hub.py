"""The whole road with the real client and the real command line: id -> quantize -> save -> push -> load."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusion
import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from models import FAMILIES, run, tiny_llama
from safetensors.torch import load as load_bytes

import mono_quant
from mono_quant import errors
from mono_quant.apps import commands
from mono_quant.convert.int8_layers import tensors_of
from mono_quant.io.hub.client import Hub
from mono_quant.sources.source import Access

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ANN = "hf_" + "AnnsCanaryToken" * 2 + "xyz1"
BOB = "hf_" + "BobsCanaryToken" * 2 + "xyz2"
CARD = b"---\nlicense: mit\nlanguage: en\npipeline_tag: text-generation\n---\n# A model\n"


def files_of(model: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return {p.name: p.read_bytes() for p in Path(scratch).iterdir()} | {"README.md": CARD}


@pytest.fixture(scope="module")
def source() -> dict[str, bytes]:
    extra = {
        "pytorch_model.bin": b"a pickle nobody wants",
        "modeling.py": b"raise SystemExit",
        ".env": b"SECRET=1",
    }
    return files_of(tiny_llama()) | extra


@pytest.fixture
def server(
    source: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.add_user("ann", ANN)
        running.add_user("bob", BOB)
        running.add_repo("org/model", source)
        # the settings a user has in the environment
        settings = partial(Hub, endpoint=running.endpoint, cache_dir=tmp_path / "cache")
        for room in ("verbs", "result"):
            monkeypatch.setattr(f"mono_quant.api.{room}.Hub", settings)
        for module in ("huggingface_hub.utils._http", "mono_quant.io.hub.client", "mono_quant.io.hub.push"):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=lambda _: None))
        yield running
        huggingface_hub.close_session()


def cli(
    server: LoopbackHub, tmp_path: Path, *args: str, token: str | None = ANN, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-m", "mono_quant", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert ANN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_model_of_diffusers_goes_to_the_hub_and_back_and_a_pipeline_is_told_apart(
    server: LoopbackHub,
) -> None:
    model = diffusion.build("dit")
    server.add_repo("org/dit", files_of(model))
    planned = mono_quant.plan("org/dit", token=ANN)
    result = mono_quant.quantize_from_hub("org/dit", token=ANN, push_to="ann/dit-int8")
    assert [(r.name, r.action) for r in planned.rows] == [(r.name, r.action) for r in result.report.rows]
    loaded = mono_quant.load("ann/dit-int8", token=ANN)
    expected = tensors_of(mono_quant.dynamic_quantize(model)[0])
    assert all(torch.equal(t, expected[n]) for n, t in tensors_of(loaded).items())
    assert "diffusion_pytorch_model.safetensors" in server.repo("ann/dit-int8").files()
    assert mono_quant.inspect("ann/dit-int8", token=ANN).facts["class"] == "DiTTransformer2DModel"
    parts = {f"{part}/{name}": data for part in ("unet", "vae") for name, data in files_of(model).items()}
    server.add_repo("org/pipe", parts | {"model_index.json": b"{}"})
    for verb in (mono_quant.plan, mono_quant.quantize_from_hub):
        with pytest.raises(
            errors.UnsupportedModelError, match=r"org/pipe at .*\(unet, vae\).*quantize\(pipe\.unet\)"
        ):
            verb("org/pipe", token=ANN)


def test_id_to_int8_to_hub_and_back_bit_for_bit(server: LoopbackHub, tmp_path: Path) -> None:
    result = mono_quant.quantize_from_hub(
        "org/model", token=ANN, output=tmp_path / "out", push_to="ann/model-int8"
    )
    inputs = FAMILIES["llama"].inputs()
    expected = run(result.model, inputs)
    assert torch.equal(run(mono_quant.load(tmp_path / "out"), inputs), expected)
    assert torch.equal(run(mono_quant.load("ann/model-int8", token=ANN), inputs), expected)

    repo = server.repo("ann/model-int8")
    assert len(repo.commits()) == 2  # the empty one that makes the repository, and ours
    files = repo.files()
    assert files.keys() - {".gitattributes"} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "mono_quant.json",
        "mono_quant_report.json",
    }  # fmt: skip
    weights = load_bytes(files["model.safetensors"])
    assert sum(t.dtype == torch.int8 for t in weights.values()) == 14
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert data["base_model"] == "org/model"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "mit"
    assert server.repo("org/model").head in files["README.md"].decode()
    assert 'mono_quant.load("ann/model-int8")' in files["README.md"].decode()


def test_only_what_is_needed_is_downloaded(server: LoopbackHub) -> None:
    mono_quant.quantize_from_hub("org/model", token=ANN)
    fetched = {r.path.rpartition("/")[2] for r in server.calls("resolve") if r.method == "GET"}
    assert "model.safetensors" in fetched
    assert fetched.isdisjoint({"pytorch_model.bin", "modeling.py", ".env"})


def test_a_plan_reads_headers_and_config_only(server: LoopbackHub, tmp_path: Path) -> None:
    planned = mono_quant.plan("org/model", token=ANN)
    for request in server.calls("resolve"):
        if request.method == "GET" and request.path.endswith(".safetensors"):
            assert request.headers["range"] == "bytes=0-99999"
    converted = mono_quant.quantize_from_hub("org/model", token=ANN).report
    assert planned.planned
    assert [(r.name, r.action, r.reason, r.bytes_after) for r in planned.rows] == [
        (r.name, r.action, r.reason, r.bytes_after) for r in converted.rows
    ]


def test_everything_is_read_from_one_commit_while_main_moves(
    server: LoopbackHub, source: dict[str, bytes]
) -> None:
    old = server.repo("org/model").head
    other = files_of(tiny_llama(tie_word_embeddings=True))
    server.commit("org/model", other)
    result = mono_quant.quantize_from_hub("org/model", revision=old, token=ANN)
    assert result.model.config.tie_word_embeddings is False
    assert old in result.card()
    assert server.repo("org/model").head not in result.card()


def test_a_private_source_stays_private(server: LoopbackHub, source: dict[str, bytes]) -> None:
    server.add_repo("ann/secret", source, private=True)
    mono_quant.quantize_from_hub("ann/secret", token=ANN, push_to="ann/secret-int8")
    assert server.repo("ann/secret-int8").private
    server.add_repo("ann/open", {"README.md": CARD})
    head = server.repo("ann/open").head
    with pytest.raises(errors.HubConflictError, match="public, but its source 'ann/secret' is private"):
        mono_quant.quantize_from_hub("ann/secret", token=ANN, push_to="ann/open")
    assert server.repo("ann/open").head == head
    with pytest.raises(errors.HubNotFoundError, match="ann/secret"):
        mono_quant.quantize_from_hub("ann/secret", token=BOB)


def test_a_saved_folder_remembers_that_its_source_was_private(
    server: LoopbackHub, source: dict[str, bytes], tmp_path: Path
) -> None:
    server.add_repo("ann/secret", source, private=True)
    mono_quant.quantize_from_hub("ann/secret", token=ANN, output=tmp_path / "out")
    pushed = mono_quant.push_to_hub(tmp_path / "out", "ann/copy", token=ANN)
    assert server.repo("ann/copy").private
    assert pushed.commit_sha == server.repo("ann/copy").head


def test_a_right_to_write_is_asked_for_before_the_work(server: LoopbackHub) -> None:
    server.add_repo("org/target", {"README.md": CARD})
    with pytest.raises(errors.HubAuthError):
        mono_quant.quantize_from_hub("org/model", token=ANN, push_to="org/target")
    assert not [r for r in server.calls("resolve") if r.path.endswith(".safetensors")]


@pytest.mark.parametrize(("target", "role"), [("org/new", "write"), ("ann/new", "read")])
def test_a_right_to_create_is_asked_for_before_the_work(server: LoopbackHub, target: str, role: str) -> None:
    server.users[ANN].role = role
    with pytest.raises(errors.HubAuthError, match=target):
        mono_quant.quantize_from_hub("org/model", token=ANN, push_to=target)
    assert not server.calls("resolve")


def test_a_pull_request_needs_no_right_to_write(server: LoopbackHub) -> None:
    server.add_repo("org/target", {"README.md": CARD})
    mono_quant.quantize_from_hub("org/model", token=ANN, push_to="org/target", create_pr=True)
    assert list(server.repo("org/target").pulls) == ["refs/pr/1"]


def test_foreign_weights_are_refused_and_stale_ones_replaced(
    server: LoopbackHub, source: dict[str, bytes]
) -> None:
    server.add_repo(
        "ann/used", {"model-00001-of-00001.safetensors": source["model.safetensors"], "notes.txt": b"mine"}
    )
    before = len(server.repo("ann/used").commits())
    result = mono_quant.quantize_from_hub("org/model", token=ANN)
    with pytest.raises(errors.HubConflictError, match="holds weights that mono_quant did not push"):
        result.push_to_hub("ann/used", token=ANN)
    result.push_to_hub("ann/used", token=ANN, overwrite=True)
    files = server.repo("ann/used").files()
    assert "model-00001-of-00001.safetensors" not in files
    assert files["notes.txt"] == b"mine"
    assert len(server.repo("ann/used").commits()) == before + 1


def test_a_lost_answer_is_recognised_as_success(server: LoopbackHub) -> None:
    result = mono_quant.quantize_from_hub("org/model", token=ANN)
    server.inject("commit", "apply-then-drop")
    result.push_to_hub("ann/model-int8", token=ANN)
    assert len(server.repo("ann/model-int8").commits()) == 2


def test_an_edited_card_is_kept_when_true_and_refused_when_false(server: LoopbackHub, tmp_path: Path) -> None:
    mono_quant.quantize_from_hub("org/model", token=ANN, output=tmp_path / "out")
    readme = tmp_path / "out" / "README.md"
    generated = readme.read_text()
    readme.write_text(generated.replace("license: mit", "license: apache-2.0"))
    with pytest.raises(
        errors.ConfigError, match=r"was edited and contradicts the report: license is 'apache-2\.0'"
    ):
        mono_quant.push_to_hub(tmp_path / "out", "ann/model-int8", token=ANN)
    readme.write_text(generated + "\n## Notes\n\nOurs.\n")
    mono_quant.push_to_hub(tmp_path / "out", "ann/model-int8", token=ANN)
    assert server.repo("ann/model-int8").files()["README.md"].decode().endswith("## Notes\n\nOurs.\n")


def test_a_deleted_card_is_written_anew(server: LoopbackHub, tmp_path: Path) -> None:
    mono_quant.quantize_from_hub("org/model", token=ANN, output=tmp_path / "out")
    (tmp_path / "out" / "README.md").unlink()
    mono_quant.push_to_hub(tmp_path / "out", "ann/model-int8", token=ANN)
    assert b'load("ann/model-int8")' in server.repo("ann/model-int8").files()["README.md"]


def test_a_tampered_folder_is_not_published(server: LoopbackHub, tmp_path: Path) -> None:
    mono_quant.quantize_from_hub("org/model", token=ANN, output=tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    before = len(server.requests)
    with pytest.raises(errors.CorruptCheckpointError, match=r"model\.safetensors"):
        mono_quant.push_to_hub(tmp_path / "out", "ann/model-int8", token=ANN)
    assert len(server.requests) == before


def test_a_plain_module_is_published_and_loaded_into_its_class(server: LoopbackHub) -> None:
    family = FAMILIES["cnn"]
    result = mono_quant.quantize(family.build(), probe=family.inputs())
    result.push_to_hub("ann/cnn-int8", token=ANN)
    loaded = mono_quant.load("ann/cnn-int8", family.make, token=ANN)
    assert torch.equal(run(loaded, family.inputs()), run(result.model, family.inputs()))


def test_command_line_from_id_to_repository(server: LoopbackHub, tmp_path: Path) -> None:
    done = cli(
        server, tmp_path, "quantize", "org/model", "--push-to", "ann/model-int8", "--output", "out", "--json"
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["commit_sha"] == server.repo("ann/model-int8").head
    assert facts["totals"]["quantized_parameters"] > 0
    snippet = re.search(
        r"```python\n(.*?)```", server.repo("ann/model-int8").files()["README.md"].decode(), re.DOTALL
    )
    assert snippet is not None
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": ANN,
    }
    code = snippet.group(1) + "\nprint(type(model).__name__)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.stdout.strip() == "LlamaForCausalLM", ran.stderr

    again = cli(server, tmp_path, "push", "out", "ann/model-int8")
    assert again.returncode == 0, again.stderr
    assert "already at" in again.stdout
    seen = cli(server, tmp_path, "inspect", "ann/model-int8")
    assert "int8      14 tensors" in seen.stdout
    card = cli(server, tmp_path, "card", "out", "--repo", "ann/model-int8")
    assert card.stdout.encode() == server.repo("ann/model-int8").files()["README.md"]


def test_a_repository_is_verified_like_a_folder(server: LoopbackHub, tmp_path: Path) -> None:
    mono_quant.quantize_from_hub("org/model", token=ANN, output=tmp_path / "out", push_to="ann/model-int8")
    good = server.repo("ann/model-int8").head
    passed = mono_quant.verify(tmp_path / "out")
    assert passed[-1] == "loads as LlamaForCausalLM"
    assert mono_quant.verify("ann/model-int8", token=ANN) == passed
    # repositories gather files, which a folder of ours does not
    server.commit("ann/model-int8", {"LICENSE": b"MIT", "vocab.txt": b"a"})
    assert mono_quant.verify("ann/model-int8", token=ANN) == passed
    weights = server.repo("ann/model-int8").files()["model.safetensors"]
    server.commit("ann/model-int8", {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])})
    with pytest.raises(errors.CorruptCheckpointError, match=r"model\.safetensors has sha256"):
        mono_quant.verify("ann/model-int8", token=ANN)
    assert mono_quant.verify("ann/model-int8", token=ANN, revision=good) == passed
    with pytest.raises(errors.MissingFileError, match="mono_quant did not write it"):
        mono_quant.verify("org/model", token=ANN)


def test_the_card_of_a_repository_is_printed_and_checked_from_its_small_files(
    server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mono_quant.quantize_from_hub("org/model", token=ANN, push_to="ann/model-int8")
    hub = Hub(token=ANN, endpoint=server.endpoint, cache_dir=tmp_path / "another cache")
    access = Access(client=hub)
    before = len(server.requests)
    readme = server.repo("ann/model-int8").files()["README.md"].decode()
    assert "\n".join(map(str, commands.card("ann/model-int8", access, None, False).parts)) + "\n" == readme
    assert commands.card("ann/model-int8", access, None, True).parts == (
        "ok      ann/model-int8/README.md says what the report says",
    )
    fetched = {r.path.rpartition("/")[2] for r in server.requests[before:] if r.endpoint == "resolve"}
    assert fetched == {"README.md", "mono_quant.json", "mono_quant_report.json"}
    server.commit("ann/model-int8", {"README.md": readme.replace("are int8", "are int4").encode()})
    with pytest.raises(errors.ConfigError, match="was edited and contradicts the report"):
        commands.card("ann/model-int8", access, None, True)


@pytest.mark.parametrize(
    ("args", "token", "says"),
    [
        (("quantize", "org/missing"), ANN, "org/missing"),
        (("quantize", "org/model", "--push-to", "org/other"), None, "org/other"),
        (("plan", "org/model", "--skip", "mlq"), ANN, "near names: mlp"),
    ],
)
def test_command_line_errors_are_one_line_and_exit_2(
    server: LoopbackHub, tmp_path: Path, args: tuple[str, ...], token: str | None, says: str
) -> None:
    done = cli(server, tmp_path, *args, token=token)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr
    assert [p for p in tmp_path.iterdir() if p.name not in ("home", "cache")] == []


def test_offline_uses_the_cache_and_says_so_otherwise(
    server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mono_quant.quantize_from_hub("org/model", token=ANN)
    settings = partial(Hub, endpoint=server.endpoint, cache_dir=tmp_path / "cache", offline=True)
    monkeypatch.setattr("mono_quant.api.verbs.Hub", settings)
    before = len(server.requests)
    assert mono_quant.quantize_from_hub("org/model", token=ANN).report.coverage > 0.5
    with pytest.raises(errors.HubOfflineError, match="org/other"):
        mono_quant.quantize_from_hub("org/other", token=ANN)
    assert len(server.requests) == before


def test_files_that_others_add_to_a_repository_do_not_stop_loading(server: LoopbackHub) -> None:
    mono_quant.quantize_from_hub("org/model", token=ANN, push_to="ann/model-int8")
    server.commit("ann/model-int8", {"LICENSE": b"MIT", "notes.txt": b"mine", "vocab.txt": b"a"})
    assert type(mono_quant.load("ann/model-int8", token=ANN)).__name__ == "LlamaForCausalLM"
    server.commit("ann/model-int8", {"model-00001-of-00001.safetensors": b"stale"})
    with pytest.raises(errors.CorruptCheckpointError, match="is not listed"):
        mono_quant.load("ann/model-int8", token=ANN)


def test_command_line_refuses_a_target_that_does_not_fit_before_the_work(
    server: LoopbackHub, source: dict[str, bytes], tmp_path: Path
) -> None:
    server.add_repo("ann/model", source, private=True)
    server.add_repo("ann/open", {"README.md": CARD})
    server.add_repo("ann/used", source, private=True)
    for target, says in {
        "ann/model": "is the model that was quantized",
        "ann/open": "Choose a private target, or pass --public to publish it anyway",
        "ann/used": "pass --overwrite to replace them",
    }.items():
        done = cli(server, tmp_path, "quantize", "ann/model", "--push-to", target)
        assert done.returncode == 2
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert server.calls("resolve") == []


def test_command_line_names_the_folder_that_was_saved_before_a_push_failed(
    server: LoopbackHub, tmp_path: Path
) -> None:
    server.inject("commit", "403")
    done = cli(server, tmp_path, "quantize", "org/model", "--output", "out", "--push-to", "ann/new")
    assert done.returncode == 2
    assert "is saved in out; push it from there: mono-quant push out ann/new" in done.stderr
    again = cli(server, tmp_path, "push", "out", "ann/new")
    assert again.returncode == 0, again.stderr


def test_command_line_inspects_offline_only_what_is_in_the_cache(server: LoopbackHub, tmp_path: Path) -> None:
    assert cli(server, tmp_path, "plan", "org/model").returncode == 0
    done = cli(server, tmp_path, "inspect", "org/model", offline=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "The weights of 'org/model' at commit" in done.stderr
    assert "are not in the cache. The network is off" in done.stderr


def test_a_repository_without_safetensors_is_not_inspected_as_empty(
    server: LoopbackHub, tmp_path: Path
) -> None:
    server.add_repo("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(errors.MissingFileError, match="'org/pickled' has no safetensors weights at commit"):
        mono_quant.inspect("org/pickled", token=ANN)


def test_the_repr_of_a_result_is_one_short_line() -> None:
    result = mono_quant.quantize(tiny_llama(), fidelity=False)
    assert re.fullmatch(r"<QuantizedModel LlamaForCausalLM: int8, [^\n]{1,90}>", repr(result))
    assert result.report.summary in repr(result)


def test_a_result_is_saved_under_a_path_only() -> None:
    result = mono_quant.quantize(tiny_llama(), fidelity=False)
    target: Any
    for target in (None, b"x", ""):
        with pytest.raises(errors.ConfigError, match=r"the output folder is .*; give a path"):
            result.save(target)


@pytest.mark.parametrize(
    ("raised", "kind", "says"),
    [
        (
            KeyError("Unknown task nonsense, available tasks are"),
            errors.ConfigError,
            "task 'x': Unknown task",
        ),
        (
            Exception("which tokenizer"),
            errors.UnsupportedModelError,
            r"no 'x' pipeline \(Exception: which tok",
        ),
        (
            AttributeError("generate"),
            errors.UnsupportedModelError,
            "Choose the task that the model was made for",
        ),
        (errors.MissingDependencyError("pip install"), errors.MissingDependencyError, "^pip install$"),
    ],
)
def test_a_pipeline_that_cannot_be_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], says: str
) -> None:
    def refuse(*_: object) -> None:
        raise raised

    monkeypatch.setattr("mono_quant.api.result.pipeline", refuse)
    result = mono_quant.quantize(tiny_llama(), fidelity=False)
    with pytest.raises(kind, match=says):
        result.pipeline("x")
    task: Any = None
    with pytest.raises(errors.ConfigError, match="task is None; give the name of one"):
        result.pipeline(task)
