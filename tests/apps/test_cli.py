"""The command line says what is wrong in its own words, in one line, and stops cleanly."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_llama

import mono_quant
from mono_quant import kernels
from mono_quant.apps import cli, commands, interrupt, usage
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
    monkeypatch.setattr(interrupt, "end", sys.exit)

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

    monkeypatch.setattr(commands.verbs, "verify", refuse)
    assert refusal(run("verify", "x")) == f"mono-quant: {shown}\n"


def test_a_path_with_an_equals_sign_is_shown_as_it_is(run, tmp_path):
    place = tmp_path / "token=x" / "origin='foo'"
    assert f"{place}" in refusal(run("verify", place))


def test_an_output_that_exists_is_replaced_with_overwrite(run, source, saved, tmp_path):
    command = ("quantize", source, "--output", "out", "--no-fidelity")
    assert run(*command)[0] == 0
    assert "pass --overwrite to replace" in refusal(run(*command))
    assert run(*command, "--overwrite")[0] == 0


NOTE = (
    "mono-quant: note: {!r} is a folder here, so it is not looked up on the Hub; pass --origin hub for that\n"
)


def test_a_folder_that_is_here_wins_over_an_id_and_one_line_says_so(run, source, saved, tmp_path):
    (tmp_path / "org").mkdir()
    for name, place in (("model", source), ("saved", saved)):
        shutil.copytree(place, tmp_path / "org" / name)
    for command in (
        ("plan", "org/model"),
        ("inspect", "org/model"),
        ("quantize", "org/model", "--no-fidelity"),
        ("verify", "org/saved"),
    ):
        code, out, err = run(*command, "--json")
        assert (code, err) == (0, NOTE.format(command[1]))
        assert isinstance(json.loads(out), dict)
        assert run(*command, "--origin", "local", *["--overwrite"] * (command[0] == "quantize"))[::2] == (
            0,
            "",
        )
    assert run("card", "org/saved")[::2] == (0, NOTE.format("org/saved"))
    assert "use 'hub' or 'local'" in refusal(run("plan", "org/model", "--origin", "disk"))
    assert "give a Hub id with --origin hub" in run("plan", "org/model", "--revision", "main")[2]


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
        (("quantise",), "No such command 'quantise'. Did you mean 'quantize'? see mono-quant --help"),
        (("plan", "x", "--embedings"), "(Possible options: --embeddings); see mono-quant plan --help"),
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
    for verb in ([], *([command.callback.__name__] for command in usage.app.registered_commands)):
        assert run(*verb, "-h") == run(*verb, "--help")
        assert run(*verb, "-h")[0] == 0


@pytest.mark.parametrize("command", [("push", "me/x"), ("card",), ("card", "--lint"), ("verify",)])
def test_a_folder_that_is_not_ours_is_called_so(run, source, command):
    verb, *rest = command
    assert "is no folder" in refusal(run(verb, "./nowhere", *rest))
    assert "has no mono_quant.json, so mono_quant did not write it" in refusal(run(verb, source, *rest))


def test_a_card_is_written_for_a_repository_id_only(run, saved):
    assert "'bad id!' is not a repository id" in refusal(run("card", saved, "--repo", "bad id!"))
    assert run("card", saved, "--repo", "me/good")[0] == 0


def test_a_card_that_is_missing_is_not_called_true(run, source, tmp_path):
    folder = mono_quant.quantize(source, fidelity=False).save(tmp_path / "own")
    assert run("card", folder, "--lint")[1].startswith("ok ")
    (folder / "README.md").unlink()
    assert "README.md is missing, so there is no card to check" in refusal(run("card", folder, "--lint"))


def test_an_interrupted_push_says_where_to_look(run, saved, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.verbs, "push_to_hub", interrupt)
    code, out, err = run("push", saved, "me/x")
    assert (code, out) == (130, "")
    assert err == "mono-quant: interrupted; look at me/x on the Hub: its files are all new or all old\n"


def test_the_environment_has_a_line_for_each_accelerator(run, monkeypatch):
    assert re.search(r"^accelerators {5}-$", run("env")[1], re.MULTILINE) or torch.accelerator.is_available()
    found = {
        "device": "cuda:0",
        "name": "card",
        "path": "int_mm",
        "reason": "no Triton",
        "note": "unverified",
    }
    known = kernels.environment()
    monkeypatch.setattr(kernels, "environment", lambda: known | {"accelerators": [found]})
    assert json.loads(run("env", "--json")[1])["accelerators"] == [found]
    lines = run("env")[1].splitlines()
    assert "accelerators     cuda:0" in lines
    assert "cuda:0           int_mm; card; no Triton; unverified" in lines


def test_the_default_folder_has_one_name_however_the_dtype_is_written(run, source: Path) -> None:
    code, out, _ = run("quantize", source, "--dtype", "INT8", "--no-fidelity")
    assert (code, (Path.cwd() / "llama-int8").is_dir()) == (0, True)
    assert "saved   llama-int8 " in out


def test_a_table_in_a_pipe_is_the_text_of_the_library_with_flags_in_place_of_arguments(run, source):
    report = mono_quant.plan(source)
    text = report.table()
    assert "(embeddings=True)" in text
    assert run("plan", source) == (0, f"{text.replace('(embeddings=True)', '(--embeddings)')}\n", "")
    assert run("plan", source, "--json") == (0, report.to_json(), "")


def test_reasons_and_notes_name_flags(run, source, saved):
    command = ("quantize", source, "--output", "out", "--min-params", "999999", "--no-fidelity")
    out = run(*command)[1]
    assert "fewer than --min-params 999999 weights" in out
    assert (
        "note    NO LAYER BECAME INT8: 16 of 16 layers kept: fewer than --min-params 999999 weights\n" in out
    )
    assert "(embedding: int8 only on request (--embeddings))" in run("inspect", saved)[1]
    shown = run("inspect", "out")[1]
    assert "(fewer than --min-params 999999 weights)" in shown
    assert "min_params=" not in out + shown
    command = ("quantize", source, "--output", "half", "--kept", "fp16", "--no-fidelity")
    for out in (run(*command)[1], run("inspect", "half")[1]):
        assert "embedding: int8 only on request (--embeddings); stored in float16 on request" in out
    # what a person wrote is theirs
    out = run("plan", source, "--skip", "re:(embeddings=True)?lm_head")[1]
    assert "skipped by the user: re:(embeddings=True)?lm_head" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--min-params", "-4"), "--min-params is -4; give 0 or a number of weights"),
        (
            ("--disable-default", "heads"),
            "--disable-default names unknown rules ['heads']; the default rules are",
        ),
        (("--disable-default", "tied"), "--disable-default names 'tied', which cannot be lifted"),
        (("--dtype", "int4"), "--dtype is 'int4'; use 'int8' or 'fp16'"),
        (("--origin", "disk"), "--origin is 'disk'; use 'hub' or 'local'"),
        (("--on-nonfinite", "x"), "--on-nonfinite is 'x'; use one of 'error', 'keep'"),
        (("--kept", "int4"), "--kept is 'int4'; use one of 'same', 'fp16', 'bf16'"),
        (("--dtype", "fp16", "--kept", "bf16"), "--kept bf16 is about what int8 leaves in float"),
        (("--on-overflow", "x"), "--on-overflow is 'x'; use one of 'keep', 'error'"),
    ],
)
def test_a_value_that_is_wrong_is_called_by_its_flag(run, args, says):
    assert refusal(run("quantize", "./nowhere", *args)).startswith(f"mono-quant: {says}")


def test_why_nothing_was_measured_names_a_flag(run, source, monkeypatch):
    monkeypatch.setattr("mono_quant.api.recipe.AUTO_FIDELITY_PARAMETERS", 1)
    out = run("quantize", source)[1]
    assert re.search(r"output  not measured: [\d,]+ parameters; ask for it with --fidelity\n", out)


def test_schemes_of_activations_are_read_from_names_and_pairs(source, run):
    schemes = commands.schemes
    assert (schemes([]), schemes(["int12"])) == ("auto", "int12")
    assert schemes(["*.a=int12", "int8", "re:.*=b=int8-g64"]) == {
        "*": "int8", "*.a": "int12", "re:.*=b": "int8-g64"
    }  # fmt: skip
    said = ["--activations", "*.down_proj=int12", "--activations", "int8"]
    code, out, _ = run("plan", source, *said, "--json")
    assert code == 0
    rows = {
        r["module"]: r.get("activations", "auto")
        for r in json.loads(out)["rows"]
        if r["action"] == "quantized"
    }
    assert {scheme for name, scheme in rows.items() if name.endswith("down_proj")} == {"int12"}
    assert {scheme for name, scheme in rows.items() if not name.endswith("down_proj")} == {"int8"}
    for command, given, message in (
        ("plan", ["int8", "int12"], "--activations says int8 and int12 for all layers; give one of them"),
        ("quantize", ["int9"], "--activations is 'int9'; use one of 'auto'"),
        ("plan", ["*.dwn=int8"], "--activations without a match among the layers that can be int8"),
    ):
        options = [part for text in given for part in ("--activations", text)]
        assert message in refusal(run(command, source, *options))
    assert "--activations is 'int12', but fp16" in refusal(
        run("plan", source, "--dtype", "fp16", "--activations", "int12")
    )


def test_suggest_says_what_to_pass(source, saved, run):
    code, out, _ = run("suggest", source)
    assert code == 0 and out.startswith("no few layers suffice: ")
    code, told, _ = run("suggest", saved, "--json")
    data = json.loads(told)
    assert data["activations"] == "auto" and len(data["layers"]) == 14
    assert data["verdict"] in out
    code, out, _ = run("quantize", source, "--activations", "measured", "--output", "out", "--json")
    assert code == 0 and any(data["verdict"] in note for note in json.loads(out)["notes"])


def test_completion_offers_the_schemes_that_there_are():
    (option,) = usage.ActivationsOption.__metadata__
    assert option.autocompletion() == [*kernels.ACTIVATIONS, "measured"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_streaming_on_request_writes_what_memory_writes_and_says_what_it_took(run, source, saved, tmp_path):
    code, out, err = run("quantize", source, "-o", "out", "--no-fidelity", "--stream", "--json")
    assert (code, err) == (0, "")
    assert contents(tmp_path / "out") == contents(saved)
    assert json.loads(out)["peak_memory_bytes"] > 1 << 27
    assert "memory  " in run("quantize", source, "-o", "other", "--no-fidelity", "--stream")[1]


def test_what_has_more_than_half_of_the_free_memory_is_streamed_and_why_is_said(
    run, source, saved, tmp_path, monkeypatch
):
    size = (source / "model.safetensors").stat().st_size
    monkeypatch.setattr("mono_quant.api.streaming.free_bytes", lambda: 2 * size)
    assert "streaming" not in run("quantize", source, "-o", "whole", "--no-fidelity")[2]
    monkeypatch.setattr("mono_quant.api.streaming.free_bytes", lambda: 2 * size - 1)
    code, _, err = run("quantize", source, "-o", "out", "--no-fidelity")
    assert (code, err.count("\n")) == (0, 1)
    assert re.search(
        r"streaming from file to file: its weights have \S+ kB, and \S+ kB of memory are free", err
    )
    assert contents(tmp_path / "out") == contents(saved)
    assert "streaming" not in run("quantize", source, "-o", "asked", "--no-fidelity", "--no-stream")[2]


@pytest.mark.parametrize(
    ("flags", "said"), [(("--restart",), "add --stream"), (("--stream", "--allow-pickle"), "--no-stream")]
)
def test_flags_that_say_nothing_here_are_refused(run, source, tmp_path, flags, said):
    assert said in refusal(run("quantize", source, *flags))
    assert not list(tmp_path.iterdir())


def test_unfinished_work_of_other_settings_is_named_and_discarded_with_a_flag(
    run, source, tmp_path, monkeypatch
):
    def full(*_: object, **__: object) -> None:
        raise ConfigError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("mono_quant.api.streaming.save_with", full)
        line = refusal(run("quantize", source, "-o", "out", "--no-fidelity", "--stream"))
    assert "the disk is full; what is finished stays in" in line
    line = refusal(run("quantize", source, "--dtype", "fp16", "-o", "out", "--no-fidelity", "--stream"))
    assert "settings.dtype was 'int8' and is 'fp16'" in line
    assert "--restart" in line
    code, _, _ = run(
        "quantize", source, "--dtype", "fp16", "-o", "out", "--no-fidelity", "--stream", "--restart"
    )
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
