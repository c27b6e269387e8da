"""Running a model, and comparing what comes out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sweeping.inputs import Inputs, copied

# The outputs that say most about a model, in this order; else the first that is floating.
_TELLING = ("logits", "last_hidden_state", "prediction_logits", "logits_per_image", "start_logits")


def run(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Return every floating tensor of one forward pass by its place in the output; floats go in as the model has them."""
    own = [p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.int8]
    dtype = torch.float32 if torch.float32 in own or not own else own[0]
    given = {k: v.to(dtype) if _is_float(v) else v for k, v in copied(inputs).items()}
    torch.manual_seed(0)  # some draw noise or masks as they run
    with torch.no_grad():
        return {name: t.detach().clone() for name, t in _tensors(model(**given)) if _is_float(t)}


def telling(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the output to measure errors of."""
    whole = {name: t for name, t in outputs.items() if t.numel() > 1}
    for name in (*_TELLING, *whole):
        if name in whole:
            return whole[name]
    return None


def error_of(reference: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> float:
    """Return ||y - r|| / ||r|| of the telling output; infinity for another shape, or values that are newly not finite."""
    r, y = telling(reference), telling(outputs)
    if r is None or y is None:
        return 0.0
    if r.shape != y.shape:
        return float("inf")
    r, y = r.double(), y.double()
    finite = torch.isfinite(r)
    if not bool(torch.isfinite(y[finite]).all()):
        return float("inf")
    norm = float(r[finite].norm())
    return float((y[finite] - r[finite]).norm()) / norm if norm else 0.0


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Name what is not equal bit for bit, with the largest relative difference."""
    lines = [f"only one side has {name}" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        if a[name].dtype != b[name].dtype:
            lines.append(f"{name} is {_short(a[name])}, then {_short(b[name])}")
        elif a[name].shape != b[name].shape:
            lines.append(f"{name} is {tuple(a[name].shape)}, then {tuple(b[name].shape)}")
        elif not same_bits(a[name], b[name]):
            lines.append(f"{name} is off by {_relative(a[name], b[name]):.1e}")
    return lines


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True for tensors of the same dtype, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    norm = float(a.norm())
    return float((a - b).norm()) / norm if norm else float((a - b).norm())


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place or "output", value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _tensors(below, f"{place}.{key}".lstrip("."))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, below in enumerate(value):
            yield from _tensors(below, f"{place}.{i}".lstrip("."))
