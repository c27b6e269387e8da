"""Staging: see the room of this name."""

import errno
import fcntl
import os
import threading

import pytest
from folders import leftovers, listing, save, shimmed, snapshot

from mono_quant.errors import (
    OutputBusyError,
    OutputExistsError,
    OutputWriteError,
)
from mono_quant.io.disk import disk, staging
from mono_quant.io.disk.manifest import verify_manifest
from mono_quant.io.disk.output import new_folder

DEAD = "deadbeef"


def stray(parent, kind="partial", host=None, process=2**22 + 1):
    path = parent / f".out.mq-{host or staging._host()}-{process}-00000000.{kind}"
    path.mkdir()
    (path / "x").write_text("x")
    return path


def test_strays_of_dead_runs_are_removed_and_others_left(tmp_path, caplog):
    ours = stray(tmp_path)
    old = stray(tmp_path, kind="old")
    foreign = stray(tmp_path, host=DEAD)
    living = stray(tmp_path, process=os.getppid())
    other_target = tmp_path / ours.name.replace(".out.", ".other.")
    other_target.mkdir()
    save(tmp_path / "unrelated", 1)
    assert ours.exists() and old.exists()
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", 1)
    assert not ours.exists() and not old.exists()
    assert foreign.exists() and living.exists() and other_target.exists()
    assert f"{foreign} was left by another run; remove it if none is using it" in caplog.text


def test_a_stray_that_cannot_be_removed_is_reported(tmp_path, monkeypatch, caplog):
    class Stubborn(disk._Ops):
        def remove_tree(self, path):
            if not path.name.startswith(".scratch"):
                raise OSError(errno.EIO, "Input/output error")
            super().remove_tree(path)

    path = stray(tmp_path)
    monkeypatch.setattr(disk, "_ops", Stubborn())
    save(tmp_path / "out", 1)
    assert f"{path} could not be removed (Input/output error); the next run tries again" in caplog.text


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_living_run_is_not_disturbed(tmp_path, expected):
    started, go = os.pipe(), os.pipe()

    def slow():
        with new_folder(tmp_path / "out") as folder:
            folder.write_text("README.md", "first")
            os.write(started[1], b"x")
            os.read(go[0], 1)

    process = os.fork()
    if process == 0:
        code = 1
        try:
            slow()
            code = 0
        finally:
            os._exit(code)
    os.read(started[0], 1)
    with pytest.raises(
        OutputBusyError, match=rf"process {process} is writing .*wait for it or choose another folder"
    ):
        save(tmp_path / "out", 2)
    os.write(go[1], b"x")
    assert os.waitpid(process, 0)[1] == 0
    for descriptor in (*started, *go):
        os.close(descriptor)
    assert (tmp_path / "out" / "README.md").read_text() == "first"
    verify_manifest(tmp_path / "out", hashes=True)


def test_a_second_run_in_the_same_process_is_refused(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        folder.write_text("README.md", "first")
        with pytest.raises(OutputBusyError, match="wait for it"):
            save(tmp_path / "out", 2)
    assert listing(tmp_path / "out") == ["README.md", "mono_quant.json"]


def test_losing_a_race_is_an_error_and_changes_nothing(tmp_path, monkeypatch):
    class Racing(disk._Ops):
        def rename(self, old, new):
            new.mkdir()
            (new / "theirs").write_text("x")
            super().rename(old, new)

    monkeypatch.setattr(disk, "_ops", Racing())
    with pytest.raises(
        OutputBusyError, match=r"another run finished .*out' in the meantime; nothing was changed"
    ):
        save(tmp_path / "out", 1)
    assert listing(tmp_path / "out") == ["theirs"] and leftovers(tmp_path) == []


def test_a_target_that_appeared_meanwhile_is_not_replaced(tmp_path):
    def work():
        with new_folder(tmp_path / "out") as folder:
            folder.write_text("README.md", "x")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("x")

    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        work()
    assert listing(tmp_path) == ["out"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("locks", [True, False])
def test_concurrent_runs_never_mix(tmp_path, monkeypatch, locks, expected):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    shimmed(monkeypatch)

    def race(value):
        for _ in range(15):
            try:
                save(tmp_path / "out", value, overwrite=True)
            except (OutputBusyError, OutputExistsError, OutputWriteError):
                continue

    children = []
    for value in (1, 2):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                race(value)
                code = 0
            finally:
                os._exit(code)
        children.append(process)
    assert [os.waitpid(process, 0)[1] for process in children] == [0, 0]
    assert snapshot(tmp_path / "out") in (expected["old"], expected["new"])
    save(tmp_path / "out", 2, overwrite=True)
    assert leftovers(tmp_path) == []


def test_threads_into_different_targets_do_not_disturb_each_other(tmp_path, expected):
    threads = [threading.Thread(target=save, args=(tmp_path / f"out{number}", 1)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(snapshot(tmp_path / f"out{number}") == expected["old"] for number in range(4))
