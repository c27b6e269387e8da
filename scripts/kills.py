"""A conversion from files to files that is killed, refused and shared in every way there is; tiny, with real processes.

    scripts/kills [--moments N] [--only operations|refusals|moments|torchrun|full]

After each of them the target is absent or complete, the same command ends the work with the same bytes, and nothing is left:

- operations: SIGKILL before and after every operation on the disk; refusals: every one of them refused with EIO and ENOSPC, before
  and after it took effect, and interrupted.
- moments: SIGKILL at N random moments, again and again until the work is done.
- torchrun: 2 and 4 ranks; one rank killed at its first shard; all of them at a random moment.
- full: a tmpfs (where one may be mounted) that fills up while shards are written, with an older result in it.
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import stream_runs
from folders import ShimOps, os_error, snapshot

from mono_quant.errors import MonoQuantError, OutputExistsError, OutputWriteError
from mono_quant.io.disk import disk


def kill() -> None:
    """End this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """Stand for Ctrl-C."""
    raise KeyboardInterrupt


def left(base: Path) -> list[str]:
    """Return what lies beside the source, but for the notes of workers."""
    names = [path.name for path in base.iterdir() if not path.name.startswith(("did.", "end."))]
    return sorted(names)


def fork(work: Callable[[], object]) -> int:
    """Begin something in another process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def wait(process: int) -> int:
    """Return the exit code of a process; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Kills:
    """The sweeps, in a folder of their own.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0
        base = self.fresh()
        stream_runs.stream(base)
        self.whole = snapshot(base / "out")
        found = {name: data for name, data in self.whole.items() if name.endswith(".safetensors")}
        assert found == stream_runs.expected()

    def fresh(self) -> Path:
        """Return a new folder with a source."""
        self.count += 1
        base = self.root / f"{self.count}"
        stream_runs.prepare(base)
        return base

    def end(self, base: Path, where: object) -> None:
        """Give the same command again, and compare."""
        assert snapshot(base / "out") in (None, self.whole), where
        try:
            stream_runs.stream(base)
        except OutputExistsError:
            assert (base / "out").exists(), where
        self.check(base, where)

    def check(self, base: Path, where: object) -> None:
        """Compare what is there with what a run gives that nobody disturbed."""
        assert snapshot(base / "out") == self.whole, where
        assert left(base) == ["out", "source"], (where, left(base))
        shutil.rmtree(base)

    def shimmed(self, **options: object) -> ShimOps:
        """Let the k-th operation go wrong."""
        ops = disk._ops = ShimOps(**options)  # noqa: SLF001  the place for it
        return ops

    def total(self) -> int:
        """Count the operations of a run."""
        ops = self.shimmed()
        self.end(self.fresh(), "count")
        return ops.count

    def operations(self) -> str:
        """Kill before and after every operation."""
        total = self.total()
        for k in range(1, total + 1):
            for after in (False, True):
                base = self.fresh()
                self.shimmed(fail_at=k, error=kill, after=after)
                assert wait(fork(lambda base=base: stream_runs.stream(base))) == -signal.SIGKILL, (k, after)
                self.shimmed()
                self.end(base, (k, after))
        return f"killed before and after each of {total} operations"

    def refusals(self) -> str:
        """Refuse every operation."""
        total = self.total()
        errors = {"EIO": os_error(errno.EIO), "ENOSPC": os_error(errno.ENOSPC), "interrupt": interrupt}
        for k in range(1, total + 1):
            for name, error in errors.items():
                for after in (False, True):
                    base = self.fresh()
                    ops = self.shimmed(fail_at=k, error=error, after=after)
                    where = (k, name, after)
                    try:
                        stream_runs.stream(base)
                    except (OutputWriteError, KeyboardInterrupt):
                        pass
                    else:
                        assert ops.calls[k - 1] in ("remove_tree", "rmdir"), (*where, ops.calls[k - 1])
                    self.shimmed()
                    self.end(base, where)
        return f"refused in six ways at each of {total} operations"

    def moments(self, count: int) -> str:
        """Kill at random moments until the work is done, for as many kills as asked."""
        self.shimmed()
        kills = runs = 0
        draw = random.Random(0)
        while kills < count:
            base, runs = self.fresh(), runs + 1
            while not (base / "out").exists():
                process = fork(lambda base=base: stream_runs.stream(base))
                time.sleep(draw.random() * 0.12)
                os.kill(process, signal.SIGKILL)
                kills += wait(process) == -signal.SIGKILL
                assert snapshot(base / "out") in (None, self.whole), kills
            self.end(base, kills)
        return f"{kills} kills at random moments of {runs} runs"

    def torchrun(self) -> str:
        """Share the work, and kill ranks."""
        self.shimmed()
        said = []
        for world in (2, 4):
            base = self.fresh()
            done = _torchrun(base, world, PAUSE="0.02")
            assert done.wait(180) == 0
            ends = sorted(path.read_text() for path in base.glob("end.*"))
            assert ends == ["left"] * (world - 1) + ["published"], ends
            self.check(base, world)
            base = self.fresh()
            code = _torchrun(base, world, DIE="1", PAUSE="0.1").wait(180)
            assert (code != 0) == (base / "did.1").exists(), (
                code
            )  # unless it came when nothing was left to do
            # those that have a record: a rank may be stopped between the rename of a file and its line
            finished = _recorded(base)
            if not (base / "out").exists():
                for path in base.glob("did.*"):
                    path.unlink()
                assert _torchrun(base, world).wait(180) == 0
                again = {file for path in base.glob("did.*") for file in path.read_text().split()}
                assert not again & set(finished), (again, finished)
            self.check(base, (world, "killed"))
            said.append(f"{world} ranks; one killed with {len(finished)} shards finished")
        base = self.fresh()
        launched = _torchrun(base, 2, PAUSE="0.3")
        while not list(base.glob(".out.mq-stream/*.safetensors")):
            time.sleep(0.05)
        os.killpg(launched.pid, signal.SIGKILL)
        launched.wait()
        time.sleep(0.5)
        self.end(base, "all killed")
        return "; ".join([*said, "all killed, ended by one process"])

    def full(self) -> str:
        """Fill a small disk while it is written."""
        self.shimmed()
        mount = self.root / "small"
        mount.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], check=False).returncode:
            return "no tmpfs may be mounted here"
        try:
            stream_runs.prepare(mount)
            stream_runs.stream(mount, shards=stream_runs.SHARDS[:1])
            before = snapshot(mount / "out")

            def fill(plan: object, supply: object, target: Path, told: object) -> object:
                if plan == stream_runs.plan()[2]:
                    with (mount / "filler").open("wb", buffering=0) as file, suppress(OSError):
                        while True:
                            file.write(bytes(1 << 12))
                return stream_runs.convert(plan, supply, target)

            try:
                stream_runs.stream(mount, overwrite=True, convert=fill)
                raise AssertionError("a full disk was no error")
            except OutputWriteError as error:
                text, notes = str(error), error.__notes__
            assert "No space left" in text and "available" in text and "same command" in notes[0], text
            assert snapshot(mount / "out") == before
            try:
                stream_runs.stream(mount, overwrite=True)
                raise AssertionError("a full disk was no error")
            except MonoQuantError as error:
                refused = str(error)
            assert snapshot(mount / "out") == before
            (mount / "filler").unlink()
            did: list[str] = []

            def rest(plan: object, supply: object, target: Path, told: object) -> object:
                did.append(plan.file)
                return stream_runs.convert(plan, supply, target)

            stream_runs.stream(mount, overwrite=True, convert=rest)
            assert did == [plan.file for plan in stream_runs.plan()[2:]], did
            assert snapshot(mount / "out") == self.whole and left(mount) == ["out", "source"]
        finally:
            subprocess.run(["umount", mount], check=True)
        return f"{text} | {refused}"


def _recorded(base: Path) -> list[str]:
    lines = [
        line
        for p in base.glob(".out.mq-stream/records.*")
        for line in p.read_text().splitlines(keepends=True)
    ]
    return [json.loads(line)["record"]["file"] for line in lines if line.endswith("\n")]


def _torchrun(base: Path, world: int, **more: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    script = str(Path(stream_runs.__file__).resolve())
    environment: Mapping[str, str] = {**os.environ, **more}
    # ranks start sessions of their own with the launcher's, so that one signal reaches all of them
    return subprocess.Popen(
        [*command, script, str(base)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main() -> None:
    """Run what was asked for, and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=100, help="kills at random moments")
    parser.add_argument("--only", choices=("operations", "refusals", "moments", "torchrun", "full"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mono_quant-kills-") as root:
        kills = Kills(Path(root))
        sweeps: Mapping[str, Callable[[], str]] = {
            "operations": kills.operations,
            "refusals": kills.refusals,
            "moments": lambda: kills.moments(asked.moments),
            "torchrun": kills.torchrun,
            "full": kills.full,
        }
        for name, sweep in sweeps.items():
            if asked.only in (None, name):
                start = time.monotonic()
                print(f"{name}: {sweep()} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
