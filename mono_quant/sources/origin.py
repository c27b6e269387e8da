"""Where a model came from: what its card, its manifest and its files say about that."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mono_quant.errors import CorruptCheckpointError
from mono_quant.io.hub.metadata import NO_CARD, CardMetadata

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_SHA = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STORED = re.compile(r"[a-z0-9 (),]{0,80}")
_CARD = tuple(entry.name for entry in fields(CardMetadata))
# Options of `quantize` that a source may need to be read again.
_ACCESS = ("allow_pickle", "trust_remote_code")


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and what its own card says about it.

    Attributes:
        name: class of the model.
        repo_id, sha: canonical Hub id and commit; None for anything local.
        private, gated: as the Hub said; None when that is not known.
        card: metadata of the source's card.
        files: sha256 of the weight files of a local folder, by name.
        access: what reading it needed: `allow_pickle`, `trust_remote_code`.
        stored: what its weights were where they were no floats, such as `fp8 (e4m3, blocks of 128 x 128)`; empty for floats.
    """

    name: str
    repo_id: str | None = None
    sha: str | None = None
    private: bool | None = None
    gated: bool | None = None
    card: CardMetadata = NO_CARD
    files: Mapping[str, str] = field(default_factory=dict)
    access: tuple[str, ...] = ()
    stored: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives back an equal origin."""
        data = {**asdict(self), **asdict(self.card)}
        del data["card"]
        if not self.stored:
            del data["stored"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Origin":
        """Rebuild an origin from `to_dict`; what it says ends up in cards and code, so it is checked.

        Raises:
            CorruptCheckpointError: a field has the wrong type or form.
        """
        terms = data.get("extra_gated")
        card = CardMetadata.of({**data, **(terms if isinstance(terms, Mapping) else {})})
        try:
            own = {k: v for k, v in data.items() if k not in _CARD}
            origin = cls(**{**own, "card": card, "access": tuple(data.get("access", ()))})
        except TypeError as e:
            raise CorruptCheckpointError(
                f"the manifest describes the source in an unknown way ({e}); save again"
            ) from e
        strange = [(k, data[k]) for k, v in origin.to_dict().items() if k in _CARD and data.get(k, v) != v]
        for key, value in [*strange, *origin._strange()]:
            raise CorruptCheckpointError(
                f"the manifest says that {key} of the source is {str(value)[:80]!r}, which cannot be; save again"
            )
        return origin

    def _strange(self) -> list[tuple[str, object]]:
        found: list[tuple[str, object]] = []
        for key, value, pattern in (("repo_id", self.repo_id, _REPO_ID), ("sha", self.sha, _SHA)):
            if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
                found.append((key, value))
        if not isinstance(self.name, str):
            found.append(("name", self.name))
        if not isinstance(self.stored, str) or not _STORED.fullmatch(self.stored):
            found.append(("stored", self.stored))
        found += [("access", a) for a in self.access if a not in _ACCESS]
        found += [
            ("files", h) for h in self.files.values() if not (isinstance(h, str) and _SHA256.fullmatch(h))
        ]
        return found
