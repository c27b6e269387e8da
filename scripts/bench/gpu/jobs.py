"""A process and what it started, ended together."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class Job:
    """A command that runs in a process group of its own.

    Args:
        command: to run.
        environment: on top of this process's.
        log: file for its output, which is this process's when not given.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None
    ) -> None:
        more = {**os.environ, **environment}
        if log is None:
            self._process = subprocess.Popen(command, env=more, start_new_session=True)
            return
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, env=more, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
            )

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None for a command that was not done in time; what is left of it is ended."""
        try:
            return self._process.wait(max(0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            # compilers, and kernels that hang
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
