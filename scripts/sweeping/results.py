"""The results as JSON lines that a later run goes on from, and as tables."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sweeping.findings import FAULT, NOT_BUILT, REFUSED, WORKS
from sweeping.pool import Record

Key = tuple[str, str, str]


def key_of(record: Mapping[str, Any]) -> Key:
    """Return class, dtype and dtype of the source."""
    return record["class"], record["dtype"], record["source"]


def read(path: Path) -> dict[Key, Record]:
    """Return the newest record of every class and dtype."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {key_of(record): record for record in map(json.loads, lines)}


def to_line(record: Mapping[str, Any]) -> str:
    """Return one record as one line of the file."""
    return json.dumps(record, ensure_ascii=False)


def line(record: Mapping[str, Any]) -> str:
    """Return one record as one line for a terminal."""
    first = next(
        (f"{check}: {text}" for verdict, check, text in record["entries"] if verdict == record["verdict"]), ""
    )
    head = f"{record['verdict']:<13} {record['dtype']:<4} {record['class']:<50} {record['seconds']:6.1f} s"
    return f"{head}  {first[:160]}".rstrip()


def summary(records: Iterable[Record]) -> Iterator[str]:
    """Yield the tables: how many of each verdict, then each group of equal findings with its classes."""
    records = list(records)
    built = [r for r in records if r["verdict"] != NOT_BUILT]
    yield from _counts(built)
    not_run = sorted({r["class"] for r in built if any(n.startswith("not run") for n in r["notes"])})
    if not_run:
        yield f"\n{len(not_run)} classes were built but not run, because no inputs were found: {', '.join(not_run)}"
    for verdict in (NOT_BUILT, REFUSED, FAULT):
        yield from _groups(records, verdict)


def _counts(records: list[Record]) -> Iterator[str]:
    yield f"{'':<6}{WORKS:>10}{REFUSED:>16}{FAULT:>10}{'classes':>10}"
    for dtype in sorted({r["dtype"] for r in records}):
        of = [r for r in records if r["dtype"] == dtype]
        count = Counter(r["verdict"] for r in of)
        yield f"{dtype:<6}{count[WORKS]:>10}{count[REFUSED]:>16}{count[FAULT]:>10}{len(of):>10}"


def _groups(records: list[Record], verdict: str) -> Iterator[str]:
    groups: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for record in records:
        for found, check, text in record["entries"]:
            if found == verdict:
                who = record["class"] if verdict == NOT_BUILT else f"{record['class']} {record['dtype']}"
                groups[check, _kind(text)].setdefault(who, text)
    if groups:
        yield f"\n== {verdict}: {len({w.split()[0] for g in groups.values() for w in g})} classes"
    for (check, _), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        yield f"\n{len(members)} x {check}: {next(iter(members.values()))[:300]}"
        yield f"    {', '.join(members)}"


def _kind(text: str) -> str:
    """Cut away what differs between classes that have the same fault."""
    text = re.sub(r"/[^\s:;,]+", "<path>", text.split(";", maxsplit=1)[0])
    text = re.sub(r"\b\w+(\.\w+)+\b", "<name>", re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", text))
    return re.sub(r"\b[A-Z]\w*(For[A-Z]\w+|Model|Encoder|Decoder|Backbone)\b", "<class>", text)[:120]
