"""Disk: see the room of this name."""

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from folders import ShimOps, leftovers, listing, os_error, save, shimmed, snapshot

from mono_quant.errors import (
    OutputExistsError,
    OutputWriteError,
)
from mono_quant.io.disk import disk


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


SETTINGS = {
    "fresh": {"old": False, "can_exchange": True},
    "overwrite": {"old": True, "can_exchange": True},
    "overwrite in two steps": {"old": True, "can_exchange": False},
}
FAULTS = {
    "ENOSPC": (os_error(errno.ENOSPC), False),
    "EIO": (os_error(errno.EIO), False),
    "EROFS": (os_error(errno.EROFS), False),
    "EDQUOT after": (os_error(errno.EDQUOT), True),
    "interrupt before": (interrupt, False),
    "interrupt after": (interrupt, True),
}


def prepare(base, setting):
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    if SETTINGS[setting]["old"]:
        save(base / "out", 1)


def count_operations(base, setting, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_ops", ShimOps())
        prepare(base, setting)
        ops = ShimOps(can_exchange=SETTINGS[setting]["can_exchange"])
        patch.setattr(disk, "_ops", ops)
        save(base / "out", 2, overwrite=True)
    return ops.count


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_single_fault_leaves_old_or_new(tmp_path, monkeypatch, expected, setting, fault):
    base = tmp_path / "base"
    before = expected["old" if SETTINGS[setting]["old"] else "absent"]
    error, after = FAULTS[fault]
    total = count_operations(base, setting, monkeypatch)
    assert total > 30
    for k in range(1, total + 1):
        shimmed(monkeypatch)
        prepare(base, setting)
        ops = shimmed(
            monkeypatch, fail_at=k, error=error, after=after, can_exchange=SETTINGS[setting]["can_exchange"]
        )
        try:
            save(base / "out", 2, overwrite=True)
            failed = False
        except (OutputWriteError, KeyboardInterrupt):
            failed = True
        where = f"operation {k}, {ops.calls[k - 1]}"
        found = snapshot(base / "out")
        assert found in ((before, expected["new"]) if failed else (expected["new"],)), where
        assert leftovers(base) == [], where
        # Only a removal may be tried again; anything else that fails is fatal.
        assert failed or ops.calls[k - 1] == "remove_tree", where


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_killed_run_leaves_old_or_new_and_the_next_cleans_up(tmp_path, monkeypatch, expected, setting):
    base = tmp_path / "base"
    before = expected["old" if SETTINGS[setting]["old"] else "absent"]
    total = count_operations(base, setting, monkeypatch)
    for k in range(1, total + 1):
        shimmed(monkeypatch)
        prepare(base, setting)
        shimmed(
            monkeypatch, fail_at=k, error=kill, after=k % 2, can_exchange=SETTINGS[setting]["can_exchange"]
        )
        assert in_child(lambda: save(base / "out", 2, overwrite=True)) == -signal.SIGKILL
        shimmed(monkeypatch)
        found = snapshot(base / "out")
        halfway = found is None and any(name.endswith(".old") for name in leftovers(base))
        assert halfway or found in (before, expected["new"]), k
        if halfway:
            assert not SETTINGS[setting]["can_exchange"]
            # The old result is put back even if the new run fails at once.
            with pytest.raises(OutputExistsError):
                save(base / "out", 2)
            assert snapshot(base / "out") == before
        save(base / "out", 2, overwrite=True)
        assert snapshot(base / "out") == expected["new"]
        assert leftovers(base) == [], k


def in_child(work):
    """Run in a forked process; returns its exit code, negative for a signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_full_disk_says_what_is_needed(tmp_path, monkeypatch):
    shimmed(monkeypatch, fail_at=3, error=os_error(errno.ENOSPC))
    words = r"cannot write '.*model\.safetensors': No space left on device; needed \d+ bytes, available \d+ bytes; free"
    with pytest.raises(OutputWriteError, match=words):
        save(tmp_path / "out", 1)


def test_a_file_size_limit_is_typed(tmp_path):
    """A real refusal by the kernel, in a process that may not write more than 4 kB into a file."""
    script = """
import resource, signal, sys, torch
from mono_quant.errors import OutputWriteError
from mono_quant.io.disk.output import new_folder
from mono_quant.io.tensors.shards import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with new_folder(sys.argv[1]) as folder:
        write_tensors(folder, "model.safetensors", {"w": torch.ones(5000)})
except OutputWriteError as error:
    sys.exit(42 if "File too large" in str(error) else str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 42
    assert listing(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve_space_is_fine(tmp_path, monkeypatch, expected, code):
    class NoReserve(disk._Ops):
        def allocate(self, descriptor, size):
            raise OSError(code, "no")

    monkeypatch.setattr(disk, "_ops", NoReserve())
    save(tmp_path / "out", 1)
    assert snapshot(tmp_path / "out") == expected["old"]


def test_short_writes_are_continued_and_none_is_an_error(tmp_path, monkeypatch, expected):
    class Short(disk._Ops):
        step = 7

        def write(self, descriptor, data):
            return super().write(descriptor, data[: self.step])

    monkeypatch.setattr(disk, "_ops", Short())
    save(tmp_path / "out", 1)
    assert snapshot(tmp_path / "out") == expected["old"]
    monkeypatch.setattr(Short, "step", 0)
    with pytest.raises(OutputWriteError, match=r"took no more bytes; check the folder"):
        save(tmp_path / "other", 1)


def test_a_folder_that_cannot_be_synced_is_fine_where_there_is_no_such_call(tmp_path, monkeypatch, expected):
    class NoFolderSync(disk._Ops):
        def fsync(self, descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(disk, "_ops", NoFolderSync())
    save(tmp_path / "out", 1)
    assert snapshot(tmp_path / "out") == expected["old"]


def test_exchange_falls_back_or_reports(tmp_path):
    ops = disk._Ops()
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="No such file"):
        ops.exchange(tmp_path / "a", tmp_path / "absent")


def test_a_file_that_is_written_in_any_order_is_there_once_it_is_sealed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    ops = shimmed(monkeypatch)
    real = ops.write_at
    # a file system may take a part
    ops.write_at = lambda descriptor, data, offset: real(descriptor, data[:3], offset)
    with disk.new_file(path, 10) as file:
        file.write_at(memoryview(b"56789"), 5)
        file.write_at(memoryview(b""), 7)
        file.write_at(memoryview(b"01234"), 0)
        assert file.seal() == {"size": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()}
    assert path.read_bytes() == b"0123456789"
    assert ops.calls == ["open", "allocate", *["write_at"] * 4, "fsync", "close"]


def test_a_file_that_is_not_sealed_is_removed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with disk.new_file(path, 10) as file:
        file.write_at(memoryview(b"0123456789"), 0)
        assert path.exists()
    assert not path.exists()

    def fail_late():
        with disk.new_file(path, 10) as file:
            file.write_at(memoryview(b"0123456789"), 0)
            file.seal()
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        fail_late()
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(OutputWriteError, match="File exists"), disk.new_file(path, 10):
        pass
    assert path.read_text() == "mine"


def test_a_file_system_that_takes_nothing_or_gives_less_back_is_an_error(tmp_path, monkeypatch):
    ops = shimmed(monkeypatch)
    ops.allocate = lambda *_: os_error(errno.EOPNOTSUPP)()
    path = tmp_path / "file"

    def write():
        with disk.new_file(path, 10) as file:
            file.write_at(memoryview(b"12345"), 0)
            file.seal()

    with pytest.raises(OutputWriteError, match="the file is shorter than"):
        write()
    ops.write_at = lambda *_: 0
    with pytest.raises(OutputWriteError, match="took no more bytes"):
        write()
    assert not path.exists()


def test_a_file_that_resists_removal_is_named(tmp_path, monkeypatch, caplog):
    ops = shimmed(monkeypatch)
    ops.unlink = lambda _: os_error(errno.EROFS)()
    with disk.new_file(tmp_path / "file", 10):
        pass
    assert "file could not be removed (Read-only file system); the next run tries again" in caplog.text
