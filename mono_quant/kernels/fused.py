"""Products with what lies around them in a model, as one call each: what graphs call.

Plain functions on tensors. Where the native library can do it, a whole chain runs in blocks of tokens whose intermediate
values never leave the caches; on a device that has kernels of ours it is `device_chains`; anywhere else (gradients, other
dtypes, transforms, no library) the same call is the composition of torch's operations and `int8_linear`. A single product has the
bits of `int8_linear`; on a CPU a chain of a named scheme gives the same bits on every path, for any number of threads and any batch. From the
composition it differs by what float arithmetic in another order does, and by one code of an activation where a value lies next to
a tie of rounding.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from mono_quant.kernels import packs, pool
from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.choice import active, scheme_of
from mono_quant.kernels.composed import composed_chain, composed_norm
from mono_quant.kernels.cpu import Cpu, Packed
from mono_quant.kernels.device_chains import run_chain, runs_on_device
from mono_quant.kernels.inputs import FLOATS
from mono_quant.kernels.steps import Norm, Product, Steps, check_act
from mono_quant.kernels.watching import is_followed, wants_gradient

# The numbers by which the library knows them.
_ACT_NUMBERS: dict[str | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}
_NORMS = {"layer": 1, "rms": 2}
_NO_NORM = (0, 0, 0, 0.0)
_NO_PRODUCT = (0, 0, 0, 0, 0)
# The C struct `Chain`: path, threads, tokens, x, residual, out; two norms; activation; three products; a pointer that the
# library sets; five words for each part.
_HEADER = "=6q3qd3qd17q"
_records: dict[int, struct.Struct] = {}
# The largest code by scheme, row length and path, and whether its weights are worth packing.
_codes: dict[tuple[str, int, str], tuple[int, bool]] = {}


def chain(
    x: Tensor,
    first: Product,
    *,
    pre: Norm | None = None,
    act: str | None = None,
    gate: Product | None = None,
    second: Product | None = None,
    residual: Tensor | None = None,
    post: Norm | None = None,
) -> Tensor:
    """Apply norm `pre`, product `first`, an activation, product `second`, an addition and norm `post`; most are optional.

    Args:
        x: float [..., K].
        first: a product of the normed `x`.
        pre: a norm of `x`.
        act: "gelu", "gelu_tanh", "silu", "relu" or None.
        gate: a second product of the normed `x`; `act(gate) * first` takes the place of `act(first)`.
        second: a product of that.
        residual: float [..., N], added to the outputs of the last product.
        post: a norm of the sum.

    Returns:
        [..., N] in the dtype of `x`. Each row depends on that row of `x` and `residual` alone.

    Raises:
        ValueError: there is no such activation, norm or activation scheme.
        InputError: `x` is not floating point, or has another width.
        FrozenWeightError: a weight is not int8.
    """
    check_act(act)
    cpu = active.cpu
    if cpu is not None and _is_plain(x):
        out = native_chain(cpu, x, first, pre, act, gate, second, residual, post)
        if out is not None:
            return out
    steps = Steps(first, pre, act, gate, second)
    found = run_chain(x, steps)
    y = composed_chain(x, None, steps)[-1] if found is None else found[-1]
    y = y if residual is None else y + residual
    return y if post is None else composed_norm(y, post)


def chain_parts(x: Tensor, first: Product, *, pre: Norm | None = None) -> tuple[Tensor, ...]:
    """Apply norm `pre` and product `first`; return the outputs of each of its weights.

    Args:
        x: float [..., K].
        first: weights of [N_i, K].
        pre: a norm of `x`.

    Returns:
        One [..., N_i] for each weight: views of one tensor where the library ran.

    Raises:
        see `chain`.
    """
    return torch.split(chain(x, first, pre=pre), [weight.shape[0] for weight in first[0]], -1)


def chain_kept(
    x: Tensor,
    first: Product,
    *,
    pre: Norm,
    added: Tensor | None = None,
    keep: Sequence[str] = (),
    act: str | None = None,
    gate: Product | None = None,
    second: Product | None = None,
) -> tuple[Tensor, ...]:
    """Apply a chain to `x` or its sum with another tensor, and return with it what others need of its beginning.

    Args:
        x: float [..., K].
        first: a product of the normed sum.
        pre: a norm of the sum.
        added: like `x`.
        keep: "sum" (which takes something that is added), "normed", both or none.
        act, gate, second: as in `chain`.

    Returns:
        The sum and the normed values where they are kept, and the result: where nothing is done to the outputs of `first`,
        one for each of its weights.

    Raises:
        see `chain`.
    """
    check_act(act)
    steps = Steps(first, pre, act, gate, second)
    wanted = ["sum" in keep, "normed" in keep]
    found = run_chain(x, steps, added, *wanted)
    if found is None:
        *begun, out = composed_chain(x, added, steps)
        found = *(values for values, kept in zip(begun, wanted, strict=True) if kept), out
    if act is not None or gate is not None or second is not None:
        return found
    return *found[:-1], *torch.split(found[-1], [weight.shape[0] for weight in first[0]], -1)


def norm(x: Tensor, how: Norm, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Norm the last dimension of `x`, or of its sum with `residual`.

    Args:
        x: float [..., N].
        how: ("layer" or "rms", weight, bias, epsilon); an rms weight is used as it is.
        residual: like `x`.

    Returns:
        [..., N]; with a residual also the sum.

    Raises:
        ValueError: there is no such norm.
    """
    cpu = active.cpu
    if cpu is not None and _is_plain(x):
        found = native_norm(cpu, x, how, residual)
        if found is not None:
            return found
    if residual is None:
        return composed_norm(x, how)
    total = x + residual
    return composed_norm(total, how), total


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their places, halves of the last dimension with each other (Su et al., 2104.09864).

    Args:
        x: float [B, H, L, D], any strides.
        cos, sin: float [B or 1, L, D], the angles of each half.

    Returns:
        `x * cos + (-x2, x1) * sin` for the halves x1, x2 of `x`: [B, H, L, D], in memory as [B, L, H, D].
    """
    cpu = active.cpu
    if cpu is not None and _is_plain(x):
        out = native_rotary(cpu, x, cos, sin)
        if out is not None:
            return out
    low, high = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-high, low), -1) * sin.unsqueeze(1)


def is_fusable(x: Tensor) -> bool:
    """Say whether calls of this room are more than compositions for such a tensor, which may stand for one."""
    if runs_on_device(x):
        return x.dtype in FLOATS
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _is_plain(x: Tensor) -> bool:
    """Say whether `x` is what the kernels take and nobody looks on: no compiler, tracer, transform or mode."""
    return type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu and not is_followed()


def _dense(x: Tensor) -> Tensor:
    # a tensor marked as negated shares its memory with the positive one
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def native_chain(
    cpu: Cpu,
    x: Tensor,
    first: Product,
    pre: Norm | None,
    act: str | None,
    gate: Product | None,
    second: Product | None,
    residual: Tensor | None,
    post: Norm | None,
) -> Tensor | None:
    """Do what `chain` does by the library on `x`, which nobody else looks at; None where it has no answer."""
    shape = x.shape
    if torch.is_grad_enabled() and _chain_wants_gradient(x, first, pre, gate, second, residual, post):
        return None
    depth = shape[-1] if shape else 0
    parts: list[int] = []
    # packed weights that another thread may drop meanwhile
    held: list[Packed] = []
    one = _product_words(cpu, first, x, depth, parts, held)
    if one is None or depth == 0:
        return None
    other = _NO_PRODUCT if gate is None else _product_words(cpu, gate, x, depth, parts, held)
    two = _NO_PRODUCT if second is None else _product_words(cpu, second, x, one[1], parts, held)
    if other is None or two is None or (gate is not None and not _same_strips(first, gate, one, other)):
        return None
    width = two[1] if second is not None else one[1]
    before, after = _norm_words(pre, depth), _norm_words(post, width)
    if before is None or after is None or width == 0 or one[1] == 0:
        return None
    x = _dense(x)
    tokens = x.numel() // depth
    wanted = (*shape[:-1], width)
    out = pool.empty(wanted, x)
    term = 0
    if residual is not None:
        if residual.dtype is not torch.float32 or not residual.is_cpu or residual.shape != out.shape:
            return None
        residual = _dense(residual)
        term = residual.data_ptr()
    record = _records.get(len(parts)) or _record(len(parts))
    words = record.pack(
        cpu.isa, torch.get_num_threads(), tokens, x.data_ptr(), term, out.data_ptr(),
        *before, *after, _ACT_NUMBERS[act], *one, *other, *two, 0, *parts,
    )  # fmt: skip
    return None if cpu.chain(words) else out


def _chain_wants_gradient(
    x: Tensor,
    first: Product,
    pre: Norm | None,
    gate: Product | None,
    second: Product | None,
    residual: Tensor | None,
    post: Norm | None,
) -> bool:
    norms = [tensor for how in (pre, post) if how is not None for tensor in how[1:3]]
    biases = [bias for product in (first, gate, second) if product is not None for bias in product[2]]
    return wants_gradient(x, residual, *norms, *biases)


def _record(words: int) -> struct.Struct:
    return _records.setdefault(words, struct.Struct(f"{_HEADER}{words}q"))


def _same_strips(
    first: Product, gate: Product, one: tuple[int, int, int, int, int], other: tuple[int, int, int, int, int]
) -> bool:
    return one == other and all(a.shape == b.shape for a, b in zip(first[0], gate[0], strict=True))


def _product_words(
    cpu: Cpu, product: Product, x: Tensor, depth: int, parts: list[int], held: list[Packed]
) -> tuple[int, int, int, int, int] | None:
    """Return the C struct `Product` and append its parts; None where the library does not take it."""
    weights, scales, biases, activations = product
    scheme = scheme_of(activations, x)
    known = _codes.get((scheme.name, depth, cpu.path))
    qmax, narrow = known if known is not None else _learn_codes(cpu, scheme, depth)
    total = words = 0
    for weight, scale, bias in zip(weights, scales, biases, strict=True):
        rows, columns = weight.shape
        if (
            columns != depth
            or weight.dtype is not torch.int8
            or not weight.is_cpu
            or not weight.is_contiguous()
            or not _is_row(scale, rows)
            or not (bias is None or _is_row(bias, rows))
        ):
            return None
        place = weight.data_ptr()
        if narrow:
            packed = packs.find(cpu, weight, (place, rows, depth), scheme)
            if packed is None:
                words = 0
            else:
                held.append(packed)
                words = packed.words.data_ptr()
        parts += (place, words, scale.data_ptr(), 0 if bias is None else bias.data_ptr(), rows)
        total += rows
    return depth, total, qmax, scheme.group, len(weights)


def _learn_codes(cpu: Cpu, scheme: ActivationScheme, depth: int) -> tuple[int, bool]:
    known = scheme.widest_code(depth), packs.pays(cpu, scheme)
    return _codes.setdefault((scheme.name, depth, cpu.path), known)


def _is_row(values: Tensor, count: int) -> bool:
    """Say whether these are `count` fp32 values next to each other on the CPU."""
    return (
        values.dtype is torch.float32
        and values.numel() == count
        and values.is_contiguous()
        and values.is_cpu
        and not values.is_neg()
    )


def _norm_words(how: Norm | None, count: int) -> tuple[int, int, int, float] | None:
    """Return the C struct `Norm`, or None where the library does not take it."""
    if how is None:
        return _NO_NORM
    kind, weight, bias, epsilon = how
    number = _NORMS.get(kind, 0)
    if number == 0 or (weight is not None and not _is_row(weight, count)):
        return None
    if bias is not None and not _is_row(bias, count):
        return None
    scale, shift = 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    return number, scale, shift, epsilon


def native_norm(
    cpu: Cpu, x: Tensor, how: Norm, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Do what `norm` does by the library; see `native_chain`."""
    width = x.shape[-1] if x.dim() else 0
    words = _norm_words(how, width)
    if words is None or width == 0:
        return None
    if wants_gradient(x, residual, *how[1:3]):
        return None
    x = _dense(x)
    total, term = x, None
    if residual is not None:
        if residual.dtype is not torch.float32 or not residual.is_cpu or residual.shape != x.shape:
            return None
        residual = _dense(residual)
        total, term = pool.empty(x.shape, x), residual.data_ptr()
    out = pool.empty(x.shape, x)
    kind, weight, bias, epsilon = words
    failed = cpu.norm(
        cpu.isa, torch.get_num_threads(), x.numel() // width, width, kind, weight, bias, epsilon,
        x.data_ptr(), term, total.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    if failed:
        return None
    return out if residual is None else (out, total)


def native_rotary(cpu: Cpu, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Do what `rotary` does by the library; see `native_chain`."""
    if x.dim() != 4 or x.stride(-1) != 1 or x.is_neg() or x.shape[-1] % 2:
        return None
    batch, heads, tokens, width = x.shape
    angles = ((1, tokens, width), (batch, tokens, width))
    for angle in (cos, sin):
        if angle.dtype is not torch.float32 or not angle.is_cpu or tuple(angle.shape) not in angles:
            return None
    if cos.shape != sin.shape or wants_gradient(x, cos, sin):
        return None
    cos, sin = _dense(cos), _dense(sin)
    out = pool.empty((batch, tokens, heads, width), x)
    sizes = struct.pack("=7q", batch, heads, tokens, width, *x.stride()[:3])
    step = tokens * width if cos.shape[0] > 1 else 0
    failed = cpu.rotary(
        cpu.isa,
        torch.get_num_threads(),
        sizes,
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        step,
        out.data_ptr(),
    )
    return None if failed else out.transpose(1, 2)
