"""The real conversion of a small checkpoint in several files, killed, refused and shared in every way there is, by real processes.

    scripts/kill_streams [--moments N] [--only operations|refusals|moments|torchrun|full]

After each of them the folder is absent, or the older one, or complete; the same command ends the work with the same bytes, and
nothing else is left:

- operations: SIGKILL before and after every operation on the disk, into a new folder and over an older one; refusals: each of
  them refused with EIO and ENOSPC.
- moments: SIGKILL at N moments spread over the whole of a run, over an older folder in every second one.
- torchrun: 2 and 4 workers; one of them killed in the middle; all of them; and values in one file that change the plan of all.
- full: a tmpfs (where one may be mounted) that is full at every point of the work, with an older result in it.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import real_streams
from folders import ShimOps, os_error, snapshot

from mono_quant.errors import MonoQuantError, OutputExistsError, OutputWriteError
from mono_quant.io.disk import disk

Snapshot = dict[str, bytes] | None


def kill() -> None:
    """End this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def fork(work: Callable[[], object]) -> int:
    """Begin something in another process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            with suppress(MonoQuantError):
                work()
                code = 0
        finally:
            os._exit(code)
    return process


def wait(process: int) -> int:
    """Return the exit code of a process; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Runs:
    """The sweeps, in a folder of their own.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = real_streams.prepare(root / "source")
        self.wide = real_streams.prepare(root / "wide", wide=True)
        self.count = 0
        # a result in one file, of other options: every file of it differs
        self.older = root / "older"
        real_streams.stream(self.source, self.older, max_shard_size="5GB", skip="*.q_proj")
        self.old = snapshot(self.older)
        self.whole = {folder: self._uninterrupted(folder) for folder in (self.source, self.wide)}

    def _uninterrupted(self, source: Path) -> Snapshot:
        real_streams.stream(source, self.root / "whole" / "out")
        found = snapshot(self.root / "whole" / "out")
        shutil.rmtree(self.root / "whole")
        return found

    def fresh(self, *, replaces: bool = False) -> Path:
        """Return where a result shall be: nothing is there, or an older one."""
        self.count += 1
        base = self.root / f"{self.count}"
        base.mkdir()
        if replaces:
            shutil.copytree(self.older, base / "out")
        return base / "out"

    def run(self, out: Path, source: Path | None = None) -> object:
        """Give the command."""
        return real_streams.stream(source or self.source, out, overwrite=self._replaces(out))

    def _replaces(self, out: Path) -> bool:
        return snapshot(out) == self.old

    def assert_untouched(self, out: Path, where: object, *, replaces: bool) -> None:
        """Prove that a run that was ended left the folder as it was, or complete."""
        found = snapshot(out)
        assert found in ((self.old if replaces else None), self.whole[self.source]), where

    def end(self, out: Path, where: object, source: Path | None = None) -> None:
        """Give the same command again, and compare with what an undisturbed run gives."""
        with suppress(OutputExistsError):  # it was complete
            self.run(out, source)
        assert snapshot(out) == self.whole[source or self.source], where
        left = sorted(path.name for path in out.parent.iterdir())
        assert left == ["out"], (where, left)
        shutil.rmtree(out.parent)

    def shimmed(self, **options: object) -> ShimOps:
        """Let the k-th operation go wrong."""
        ops = disk._ops = ShimOps(**options)  # noqa: SLF001  the place for it
        return ops

    def total(self, *, replaces: bool) -> int:
        """Count the operations of a run."""
        ops = self.shimmed()
        self.end(self.fresh(replaces=replaces), "count")
        return ops.count

    def operations(self) -> str:
        """Kill before and after every operation."""
        totals = []
        for replaces in (False, True):
            totals.append(self.total(replaces=replaces))
            for k in range(1, totals[-1] + 1):
                for after in (False, True):
                    out, where = self.fresh(replaces=replaces), (k, after, replaces)
                    self.shimmed(fail_at=k, error=kill, after=after)
                    assert wait(fork(lambda out=out: self.run(out))) == -signal.SIGKILL, where
                    self.shimmed()
                    self.assert_untouched(out, where, replaces=replaces)
                    self.end(out, where)
        return f"killed before and after each of {totals[0]} operations, and {totals[1]} over an older folder"

    def refusals(self) -> str:
        """Refuse every operation; a typed error comes out, and what was there stays."""
        count, passed = 0, set[str]()
        for replaces in (False, True):
            for k in range(1, self.total(replaces=replaces) + 1):
                for code in (errno.EIO, errno.ENOSPC):
                    out, where = self.fresh(replaces=replaces), (k, code, replaces)
                    ops = self.shimmed(fail_at=k, error=os_error(code))
                    count += 1
                    try:
                        self.run(out)
                    except OutputWriteError:
                        pass
                    else:
                        passed.add(ops.calls[k - 1])
                    self.shimmed()
                    self.assert_untouched(out, where, replaces=replaces)
                    self.end(out, where)
        assert passed <= {"remove_tree", "rmdir", "unlink"}, passed
        return f"{count} refusals; without an error only {', '.join(sorted(passed)) or 'none'}"

    def moments(self, count: int) -> str:
        """Kill at moments that are spread over the whole of a run, and then end it."""
        self.shimmed()
        start = time.monotonic()
        self.end(self.fresh(), "timing")
        seconds = time.monotonic() - start
        draw, killed, finished = random.Random(0), 0, 0
        while killed < count:
            replaces = killed % 2 == 1
            out = self.fresh(replaces=replaces)
            process = fork(lambda out=out: self.run(out))
            time.sleep(draw.random() * seconds)
            os.kill(process, signal.SIGKILL)
            killed += wait(process) == -signal.SIGKILL
            self.assert_untouched(out, killed, replaces=replaces)
            finished += snapshot(out) == self.whole[self.source]
            self.end(out, killed)
        return f"{killed} kills in runs of {seconds:.2f} s, of which {finished} had published"

    def torchrun(self) -> str:
        """Share the work, and kill workers."""
        self.shimmed()
        said = []
        for world in (2, 4):
            for source in (self.source, self.wide):
                out = self.fresh()
                launched = launch(source, out, world)
                assert launched.wait(300) == 0, (world, source)
                words = sorted((launched.stdout or sys.stdin).read().decode().split())  # type: ignore[union-attr]
                assert words == ["left"] * (world - 1) + ["published"], words
                self.end(out, world, source)
            out = self.fresh()
            launched = launch(self.source, out, world)
            victim = worker_at_work(launched.pid, out)
            os.kill(victim, signal.SIGKILL)
            code = launched.wait(300)
            had_ended = snapshot(out) == self.whole[self.source]
            said.append(
                f"{world} workers, one killed: exit {code}, {'published' if had_ended else 'not published'}"
            )
            if not had_ended:
                assert launch(self.source, out, world).wait(300) == 0
            self.end(out, (world, "killed"))
        out = self.fresh()
        launched = launch(self.source, out, 2)
        worker_at_work(launched.pid, out)
        os.killpg(launched.pid, signal.SIGKILL)
        launched.wait()
        time.sleep(0.5)
        self.end(out, "all killed")
        return "; ".join([*said, "all killed, ended by one process"])

    def full(self) -> str:
        """Have a small disk full at every point of the work."""
        self.shimmed()
        mount = self.root / "small"
        mount.mkdir()
        options = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
        if subprocess.run(options, check=False, capture_output=True).returncode:
            return "no tmpfs may be mounted here"
        refused, texts = 0, set[str]()
        try:
            for spare in range(0, 600_000, 20_000):
                out = mount / "out"
                shutil.copytree(self.older, out)
                facts = os.statvfs(mount)
                with (mount / "filler").open("wb") as file:
                    file.write(bytes(max(0, facts.f_bavail * facts.f_frsize - spare)))
                try:
                    real_streams.stream(self.source, out, overwrite=True)
                except OutputWriteError as error:
                    refused += 1
                    texts.add(str(error).partition(":")[2].partition(";")[0][:40])
                    assert snapshot(out) == self.old, spare
                    (mount / "filler").unlink()
                    real_streams.stream(self.source, out, overwrite=True)
                else:
                    (mount / "filler").unlink()
                assert snapshot(out) == self.whole[self.source], spare
                assert sorted(path.name for path in mount.iterdir()) == ["out"], spare
                shutil.rmtree(out)
        finally:
            subprocess.run(["umount", str(mount)], check=True)
        return f"{refused} of 30 sizes of free room were too small, with a typed error: {sorted(texts)}"


def launch(source: Path, out: Path, world: int) -> "subprocess.Popen[bytes]":
    """Begin the command under torchrun; its process group is its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    script = str(Path(real_streams.__file__).resolve())
    return subprocess.Popen(
        [*command, script, str(source), str(out), json.dumps({"overwrite": False})],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def worker_at_work(launcher: int, out: Path) -> int:
    """Return a worker, once a first shard is finished."""
    while not list(out.parent.glob(".out.mq-stream/*.safetensors")):
        time.sleep(0.005)
    path = next(iter(sorted(out.parent.glob(".out.mq-stream/worker.*.lock"), reverse=True)))
    return int(json.loads(path.read_text().splitlines()[-1])[2])


def main() -> None:
    """Run what was asked for, and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=100, help="kills at random moments")
    parser.add_argument("--only", choices=("operations", "refusals", "moments", "torchrun", "full"))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="mono_quant-kills-") as root:
        runs = Runs(Path(root))
        sweeps: Mapping[str, Callable[[], str]] = {
            "operations": runs.operations,
            "refusals": runs.refusals,
            "moments": lambda: runs.moments(asked.moments),
            "torchrun": runs.torchrun,
            "full": runs.full,
        }
        for name, sweep in sweeps.items():
            if asked.only in (None, name):
                start = time.monotonic()
                print(f"{name}: {sweep()} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
