"""Which tensors of a checkpoint the tensors of its result are made of."""

from bisect import bisect
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from mono_quant.convert.int8_layers import tensors_of
from mono_quant.errors import UnsupportedModelError
from mono_quant.hf.models import built_buffers
from mono_quant.hf.names import Placement, place
from mono_quant.hf.state import checkpoint_state
from mono_quant.planning.walk import is_transformers_model
from mono_quant.sources.source import Source
from mono_quant.stream.layout import Origin, Part
from mono_quant.stream.spec import Piece
from mono_quant.stream.supply import Supply
from mono_quant.stream.twins import are_equal

# A tensor that no file holds is computed by its class, and small: masks, positions.
MAX_CONSTANT_BYTES = 1 << 24


def find_origins(
    source: Source, pieces: Mapping[str, Piece], names: set[str], codes: Container[str]
) -> dict[str, Origin]:
    """Return what each tensor of a result is made of, by its name in the file; not what has no answer.

    A result has the names of its checkpoint, of whose tensors a model may have made others: merged, split, renamed.

    Args:
        source: with a skeleton in it that nothing has changed.
        pieces: where the tensors of the checkpoint lie, by name.
        names: of the tensors of the result, without scales.
        codes: names in the model of the weights that become int8.
    """
    core, within = source.subject.core, source.subject.core_name
    prefix = f"{within}." if within else ""
    owners: dict[str, list[str]] = {}
    for name, keys in source.placed.sources.items():
        for key in keys:
            owners.setdefault(key, []).append(name)
    shapes = {name: tuple(t.shape) for name, t in core.state_dict(keep_vars=True).items()}
    found: dict[str, Origin] = {}
    for key, held in owners.items():
        name = held[0]
        keys = source.placed.sources[name]
        if f"{prefix}{name}" not in codes or _has_rows(source.placed, name, shapes[name], pieces[key].shape):
            found[key] = Origin((Part(f"{prefix}{name}", keys.index(key), pieces[key]),))
    shared = {key: held for key, held in owners.items() if len(held) > 1}
    found |= _split(core, prefix, shared, source.placed.sources, pieces) if shared else {}
    if names <= found.keys():
        return found
    return _renamed(source, prefix, pieces, codes) | found


def check_twins(source: Source, pieces: Mapping[str, Piece], supply: Supply) -> None:
    """Refuse a checkpoint with different values for what its config makes one tensor: the result could hold but one of them.

    Args:
        source: with a skeleton in it.
        pieces: where the tensors of the checkpoint lie, by name.
        supply: of their files, of which those are read that hold such a tensor twice.

    Raises:
        UnsupportedModelError: naming two that differ.
    """
    held: dict[int, str] = {}
    sources = source.placed.sources
    for name, tensor in source.subject.core.named_parameters(remove_duplicate=False):
        keys = sources.get(name, ())
        first = held.setdefault(id(tensor), name) if keys else name
        others = sources[first] if keys else ()
        if keys == others or (
            len(keys) == len(others)
            and all(are_equal(pieces[a], pieces[b], supply) for a, b in zip(others, keys, strict=True))
        ):
            continue
        raise UnsupportedModelError(
            f"{type(source.subject.core).__name__} cannot be saved: {first} and {name} differ in the checkpoint, and its config.json "
            f"makes them one. Set tie_word_embeddings to false there, or take one of them out"
        )


def _has_rows(placed: Placement, name: str, shape: tuple[int, ...], held: tuple[int, ...]) -> bool:
    """Tell whether the rows of a tensor of a checkpoint are rows of the tensor in the model that it is a part of."""
    if name in placed.reordered:
        return False
    return held == shape or (len(placed.sources[name]) > 1 and held[-1:] == shape[-1:])


