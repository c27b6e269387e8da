"""What only a process of its own can show: what it imports, Ctrl-C at any moment, a reader that went away, a terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub
from models import tiny_llama

import mono_quant

ROOT = Path(mono_quant.__file__).parents[1]
ANN = "hf_" + "AnnsCanaryToken" * 2 + "xyz1"
NOTHING = "mono-quant: interrupted; nothing was written\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "llama"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(source: Path) -> Path:
    return mono_quant.quantize(source, fidelity=False).save(source.parent / "saved")


@contextmanager
def started(*command: object, cwd: Path, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Start Python on this tree; at the end it is gone."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    # a suite that runs in the background ignores interrupts, and what it starts would do so, too
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        text=True,
        env=environment,
        preexec_fn=_mind_interrupts,  # noqa: PLW1509 - one system call
        **pipes,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def _mind_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def done(*command: object, cwd: Path, **more: Any) -> tuple[int, str, str]:
    """Run Python on this tree to its end; return its exit code, stdout and stderr."""
    with started(*command, cwd=cwd, **more) as running:
        out, err = running.communicate(timeout=60)
    return running.returncode, out, err


LISTING = """
import atexit, json, sys
atexit.register(lambda: print("\\n" + json.dumps(sorted(sys.modules)), file=sys.stderr))
from mono_quant.apps.cli import main
main()
"""
COMPLETING = {"_MONO_QUANT_COMPLETE": "complete_bash"}


@pytest.mark.parametrize(
    ("args", "env", "shown"),
    [
        (["--version"], {}, mono_quant.__version__),
        (["quantize", "-h"], {}, "--embeddings"),
        ([], {**COMPLETING, "COMP_WORDS": "mono-quant ver", "COMP_CWORD": "1"}, "verify"),
        ([], {**COMPLETING, "COMP_WORDS": "mono-quant plan --dtype ", "COMP_CWORD": "3"}, "int8\nfp16"),
        (["--show-completion", "bash"], {}, "_MONO_QUANT_COMPLETE=complete_bash"),
    ],
)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(args, env, shown, tmp_path):
    # typer asks which shell it is for unless told that it is asked for one
    env = {**env, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    _, out, err = done("-c", LISTING, *args, cwd=tmp_path, env=env)
    assert shown in out
    modules = json.loads(err.splitlines()[-1])
    assert {"mono_quant.apps.usage", "typer"} <= set(modules)
    heavy = {"torch", "transformers", "huggingface_hub", "numpy", "rich", "mono_quant.apps.commands"}
    assert heavy.intersection(modules) == set()


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_an_interrupt_during_an_import_is_one_line(package, source, tmp_path):
    slow = tmp_path / "slow" / package
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    env = {"PYTHONPATH": f"{slow.parent}:{ROOT}"}
    with started("-m", "mono_quant", "plan", source, cwd=tmp_path, env=env) as running:
        assert running.stdout.readline() == "importing\n"
        running.send_signal(signal.SIGINT)
        assert running.communicate(timeout=60) == ("", NOTHING)
    assert running.returncode == 130


SAVING = """
import time
from mono_quant.apps import cli
from mono_quant.io.tensors import shards

def slow(chunks, wrote):
    yield next(iter(chunks))
    print("half", flush=True)
    time.sleep(60)

shards._told = slow
cli.main()
"""


def test_an_interrupted_save_leaves_nothing(source, tmp_path):
    with started(
        "-c", SAVING, "quantize", source, "--output", "out", "--no-fidelity", cwd=tmp_path
    ) as running:
        assert running.stdout.readline() == "half\n"
        assert [path.name[:8] for path in tmp_path.iterdir()] == [".out.mq-"]
        running.send_signal(signal.SIGINT)
        assert running.communicate(timeout=60) == ("", NOTHING)
    assert running.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def server(source: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.add_user("ann", ANN)
        running.add_repo("org/model", {path.name: path.read_bytes() for path in source.iterdir()})
        yield running


@pytest.mark.parametrize("verb", ["quantize", "plan", "push"])
def test_an_interrupted_transfer_does_not_wait_for_the_hub(verb, server, saved, tmp_path):
    endpoint = "lfs_put" if verb == "push" else "resolve"
    if verb == "plan":  # the headers of the weights alone are silent
        server.silent_path = "model.safetensors"
    server.silent.add(endpoint)
    command = (verb, saved, "ann/new") if verb == "push" else (verb, "org/model")
    env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ANN}
    here = tmp_path / "here"
    here.mkdir()
    with started("-m", "mono_quant", *command, cwd=here, env=env) as running:
        assert server.stalled.wait(60)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    where = "mono-quant: interrupted; look at ann/new on the Hub: its files are all new or all old\n"
    assert (running.returncode, out, err) == (130, "", NOTHING if endpoint == "resolve" else where)
    assert list(here.iterdir()) == []
    if endpoint == "lfs_put":
        assert server.repo("ann/new").files().keys() <= {".gitattributes"}


def test_a_process_in_the_background_goes_on_ignoring_interrupts(tmp_path):
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from mono_quant.apps import interrupt\n"
        "with interrupt.stoppable():\n"
        "    interrupt.unwinding(); signal.raise_signal(signal.SIGINT)\n"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    assert done("-c", code, cwd=tmp_path) == (0, "True\n", "")


def test_a_second_interrupt_does_not_wait(tmp_path):
    code = (
        "import signal, time\n"
        "from mono_quant.apps import interrupt\n"
        "with interrupt.stoppable():\n"
        "    interrupt.unwinding()\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    finally:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
    )
    assert done("-c", code, cwd=tmp_path) == (130, "", "mono-quant: interrupted twice; stopped at once\n")


# help is printed by typer, which has a code of its own for it
@pytest.mark.parametrize(("args", "expected"), [(["--version"], 141), (["-h"], 1), (["plan", "-h"], 1)])
def test_a_reader_that_went_away_is_no_error(args, expected, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    code, _, err = done("-m", "mono_quant", *args, cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert (code, err) == (expected, "")


def test_a_result_that_cannot_be_printed_is_an_error(tmp_path):
    with Path("/dev/full").open("w") as full:
        code, _, err = done("-m", "mono_quant", "--version", cwd=tmp_path, stdout=full)
    assert (code, err) == (2, "mono-quant: the result cannot be printed: No space left on device\n")


def test_a_terminal_gets_colours_in_its_width(saved, tmp_path):
    ours, theirs = pty.openpty()
    env = {"TERM": "xterm", "COLUMNS": "60"}
    shown = b""
    with started(
        "-m", "mono_quant", "inspect", saved, cwd=tmp_path, env=env, stdout=theirs, stderr=theirs
    ) as running:
        os.close(theirs)
        while select.select([ours], [], [], 60)[0]:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # its end
                break
        assert running.wait(60) == 0
    os.close(ours)
    text = shown.decode().replace("\r\n", "\n")
    assert text.startswith("starting ...\r\x1b[J")
    assert "\x1b[1mclass" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).partition("\r")[2]
    assert max(map(len, plain.splitlines())) <= 60
    assert "model.layers.0.mlp.down_proj.weight" in plain


def test_a_setting_that_means_nothing_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    with started("-m", "mono_quant", "env", cwd=tmp_path, env={"MONO_QUANT_ISA": "fast"}) as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith("mono-quant: MONO_QUANT_ISA: unknown kernel path 'fast'; choose from")
    assert err.count("\n") == 1
