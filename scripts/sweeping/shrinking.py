"""A small config of any architecture: sizes by the names of fields, layers by the kinds that a model mixes.

Everything that is a width becomes the same width, so that what has to agree still agrees; what a config computes from its
sizes is left to it.
"""

import re
from collections.abc import Mapping
from typing import Any

from sweeping.sizes import (
    DEPTHS,
    LAYERS,
    LIMITS,
    MISSING,
    NAMED,
    NARROWER,
    PLACES,
    PYRAMID,
    RULES,
    SHALLOW,
    STAGE_DEPTHS,
    STAGE_WIDTHS,
    STAGED,
    TOKEN,
    TOKENS,
)


def shrunk(config: Any, special: Mapping[str, Any]) -> Any:
    """Return a config of the same class with small sizes.

    Args:
        config: as its class makes it.
        special: fields of this architecture that the rules do not get right; a dotted name is a field of a sub-config.
    """
    return _shrunk(config, special, {})


def _shrunk(config: Any, special: Mapping[str, Any], tokens: dict[int, int]) -> Any:
    from transformers import PreTrainedConfig  # noqa: PLC0415

    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    shape = _Shape(fields)
    changes: dict[str, Any] = shape.outlets(getattr(config, "_out_indices", None))
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            below = {k.removeprefix(f"{name}."): v for k, v in special.items() if k.startswith(f"{name}.")}
            changes[name] = _shrunk(value, below, tokens)
        elif TOKEN.fullmatch(name):
            changes[name] = _token(value, tokens)
        else:
            changes[name] = shape.field(name, value)
    changes = {k: v for k, v in changes.items() if isinstance(v, PreTrainedConfig) or v != fields.get(k)}
    differing = config.to_diff_dict()
    kept = {k: v for k, v in fields.items() if k in differing and isinstance(v, (str, int, float))}
    own = {k: v for k, v in special.items() if "." not in k}
    return type(config)(**{**kept, **changes, **own})


class _Shape:
    """What the fields of one config say about its layers and stages, and what each becomes."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.layers = next((v for k in DEPTHS if isinstance(v := fields.get(k), int) and v > 0), 0)
        self.rows = self._rows()
        # widths of a pyramid are products of one number and the stage, and have to stay so
        self.is_pyramid = any(isinstance(fields.get(name), (list, tuple)) for name in STAGED)

    def field(self, name: str, value: Any) -> Any:
        """Return the small value of a field."""
        if value is None and self.fields.get("num_attention_heads"):
            return MISSING.get(name)
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self._number(name, value)
        if isinstance(value, (list, tuple)) and value:
            return self._list(name, value)
        return value

    def outlets(self, indices: Any) -> dict[str, Any]:
        """Return the stages that a backbone hands out: those of a pyramid, or its last layers."""
        if not indices:
            return {}
        if self.is_pyramid or not self.layers:
            return {"out_indices": list(indices)}
        return {"out_indices": list(range(1, len(self.rows) + 1))[-len(indices) :]}

    def _number(self, name: str, value: int) -> int:
        kind = next((kind for names, kind in RULES if re.fullmatch(names, name)), "as it is")
        if kind == "layers":
            return min(value, len(self.rows))
        if kind == "keys" and value == self.fields.get("num_attention_heads"):
            kind = "heads"
        if self.is_pyramid and kind in PYRAMID:
            return max(1, value // NARROWER) if kind == "width" else min(value, PYRAMID[kind])
        return min(value, LIMITS[kind] if isinstance(kind, str) else kind)

    def _list(self, name: str, value: Any) -> Any:
        numbers = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if numbers and PLACES.fullmatch(name) and not self.is_pyramid:
            return type(value)(range(len(self.rows)))[-len(value) :]
        if len(value) == self.layers and self.layers > LAYERS:
            is_range = list(value) == list(range(self.layers))
            return type(value)(range(len(self.rows)) if is_range else (value[i] for i in self.rows))
        if numbers and STAGE_DEPTHS.fullmatch(name):
            return type(value)(min(v, SHALLOW) for v in value)
        if numbers and STAGE_WIDTHS.fullmatch(name):
            return type(value)(v // NARROWER if v > 16 else v for v in value)
        return value

    def _rows(self) -> list[int]:
        """Choose the layers to keep: at least two, one of each kind, and as many as are named one by one."""
        if not self.layers:
            return list(range(LAYERS))
        lists = [v for v in self.fields.values() if isinstance(v, (list, tuple)) and len(v) == self.layers]
        # where every layer has a value of its own, the values tell no kinds
        lists = [v for v in lists if len(set(map(str, v))) < self.layers]
        kinds: dict[Any, int] = {}
        for i in range(self.layers):
            kinds.setdefault(tuple(str(v[i]) for v in lists), i)
        named = [
            len(v) for k, v in self.fields.items() if isinstance(v, (list, tuple)) and NAMED.fullmatch(k)
        ]
        count = min(self.layers, max([LAYERS, len(kinds), *(n for n in named if n <= 8)]))
        first = sorted(kinds.values())
        others = [i for i in range(self.layers) if i not in first]
        return sorted(first + others[: count - len(first)])


def _token(value: Any, tokens: dict[int, int]) -> Any:
    """Give large token ids small ones, the same for the same id."""
    if isinstance(value, (list, tuple)):
        return type(value)(_token(v, tokens) for v in value)
    if isinstance(value, int) and value >= TOKENS // 2:
        return tokens.setdefault(value, TOKENS - 1 - len(tokens))
    return value
