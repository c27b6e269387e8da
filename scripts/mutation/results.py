"""The result of a run: as JSON, as a table, and as one word on whether it is good enough."""

import json
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mutation.mutants import Mutant
from mutation.verdicts import Verdict

WANTED = 0.9
EXPLAINED = Path(__file__).with_name("explained.toml")
Key = tuple[str, str, str]


class Result(NamedTuple):
    mutant: Mutant
    verdict: Verdict
    why: str

    @property
    def kind(self) -> str:
        return "explained" if self.why and not self.verdict.is_noticed else self.verdict.kind


def read_explained() -> dict[Key, str]:
    """Read why some mutants need not be noticed."""
    entries = tomllib.loads(EXPLAINED.read_text(encoding="utf-8")).get("mutant", [])
    return {(entry["file"], entry["removed"], entry["added"]): entry["why"] for entry in entries}


def read_noticed(path: Path) -> dict[Key, Verdict]:
    """Read the verdicts of an earlier run, without those that a better test could change."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    verdicts = {(e["file"], e["removed"], e["added"]): Verdict(**e["verdict"]) for e in entries}
    return {key: verdict for key, verdict in verdicts.items() if verdict.is_noticed}


def write(path: Path, results: list[Result]) -> None:
    entries = [
        {
            "file": result.mutant.file,
            "line": result.mutant.line,
            "removed": result.mutant.removed,
            "added": result.mutant.added,
            "verdict": result.verdict._asdict(),
            "why": result.why,
        }
        for result in results
    ]
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def table(results: list[Result]) -> str:
    """Lay the results out, survivors last, so that they are what is on the screen."""
    lines = []
    for result in sorted(results, key=lambda result: not result.verdict.is_noticed):
        lines.append(f"\n{result.kind:9} {result.mutant.place}  {result.verdict.by}")
        lines += [f"    - {line}" for line in result.mutant.removed.splitlines()]
        lines += [f"    + {line}" for line in result.mutant.added.splitlines()]
        lines += [f"    {result.why}"] if result.kind == "explained" else []
    return "\n".join(lines)


def conclude(results: list[Result], unreliable: list[str], say: Callable[[str], None]) -> int:
    """Say how many were noticed, and return the exit status."""
    counts = Counter(result.kind for result in results)
    noticed = sum(result.verdict.is_noticed for result in results)
    share = noticed / len(results)
    say(
        f"\n{noticed} of {len(results)} noticed ({share:.1%}): {', '.join(f'{n} {kind}' for kind, n in counts.items())}"
    )
    for test in unreliable:
        say(f"fails without a change as well, so what it noticed does not count: {test}")
    return int(share < WANTED or bool(counts["survived"] + counts["not run"] + len(unreliable)))