def _split(
    core: nn.Module,
    prefix: str,
    owners: Mapping[str, Sequence[str]],
    sources: Mapping[str, Sequence[str]],
    pieces: Mapping[str, Piece],
) -> dict[str, Origin]:
    """Return the origins of tensors that a model has in several parts, by letting transformers split the numbers of their rows.

    Args:
        core: the model.
        prefix: of its names in the whole.
        owners: the names in the model of what has parts of a tensor, by the name of that in the checkpoint.
        sources: the names in the checkpoint of what a tensor is made of, by its name in the model.
        pieces: where the tensors of the checkpoint lie.
    """
    keys = sorted({key for held in owners.values() for name in held for key in sources[name]})
    # a number between two tensors is nobody's, so that no run goes from one into the next
    firsts = dict(zip(keys, accumulate((_count(pieces[k]) + 1 for k in keys), initial=0), strict=False))
    numbers = {key: _numbers(pieces[key].shape, firsts[key]) for key in keys}
    found: dict[str, list[Part]] = {key: [] for key in keys}
    origins = {}
    for name, tensor in place(core, numbers).tensors.items():
        if tensor.dim() > 1 and tensor.shape[-1] != 1:
            continue
        runs = [
            (keys[bisect(keys, first, key=firsts.__getitem__) - 1], first, count)
            for first, count in _runs(tensor.flatten().tolist())
        ]
        if not all(_begins_a_block(pieces[key], first - firsts[key]) for key, first, _ in runs):
            continue
        own = []
        for number, (key, first, count) in enumerate(runs):
            own.append(Part(f"{prefix}{name}", number, _rows(pieces[key], first - firsts[key], count)))
            found[key].append(own[-1])
        origins[name] = Origin(tuple(own))
    for key, parts in found.items():
        ordered = tuple(sorted(parts, key=lambda part: part.piece.start))
        if sum(part.piece.nbytes for part in ordered) == pieces[key].nbytes:
            origins[key] = Origin(ordered)
    return origins


def _count(piece: Piece) -> int:
    return piece.shape[0] if piece.shape else 1


def _numbers(shape: tuple[int, ...], first: int) -> Tensor:
    rows = shape[0] if shape else 1
    return torch.arange(first, first + rows).reshape(rows, *(1 for _ in shape[1:]))


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and length of every run of numbers that follow each other."""
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def _rows(piece: Piece, first: int, count: int) -> Piece:
    """Return where some rows of a tensor lie."""
    row = piece.nbytes // max(1, piece.shape[0])
    return piece._replace(
        start=piece.start + first * row,
        shape=(count, *piece.shape[1:]),
        nbytes=count * row,
        inverse=None if piece.inverse is None else _scales_of(piece, piece.inverse, first, count),
    )


def _scales_of(piece: Piece, inverse: Piece, first: int, count: int) -> Piece:
    """Return where the scales of some rows of a block-quantized weight lie."""
    # of several matrices, a row is one of them
    height = piece.block[0] if len(piece.shape) == 2 else 1
    return _rows(inverse, first // height, -(-(first + count) // height) - first // height)


def _begins_a_block(piece: Piece, row: int) -> bool:
    """Tell whether scales of a block-quantized weight begin with a row; so they do where all rows have the same."""
    if piece.inverse is None or len(piece.shape) != 2 or piece.inverse.shape[0] == 1:
        return True
    return row % piece.block[0] == 0


def _renamed(
    source: Source, prefix: str, pieces: Mapping[str, Piece], codes: Container[str]
) -> dict[str, Origin]:
    """Return the origins of tensors whose names in a result are not those of the checkpoint, and of what the class computes."""
    core = source.subject.core
    # a storage keeps its Python object, and views have that of their tensor
    by_storage = {id(tensor.untyped_storage()): name for name, tensor in core.state_dict().items()}
    state = checkpoint_state(core) if is_transformers_model(core) else tensors_of(core)
    found, computed = {}, {}
    for name, tensor in state.items():
        own = by_storage.get(id(tensor.untyped_storage()))
        keys = source.placed.sources.get(own, ()) if own is not None else ()
        if own is not None and len(keys) == 1:
            shape = pieces[keys[0]].shape
            if f"{prefix}{own}" not in codes or _has_rows(source.placed, own, tuple(tensor.shape), shape):
                found[name] = Origin((Part(f"{prefix}{own}", 0, pieces[keys[0]]),))
        elif own is not None and not keys and tensor.nbytes <= MAX_CONSTANT_BYTES:
            computed[name] = own
    if computed and is_transformers_model(core):
        buffers = built_buffers(core, set(computed.values()))
        for name, own in computed.items():
            if own in buffers:
                value = buffers[own].to(state[name].dtype).contiguous()
                found[name] = Origin((), value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found
