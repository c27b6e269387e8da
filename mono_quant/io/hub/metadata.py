"""What a model card says about licence, language, data and task, whoever wrote it."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

logger = logging.getLogger(__name__)

MAX_CARD_BYTES = 32 * 2**20


def card_fields(card: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "pipeline_tag": text_of(card.get("pipeline_tag")),
        "license": text_of(card.get("license")),
        "license_name": text_of(card.get("license_name")),
        "license_link": text_of(card.get("license_link")),
        "language": _texts(card.get("language")),
        "datasets": _texts(card.get("datasets")),
        "extra_gated": {key: value for key, value in card.items() if key.startswith("extra_gated_")},
    }


def local_card(readme: Path) -> dict[str, Any]:
    """Read what the card of a local folder says about licence, language, data and task.

    Args:
        readme: its README.md; it may be missing or without metadata.

    Returns:
        The fields of `RepoFacts` that a card fills; empty ones when the card cannot be read.
    """
    return card_fields(read_card(readme))


def read_card(readme: Path) -> Mapping[str, Any]:
    """Return the metadata of a card on the disk; nothing of a card that cannot be read."""
    card: Any = {}
    if readme.is_file() and readme.stat().st_size <= MAX_CARD_BYTES:
        try:
            card = metadata_load(readme)
            # dates, sets, loops and multiplied aliases are no metadata of a card
            for count, _ in enumerate(json.JSONEncoder(allow_nan=False).iterencode(card)):
                if count > 100_000:
                    raise ValueError("too long")
        except (ValueError, TypeError, RecursionError, YAMLError, OSError):
            logger.warning("%s: its metadata cannot be read, so no licence is copied from it", readme)
            card = {}
    return card if isinstance(card, Mapping) else {}


def text_of(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, str))
