"""The command line says what is wrong in its own words, in one line, and stops cleanly."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_llama

import mono_quant
from mono_quant.apps import cli
from mono_quant.errors import ConfigError, Option


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "llama"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(source: Path) -> Path:
    return mono_quant.quantize(source, fidelity=False).save(source.parent / "saved")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command in an empty current folder; return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["mono-quant", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return (stopped.value.code, *capsys.readouterr())

    return call


def refusal(done) -> str:
    """Return the one line of a command that was refused."""
    code, out, err = done
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mono-quant: ")
    return err


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (["pass ", Option("overwrite", True), " to replace"], "pass --overwrite to replace"),
        (["pass ", Option("allow_pickle", True), " to"], "pass --allow-pickle to"),
        (["pass ", Option("trust_remote_code", True), " to"], "pass --trust-remote-code to"),
        (["pass ", Option("private", False), " to"], "pass --public to"),
        (["and ", Option("private", True), " does"], "and --private does"),
        (["use ", Option("create_pr", True)], "use --create-pr"),
        (["use ", Option("on_nonfinite", "keep")], "use --on-nonfinite keep"),
        (["with ", Option("on_overflow", "keep")], "with --on-overflow keep"),
        (["or ", Option("fidelity", False)], "or --no-fidelity"),
        (["use ", Option("embeddings", False)], "use no --embeddings"),
        (["pass it as ", Option("token")], "pass it as --token"),
        # no command takes it
        (["pass it as ", Option("probe")], "pass it as probe="),
        # what a person wrote stays what it is
        (["x/origin=foo and overwrite=True and ", Option("origin", "hub")], "x/origin=foo and overwrite=True and --origin hub"),
        ([f"'/a/hub/models--org--my_model/snapshots/{'0123456789' * 4}' has"], "'org/my_model@012345678901' has"),
        (["a.b_c=1 and\n  text"], "a.b_c=1 and text"),
    ],
)  # fmt: skip
def test_remedies_are_named_as_flags(run, monkeypatch, said, shown):
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError(*said)

    monkeypatch.setattr(cli.inspection, "verify", refuse)
    assert refusal(run("verify", "x")) == f"mono-quant: {shown}\n"


def test_a_path_with_an_equals_sign_is_shown_as_it_is(run, tmp_path):
    place = tmp_path / "token=x" / "origin='foo'"
    assert f"{place}" in refusal(run("verify", place))


def test_an_output_that_exists_is_replaced_with_overwrite(run, source, saved, tmp_path):
    command = ("quantize", source, "--output", "out", "--no-fidelity")
    assert run(*command)[0] == 0
    assert "pass --overwrite to replace" in refusal(run(*command))
    assert run(*command, "--overwrite")[0] == 0


def test_an_ambiguous_source_is_settled_with_origin(run, source, tmp_path):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").symlink_to(source)
    for verb in ("quantize", "plan", "inspect"):
        line = refusal(run(verb, "org/model"))
        assert "write './org/model' for the folder, or pass --origin hub for the Hub" in line
    assert run("plan", "org/model", "--origin", "local")[0] == 0
    assert run("inspect", "org/model", "--origin", "local")[0] == 0
    assert run("quantize", "org/model", "--origin", "local", "--no-fidelity")[0] == 0
    assert "use 'hub' or 'local'" in refusal(run("plan", "org/model", "--origin", "disk"))


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_layer_with_nan_is_kept_on_request(run, tmp_path, dtype):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    command = ("quantize", "broken", "--dtype", dtype, "--no-fidelity")
    assert "--on-nonfinite keep" in refusal(run(*command))
    code, out, _ = run(*command, "--on-nonfinite", "keep")
    assert code == 0
    assert "up_proj" in out


def test_a_value_beyond_float16_is_an_error_on_request(run, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = 1e6
    model.save_pretrained(tmp_path / "wide")
    command = ("quantize", "wide", "--dtype", "fp16", "--no-fidelity", "--output", "out")
    assert "--on-overflow keep" in refusal(run(*command, "--on-overflow", "error"))
    assert run(*command)[0] == 0


@pytest.mark.parametrize("flag", ["--private", "--public", "--create-pr"])
def test_flags_of_a_push_need_a_repository(run, source, tmp_path, flag):
    assert "name it with --push-to" in refusal(run("quantize", source, flag))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["quantize", "plan", "inspect"])
def test_a_folder_has_no_revision(run, source, verb):
    assert "is a local folder, which has no revision 'main'" in refusal(
        run(verb, source, "--revision", "main")
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("quantize", "x", "--foo"), "No such option: --foo; see mono-quant quantize --help"),
        (("quantize",), "Missing argument 'SOURCE'; see"),
        (("nope",), "No such command 'nope'; see mono-quant --help"),
        (("plan", "x", "--min-params", "y"), "Invalid value for '--min-params'"),
    ],
)
def test_usage_errors_are_one_line(run, args, says):
    assert says in refusal(run(*args))


def test_help_and_version_are_no_errors(run):
    assert run("--version") == (0, f"{mono_quant.__version__}\n", "")
    assert run("plan", "--help")[0] == 0
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "Commands:" in err


@pytest.mark.parametrize("command", [("push", "me/x"), ("card",), ("card", "--lint"), ("verify",)])
def test_a_folder_that_is_not_ours_is_called_so(run, source, command):
    verb, *rest = command
    assert "'nowhere' is no folder" in refusal(run(verb, "nowhere", *rest))
    assert "has no mono_quant.json, so mono_quant did not write it" in refusal(run(verb, source, *rest))


def test_a_card_is_written_for_a_repository_id_only(run, saved):
    assert "'bad id!' is not a repository id" in refusal(run("card", saved, "--repo", "bad id!"))
    assert run("card", saved, "--repo", "me/good")[0] == 0


def test_a_card_that_is_missing_is_not_called_true(run, source, tmp_path):
    folder = mono_quant.quantize(source, fidelity=False).save(tmp_path / "own")
    assert run("card", folder, "--lint")[1].startswith("ok ")
    (folder / "README.md").unlink()
    assert "README.md is missing, so there is no card to check" in refusal(run("card", folder, "--lint"))


SLOW = """
import sys, time
from dataclasses import replace
from mono_quant.api import recipe
from mono_quant.apps import cli

def convert(*_, **__):
    print("converting", flush=True)
    time.sleep(60)

recipe.SCHEMES = {"int8": replace(recipe.SCHEMES["int8"], apply_=convert)}
cli.main()
"""


def test_an_interrupted_conversion_says_that_nothing_was_written(source, tmp_path):
    command = [sys.executable, "-c", SLOW, "quantize", source, "--output", "out", "--no-fidelity"]
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "converting\n"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err == "mono-quant: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_push_says_where_to_look(run, saved, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.verbs, "push_to_hub", interrupt)
    code, out, err = run("push", saved, "me/x")
    assert (code, out) == (130, "")
    assert err == "mono-quant: interrupted; look at me/x on the Hub: its files are all new or all old\n"


def test_the_default_folder_has_one_name_however_the_dtype_is_written(run, source: Path) -> None:
    code, out, _ = run("quantize", source, "--dtype", "INT8", "--no-fidelity")
    assert (code, (Path.cwd() / "llama-int8").is_dir()) == (0, True)
    assert "saved   llama-int8 " in out
