"""What a model card says in its metadata, whoever wrote it."""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import yaml

logger = logging.getLogger(__name__)

MAX_CARD_BYTES = 4 * 2**20
# A card with ten thousand numbers of a benchmark has about a tenth of this.
_MAX_VALUES = 1_000_000
_FRONT = re.compile(r"\A(\ufeff?\s*---[ \t]*\r?\n)((?:[^\n]*\n)*?)(---[ \t]*(?:\r?\n|\Z))")


@dataclass(frozen=True)
class CardMetadata:
    """What the metadata of a card says about licence, language, data and task.

    Attributes:
        license, license_name, license_link: terms.
        language, datasets: of the training.
        pipeline_tag: task, such as `text-generation`.
        extra_gated: the `extra_gated_*` entries, which a gated repository shows before it gives access.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    extra_gated: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "CardMetadata":
        """Take the fields from a card's metadata; what has another type than it should is left out."""
        return cls(
            license=text_of(data.get("license")),
            license_name=text_of(data.get("license_name")),
            license_link=text_of(data.get("license_link")),
            language=_texts(data.get("language")),
            datasets=_texts(data.get("datasets")),
            pipeline_tag=text_of(data.get("pipeline_tag")),
            extra_gated={k: v for k, v in data.items() if k.startswith("extra_gated_")},
        )


NO_CARD = CardMetadata()


def local_card(readme: Path) -> CardMetadata:
    """Read what the card of a local folder says.

    Args:
        readme: its README.md; it may be missing or without metadata.

    Returns:
        Its metadata; empty when the card cannot be read.
    """
    return CardMetadata.of(read_card(readme))


def read_card(readme: Path) -> Mapping[str, Any]:
    """Return the metadata of a card on the disk; nothing of a card that cannot be read."""
    try:
        if not readme.is_file() or readme.stat().st_size > MAX_CARD_BYTES:
            return {}
        return parse_metadata(split_metadata(readme.read_text(encoding="utf-8"))[1])
    except (ValueError, OSError):
        logger.warning("%s: its metadata cannot be read, so no licence is copied from it", readme)
        return {}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads a date as the text that it is, as the Hub does."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def split_metadata(text: str) -> tuple[str, str, str, str]:
    """Return the opening fence, the YAML, the closing fence and the rest of a card; the first three are empty without metadata."""
    front = _FRONT.match(text)
    return (front[1], front[2], front[3], text[front.end() :]) if front else ("", "", "", text)


def parse_metadata(text: str) -> dict[str, Any]:
    """Read the YAML of a card.

    Args:
        text: without its fences.

    Raises:
        ValueError: it is no list of names and plain values, or it loops or multiplies itself.
    """
    try:
        data = yaml.load(text, Loader=_Loader) or {}
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise ValueError("it is no list of 'name: value'")
        for count, _ in enumerate(json.JSONEncoder(allow_nan=False).iterencode(data)):
            if count > _MAX_VALUES:
                raise ValueError("it is too long")
    except (yaml.YAMLError, TypeError, RecursionError) as e:
        raise ValueError(" ".join(str(e).split())) from e
    return data


def edit_metadata(text: str, changes: Mapping[str, Any]) -> str:
    """Change a few entries of a card's YAML, and leave every other character as it is.

    Args:
        text: without its fences.
        changes: new values by name; None takes an entry out.

    Returns:
        The YAML. Where the text has a form that cannot be edited in place (one line in braces, anchors), it is written anew. A
        comment that has no place in it any more stands above it.

    Raises:
        ValueError: the text cannot be read.
    """
    data = parse_metadata(text)
    wanted = {k: v for k, v in {**data, **changes}.items() if k not in changes or v is not None}
    edited = _edited_in_place(text, changes)
    try:
        fits = parse_metadata(edited) == wanted
    except ValueError:
        fits = False
    edited = edited if fits else _dump(wanted)
    lost = Counter(_comments(text)) - Counter(_comments(edited))
    return "".join(f"{comment}\n" for comment in lost.elements()) + edited


def _comments(text: str) -> list[str]:
    """Return the comments of a YAML: what starts with # between two tokens."""
    tokens = list(yaml.scan(text, Loader=_Loader))
    gaps = [text[a.end_mark.index : b.start_mark.index] for a, b in pairwise(tokens)]
    return [comment.rstrip() for gap in gaps for comment in re.findall(r"#[^\r\n]*", gap)]


def _edited_in_place(text: str, changes: Mapping[str, Any]) -> str:
    root = yaml.compose(text, Loader=_Loader)
    nodes = {} if root is None else {k.value: v for k, v in root.value}
    spans = {} if root is None else {k.value: (k.start_mark.index, _end(v, text)) for k, v in root.value}
    for name, (start, stop) in sorted(spans.items(), key=lambda item: -item[1][0]):
        if name in changes and (items := _with_items(text, nodes[name], changes[name])) is not None:
            text = items
        elif name in changes and changes[name] is not None:
            text = text[:start] + _dump({name: changes[name]}).rstrip("\n") + text[stop:]
        elif name in changes:
            text = text[:start] + text[stop:].lstrip(" \t\r").removeprefix("\n")
    added = {k: v for k, v in changes.items() if k not in spans and v is not None}
    if not added:
        return text
    return (text if not text or text.endswith("\n") else f"{text}\n") + _dump(added)


def _with_items(text: str, node: Any, wanted: Any) -> str | None:
    """Take words out of a list with one a line, and add others below: each that stays keeps its comment. None for another list."""
    if not isinstance(node, yaml.SequenceNode) or node.flow_style or not isinstance(wanted, list):
        return None
    there = [item.value for item in node.value]
    kept = [word for word in there if word in wanted]
    if not kept or wanted[: len(kept)] != kept:
        return None
    stop = _line_stop(text, _end(node, text))
    added = [f"\n{' ' * node.start_mark.column}{_dump([word]).rstrip()}" for word in wanted[len(kept) :]]
    text = text[:stop] + "".join(added) + text[stop:]
    for item in reversed(node.value):
        if item.value not in wanted:
            start = text.rfind("\n", 0, item.start_mark.index)
            text = text[: max(start, 0)] + text[_line_stop(text, _end(item, text)) :]
    return text


def _line_stop(text: str, index: int) -> int:
    stop = text.find("\n", index)
    return len(text) if stop < 0 else stop


def _end(node: Any, text: str) -> int:
    """Return where a value ends; the mark of the library lies behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last, text)
    return len(text[: node.end_mark.index].rstrip())


def _dump(data: dict[str, Any] | list[Any]) -> str:
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10**6)
    return text


def text_of(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, str))
