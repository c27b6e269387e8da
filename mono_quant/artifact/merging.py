"""One card out of two: the one that is there, with what its owner wrote, and ours of a new model.

Of the owner's lines and metadata nothing gets lost, and the card that comes out is true. Where both cannot be, it is said why, and
the caller writes nothing.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mono_quant.artifact.card_text import CardText, split
from mono_quant.artifact.cards import (
    CardFacts,
    as_list,
    contradictions,
    lint,
    metadata,
    render_lines,
    stated,
)
from mono_quant.io.hub.metadata import MAX_CARD_BYTES, edit_metadata, parse_metadata
from mono_quant.sources.origin import Origin

# a tuple: an owner may have put a list among the tags, and no set can be asked for one
_TAGS = ("mono_quant", "int8", "w8a8", "fp16")
_EDITED = "the lines between the marks of mono_quant were changed; put your own above or below them"


@dataclass(frozen=True)
class Merged:
    """A card, and what stands against it.

    Attributes:
        text: the card.
        problems: one line for each contradiction, or for what would get lost; empty when it may be written.
    """

    text: str
    problems: tuple[str, ...] = ()


def merge_card(there: bytes | None, earlier: Origin | None, ours: str, facts: CardFacts) -> Merged:
    """Put our card in the place of one that is there already.

    Args:
        there: the card of the place, with whatever its owner wrote; None when there is none.
        earlier: origin of the model that an earlier save or push of ours left there; None when that is not known.
        ours: the card to put there: as `render` wrote it, or edited in the folder that it comes from.
        facts: of the model that comes.

    Returns:
        Our card, where it takes nothing away. Else the card that is there with our part written anew (see `renew`).
    """
    if there is None:
        return Merged(ours)
    try:
        text = decode_card(there)
    except ValueError as e:
        return Merged(ours, (str(e),))
    stale = {} if earlier is None else stated(earlier, facts.repo_id)
    words = lost_words(text, ours, stale)
    if not words:
        return Merged(ours)
    renewed = renew(text, facts, stale)
    if renewed.problems:
        return renewed
    own = lost_words(ours, renewed.text, stated(facts.origin, facts.repo_id))
    if own:
        return Merged(ours, (f"ours lacks {', '.join(words[:3])}, and it lacks {', '.join(own[:3])}",))
    return renewed


def foresee(
    there: bytes | None, earlier: Origin | None, origin: Origin, repo_id: str | None
) -> tuple[str, ...]:
    """Name what will stand against a merge, as far as that can be known before the model is made.

    Args:
        there, earlier: as for `merge_card`.
        origin: of the model that will be made.
        repo_id: the place; None for a folder.
    """
    try:
        data = parse_metadata(split(decode_card(there or b"")).yaml)
    except ValueError as e:
        return (f"its metadata cannot be read: {e}",)
    expected, stale = stated(origin, repo_id), {} if earlier is None else stated(earlier, repo_id)
    claimed = {
        name: value
        for name, value in data.items()
        if name != "library_name" and value is not None and not _is_same(value, stale.get(name))
    }
    known = {name: value for name, value in expected.items() if name in claimed}
    return tuple(contradictions(claimed, known, origin.repo_id is None))


def decode_card(data: bytes) -> str:
    """Return the text of a card that somebody else wrote.

    Raises:
        ValueError: it is no text, or longer than a card is.
    """
    if len(data) > MAX_CARD_BYTES:
        raise ValueError(f"it is longer than {MAX_CARD_BYTES} bytes, which no card needs")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8 text ({e.reason} at byte {e.start})") from None


def renew(text: str, facts: CardFacts, stale: Mapping[str, Any]) -> Merged:
    """Write our part of a card anew and keep the rest.

    A card that is true stays as it is. Our lines are replaced where they are; on a card that has none they go below. Metadata that
    it lacks is added.

    Args:
        text: the card.
        facts: of the model.
        stale: metadata that we wrote of the model it speaks of now, which gives way.
    """
    problems = tuple(lint(text, facts))
    parts = split(text)
    try:
        data = parse_metadata(parts.yaml)
    except ValueError:
        return Merged(text, problems)
    if not problems:
        return Merged(text)
    if not parts.ours and (parts.is_marked or "mono_quant" in as_list(data.get("tags"))):
        # nobody can tell which of our lines are still meant
        return Merged(text, (_EDITED, *problems))
    # a byte order mark is none behind the metadata
    above, end = parts.above.removeprefix("\ufeff"), _line_end(parts)
    lines = render_lines(facts).replace("\n", end)
    body = f"{above}{lines}{parts.below}" if parts.ours else f"{above.rstrip()}{end}{end}{lines}{end}"
    renewed = _front(parts, data, facts, stale) + body
    return Merged(renewed, tuple(lint(renewed, facts)))


def lost_words(there: str, new: str, stale: Mapping[str, Any]) -> list[str]:
    """Name what the owner wrote on a card and a new one lacks: metadata and lines.

    Args:
        there: the card.
        new: the one to put in its place.
        stale: metadata of `there` that we wrote.
    """
    old = split(there)
    lines = [*old.above.splitlines(), *old.below.splitlines()]
    kept = {line.strip() for line in new.splitlines()} | {""}
    found = [f"the line {line.strip()[:80]!r}" for line in lines if line.strip() not in kept]
    try:
        data, given = parse_metadata(old.yaml), parse_metadata(split(new).yaml)
    except ValueError as e:
        return [f"metadata that cannot be read ({e})", *found]
    for name, value in data.items():
        if name == "tags":
            gone = [tag for tag in as_list(value) if tag not in as_list(given.get(name))]
            found += [f"the tag {tag!r}" for tag in gone if not (old.is_marked and tag in _TAGS)]
        elif not (name == "library_name" and old.is_marked) and not any(
            _is_same(value, other) for other in (None, given.get(name), stale.get(name))
        ):
            found.append(f"{name}: {str(value)[:80]!r}")
    return found


def _front(parts: CardText, data: Mapping[str, Any], facts: CardFacts, stale: Mapping[str, Any]) -> str:
    """Return the metadata of a card between its fences, with ours in it."""
    expected = metadata(facts).to_dict()
    changes: dict[str, Any] = {
        name: value
        for name, value in expected.items()
        if not _is_same(data.get(name), value)
        and (
            any(_is_same(data.get(name), other) for other in (None, stale.get(name)))
            or (name == "library_name" and parts.is_marked)
        )
    }
    changes |= {
        name: None
        for name, value in stale.items()
        if name not in expected and name in data and _is_same(data[name], value)
    }
    tags = _tags(as_list(data.get("tags")), expected["tags"], ours=_TAGS if parts.is_marked else ())
    if tags != data.get("tags"):
        changes["tags"] = tags
    if not changes:
        return parts.opening + parts.yaml + parts.closing
    end = _line_end(parts)
    fence = f"---{end}"
    yaml = edit_metadata(parts.yaml, changes)
    if end == "\r\n":
        yaml = yaml.replace("\r\n", "\n").replace("\n", "\r\n")
    return (parts.opening or fence) + yaml + (parts.closing or fence)


def _line_end(parts: CardText) -> str:
    """Return the line end of a card's owner."""
    return "\r\n" if "\r\n" in parts.opening + parts.above + parts.below else "\n"


def _tags(there: Iterable[Any], wanted: list[str], ours: Collection[str]) -> list[Any]:
    kept = [tag for tag in there if tag in wanted or tag not in ours]
    return kept + [tag for tag in wanted if tag not in kept]


def _is_same(one: Any, other: Any) -> bool:
    return as_list(one) == as_list(other)
