"""A card as text: whose lines are whose.

What mono_quant writes stands between two marks, and the last mark proves that nobody changed it since. Everything else
is its owner's.
"""

import hashlib
import re
from dataclasses import dataclass

from mono_quant.io.hub.metadata import split_metadata

BEGIN = "<!-- mono_quant begins: every save and push writes these lines anew, and keeps what you write above and below -->"
_BEGIN = re.compile(r"^<!-- mono_quant begins\b[^\n]*-->[ \t]*\r?$", re.MULTILINE)
_END = re.compile(r"^<!-- mono_quant ends: sha256 ([0-9a-f]{16}) -->[ \t]*(?=\r?$)", re.MULTILINE)


@dataclass(frozen=True)
class CardText:
    """A card in parts; together they are the text, character for character.

    Attributes:
        opening, yaml, closing: the metadata between its fences; empty when the card has none.
        above: what its owner wrote before our lines, or the whole body when none of it is ours.
        ours: the lines of mono_quant with their marks; empty when there are none, or somebody changed them.
        below: what its owner wrote after them.
        is_marked: it has a mark of ours, perhaps one that no longer fits.
    """

    opening: str
    yaml: str
    closing: str
    above: str
    ours: str
    below: str
    is_marked: bool


def mark(lines: str) -> str:
    """Set our lines between the marks."""
    return f"{BEGIN}\n\n{lines}\n\n<!-- mono_quant ends: sha256 {_sum(lines)} -->"


def split(text: str) -> CardText:
    """Take a card apart."""
    opening, yaml, closing, body = split_metadata(text)
    begins, ends = list(_BEGIN.finditer(body)), list(_END.finditer(body))
    above, ours, below = body, "", ""
    if len(begins) == len(ends) == 1 and begins[0].end() < ends[0].start():
        first, last = begins[0], ends[0]
        if _sum(body[first.end() : last.start()]) == last[1]:
            above, ours, below = body[: first.start()], body[first.start() : last.end()], body[last.end() :]
    return CardText(opening, yaml, closing, above, ours, below, bool(begins or ends))


def _sum(lines: str) -> str:
    # an editor on the Web may change line ends and cut blanks
    plain = "\n".join(line.rstrip() for line in lines.strip().splitlines())
    return hashlib.sha256(plain.encode()).hexdigest()[:16]
