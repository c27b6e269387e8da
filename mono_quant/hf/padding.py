"""Encoders of sentence-transformers run a batch of texts of unlike length in parts, so that little is computed for padding.

sentence-transformers sorts texts by their characters and pads a batch to its longest text: of mixed texts a third of what a model then
computes is padding, which pooling leaves out. An encoder is called for parts of like length instead, and its outputs are put together;
behind a part there are zeros. What is no padding keeps its bits: our layers and our attention give a token of a text the same
bits in every batch. (MPNet and DeBERTa write their attention out; torch gives theirs other last bits in batches of other sizes.)
"""

import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mono_quant import kernels
from mono_quant.convert.stored import StoredModule

# What another call of the model costs, in tokens: measured with MiniLM on texts that people wrote (scripts/benchmark.py sentences).
_CALL_COST = 64
# One text alone would be another graph to a compiler, and a sequence of one token is computed as a step of generation.
_FEWEST_TEXTS, _FEWEST_TOKENS = 2, 2
# Attention that hides what the mask hides, but is written out; otherwise the class says so itself.
_WRITTEN_OUT = frozenset({"mpnet", "deberta", "deberta-v2"})

_TRANSFORMER = "Transformer"
# What may lie behind it: modules of the library that look at no token beside another one, or at those that the mask shows.
_BY_TOKEN = frozenset({
    "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "Router", "SpladePooling", "SparseAutoEncoder", "LogitScore", "TiedTranspose",
})  # fmt: skip
# Whose modules may lie within those.
_PLAIN = frozenset({"torch", "mono_quant", "transformers"})

Part = tuple[Tensor, int]


def wrap_() -> None:
    """Let every encoder run in parts, where its transformer is a converted one."""
    from sentence_transformers.base.model import BaseModel

    if "__call__" not in vars(BaseModel):
        BaseModel.__call__ = in_parts(BaseModel.__call__)


def in_parts(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls an encoder for the parts of a batch."""

    @functools.wraps(call)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        told = len(args) == 1 and not any(isinstance(option, Tensor) for option in options.values())
        parts = _parts_for(self, args[0]) if told else None
        if parts is None:
            return call(self, *args, **options)
        (features,) = args
        outs = [call(self, _cut(features, *part), **options) for part in parts]
        features.update(_joined(features, parts, outs))
        return features

    return run


def parts_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return how to part a batch such that what is computed is least, padding and calls included.

    Args:
        lengths: of the texts in tokens, the longest first; of two texts at least.

    Returns:
        First text and the one behind the last, for each part.
    """
    count = len(lengths)
    least: list[float] = [0.0, *[float("inf")] * count]
    start = [0] * (count + 1)
    for end in range(1, count + 1):
        for i in range(end - _FEWEST_TEXTS + 1):
            cost = least[i] + (end - i) * lengths[i] + _CALL_COST
            if cost < least[end]:
                least[end], start[end] = cost, i
    parts = []
    while count:
        parts.append((start[count], count))
        count = start[count]
    return parts[::-1]


def _parts_for(model: Any, features: Any) -> list[Part] | None:
    """Return the texts of each part and its length in tokens; None where the batch runs as it is."""
    if not isinstance(features, MutableMapping) or kernels.is_watched() or model.training:
        return None
    mask, ids = features.get("attention_mask"), features.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or not mask.is_cpu or mask.dim() != 2:
        return None
    if any(isinstance(v, Tensor) and v.shape != mask.shape for v in features.values()):
        return None
    if len(mask) < 2 * _FEWEST_TEXTS or not _hides_padding(model):
        return None
    lengths = mask.sum(1, dtype=torch.long)
    order = lengths.argsort(descending=True, stable=True)
    ranked = [max(length, _FEWEST_TOKENS) for length in lengths[order].tolist()]
    parts = parts_of(ranked)
    if len(parts) < 2 or not _is_padded_behind(mask, lengths):
        return None
    return [(order[first:end], ranked[first]) for first, end in parts]


def _is_padded_behind(mask: Tensor, lengths: Tensor) -> bool:
    places = torch.arange(mask.shape[1])
    return bool(((places < lengths.unsqueeze(1)) == mask.bool()).all()) and bool((mask <= 1).all())


def _hides_padding(model: Any) -> bool:
    """Say whether no text sees its padding in this converted encoder, and its transformer is asked for the last states alone."""
    first, *behind = [*model.children()] or [None]
    core = getattr(first, "auto_model", None)
    config = getattr(core, "config", None)
    if type(first).__name__ != _TRANSFORMER or core is None or config is None:
        return False
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return False
    library = type(first).__module__.partition(".")[0]
    kinds = [type(m) for part in behind for m in part.modules()]
    if any(_sees_others(kind, library) for kind in kinds):
        return False
    hides = getattr(core, "_supports_sdpa", False) or config.model_type in _WRITTEN_OUT
    return bool(hides) and any(isinstance(layer, StoredModule) for layer in core.modules())


def _sees_others(kind: type, library: str) -> bool:
    """Say whether a module of this class behind the transformer may look beside its own text: of somebody's own, nobody knows."""
    origin = kind.__module__.partition(".")[0]
    return kind.__name__ not in _BY_TOKEN if origin == library else origin not in _PLAIN


def _cut(features: Mapping[str, Any], texts: Tensor, length: int) -> dict[str, Any]:
    return {
        name: given[texts, :length] if isinstance(given, Tensor) else given
        for name, given in features.items()
    }


def _joined(
    features: Mapping[str, Any], parts: Sequence[Part], outs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what the calls added, in the order of the texts; behind each part there are zeros."""
    count, longest = features["attention_mask"].shape
    joined: dict[str, Any] = {}
    for name, sample in outs[0].items():
        if name in features:
            continue
        if not isinstance(sample, Tensor):
            joined[name] = sample
            continue
        by_token = sample.dim() > 2
        whole = sample.new_zeros(
            count, *((longest,) if by_token else ()), *sample.shape[2 if by_token else 1 :]
        )
        for (texts, length), out in zip(parts, outs, strict=True):
            if by_token:
                whole[texts, :length] = out[name]
            else:
                whole[texts] = out[name]
        joined[name] = whole
    return joined
