"""Parameters that stand for values which are not in memory: whoever computes with one gets the values, read just then."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What is known of a tensor without its values.
_FACTS = frozenset({
    *(
        getattr(Tensor, name).__get__
        for name in (
            "dtype", "device", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mkldnn", "is_mps",
            "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_xla", "is_xpu", "itemsize", "layout", "nbytes",
            "ndim", "requires_grad", "retains_grad", "shape", "_version",
        )
    ),
    Tensor.__len__, Tensor.dim, Tensor.element_size, Tensor.get_device, Tensor.is_complex, Tensor.is_contiguous, Tensor.is_floating_point,
    Tensor.is_inference, Tensor.is_signed, Tensor.nelement, Tensor.numel, Tensor.size, Tensor.stride, Tensor.storage_offset,
    torch.is_complex, torch.is_floating_point, torch.is_inference, torch.numel,
})  # fmt: skip
# What would be wrong as soon as it is known: the values go where they came from.
_PLACES = frozenset({Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage})


class Elsewhere(Tensor):
    """A parameter whose values are in a file; it has its dtype, shape and strides, and says that it is on the CPU.

    Parts of a stack of matrices, and rows of a table, are read alone where only they are asked for.

    Attributes:
        whole: reads all of it.
        rows: reads a part of it along its first dimension; None where that costs as much as the whole.
    """

    _is_param = True
    # it is not one piece of memory
    __tensor_flatten__ = None

    whole: Callable[[], Tensor]
    rows: Callable[[int, int], Tensor] | None

    @staticmethod
    def like(
        tensor: Tensor, whole: Callable[[], Tensor], rows: Callable[[int, int], Tensor] | None
    ) -> "Elsewhere":
        """Return what stands for a parameter.

        Args:
            tensor: like it, on meta.
            whole, rows: see the attributes; functions, so that nobody looks through them at what they read from.
        """
        made: Elsewhere = Tensor._make_wrapper_subclass(
            Elsewhere,
            tensor.shape,
            tensor.stride(),
            dtype=tensor.dtype,
            device=torch.device("cpu"),
            requires_grad=tensor.requires_grad,
        )
        vars(made).update(vars(tensor))
        made.whole, made.rows = whole, rows
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` on values that are read for it."""
        named = dict(kwargs or {})
        if func in _FACTS:
            return super().__torch_function__(func, types, args, named)  # type: ignore[no-untyped-call]
        if func in _PLACES:
            raise RuntimeError(f"{func.__name__} was asked of a weight that is not in memory")
        if func in _IN_PARTS:
            found = _IN_PARTS[func](*args, **named)
            if found is not None:
                return found
        return func(*_here(args), **_here(named))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: whoever comes here did not ask `__torch_function__`, and would compute with nothing."""
        raise RuntimeError(f"{func} met a weight that is not in memory")


# what torch calls it where a call fails: that error is quoted, and is the one of a model in memory
Elsewhere.__name__ = nn.Parameter.__name__


def _here(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.whole()
    if type(value) in (tuple, list):
        return type(value)(_here(item) for item in value)
    return {key: _here(item) for key, item in value.items()} if type(value) is dict else value


def _item(weight: Any, place: Any) -> Tensor | None:
    """Return one matrix of a stack."""
    is_scalar = isinstance(place, int) or (isinstance(place, Tensor) and _is_index(place))
    if not isinstance(weight, Elsewhere) or weight.rows is None or weight.dim() < 3 or not is_scalar:
        return None
    index = int(place)
    index += len(weight) if index < 0 else 0
    return weight.rows(index, index + 1)[0] if 0 <= index < len(weight) else None


def _is_index(place: Tensor) -> bool:
    return place.dim() == 0 and not place.is_floating_point() and place.dtype != torch.bool


def _turned(weight: Any, a: int, b: int) -> Tensor | None:
    """Return a stack of matrices with rows for columns."""
    if (
        not isinstance(weight, Elsewhere)
        or weight.rows is None
        or {a % weight.dim(), b % weight.dim()} != {1, 2}
    ):
        return None
    whole, rows = weight.whole, weight.rows
    turned = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta").transpose(
        1, 2
    )
    return Elsewhere.like(turned, lambda: whole().transpose(1, 2), lambda i, j: rows(i, j).transpose(1, 2))


def _looked_up(
    input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: Any = None, *_: Any, **__: Any
) -> Tensor | None:
    """Return rows of a table."""
    if not isinstance(weight, Elsewhere) or weight.rows is None or max_norm is not None or not input.numel():
        return None
    ids, places = torch.unique(input, return_inverse=True)
    if int(ids[0]) < 0 or int(ids[-1]) >= len(weight):
        return None
    rows = weight.rows
    found = torch.cat([rows(i, i + 1) for i in ids.tolist()])
    return F.embedding(places, found)


def _grouped(
    input: Tensor, weight: Any, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor | None:
    """Return the products of groups of rows with one matrix of a stack each, one matrix at a time."""
    if not isinstance(weight, Elsewhere) or weight.rows is None or weight.dim() != 3 or input.dim() != 2:
        return None
    if offs is None or bias is not None or not int(offs[-1]):
        return None
    out, start = None, 0
    for index, stop in enumerate(offs.tolist()):
        if start < stop:
            count = offs.new_tensor([stop - start])
            made = torch._grouped_mm(
                input[start:stop], weight.rows(index, index + 1), offs=count, out_dtype=out_dtype
            )
            if out is None:
                # rows may be padded; those behind the last group are left open, as there
                out = torch.empty_strided((len(input), made.shape[1]), made.stride(), dtype=made.dtype)
            out[start:stop] = made
        start = stop
    return out


def _moved(weight: Any, *where: Any, **more: Any) -> Tensor | None:
    """Return the parameter itself where it is what it would become."""
    asked = {
        value
        for value in (*where, *more.values())
        if not isinstance(value, Tensor) and value not in (None, False)
    }
    is_there = isinstance(weight, Elsewhere) and asked <= {weight.dtype, weight.device, "cpu"}
    return weight if is_there and not any(isinstance(value, Tensor) for value in where) else None


_IN_PARTS: Mapping[Callable[..., Any], Callable[..., Tensor | None]] = {
    Tensor.__getitem__: _item,
    Tensor.to: _moved,
    Tensor.transpose: _turned,
    torch.transpose: _turned,
    F.embedding: _looked_up,
    **({torch._grouped_mm: _grouped} if hasattr(torch, "_grouped_mm") else {}),
}
