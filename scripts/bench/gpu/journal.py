"""What a section has found so far: one line of JSON a row, on the disk before the next one is measured."""

import json
import time
import traceback
from pathlib import Path
from typing import Any

from bench.timing import Row

JOURNAL = "gpu.jsonl"
ERROR, SKIPPED = "error", "skipped"
# What no later measurement in this process could survive.
# A capture that fails is a "CUDA error", too, and is survived.
_FATAL = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
)
_LONGEST = 400


class Journal:
    """Rows of one section.

    Attributes:
        section: its name, which every row has.
        path: of the file that rows are appended to.
    """

    def __init__(self, section: str, path: Path, seconds: float) -> None:
        self.section, self.path = section, path
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds until this section is ended from outside."""
        return self._end - time.monotonic()

    def row(self, kind: str, **values: Any) -> Row:
        """Write a row, and print it."""
        row = {"section": self.section, "kind": kind, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
        print(f"  {kind}: " + " ".join(f"{k}={_short(v)}" for k, v in values.items()), flush=True)
        return row

    def error(self, where: str, problem: BaseException) -> None:
        """Write down that something could not be measured, and go on, unless the device is lost.

        Raises:
            SystemExit: it is.
        """
        text = f"{type(problem).__name__}: {problem}"
        if len(text) > _LONGEST:
            # compilers say what they did first and what was wrong last
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        frames = traceback.extract_tb(problem.__traceback__)[-4:]
        self.row(ERROR, where=where, what=text, at=[f"{Path(f.filename).name}:{f.lineno}" for f in frames])
        if any(sign in text for sign in _FATAL):
            raise SystemExit("the device's context is lost")

    def enough(self, where: str, seconds: float) -> bool:
        """Say whether there is time for what takes about `seconds`; write it down if not."""
        if self.left() >= seconds:
            return True
        self.row(SKIPPED, where=where, what=f"{self.left():.0f} s left, {seconds:.0f} needed")
        return False


def read(path: Path) -> list[Row]:
    """Return the rows that are whole: the last line of a process that was killed may not be."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
