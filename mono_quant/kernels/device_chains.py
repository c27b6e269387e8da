"""Chains on a device: a sum and a norm, products, a gate or activation, a product again, as one call that a compiler cannot open.

A device gains nothing from longer ones: its kernels leave their results in memory whatever comes behind them, and what is not in
front of a quantization is for the compiler to fuse. So an activation without a product behind it, an addition and a norm at the
end are torch's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mono_quant.kernels import accelerators, transforms
from mono_quant.kernels.choice import scheme_of
from mono_quant.kernels.composed import composed_chain
from mono_quant.kernels.steps import ACTS, Product, Steps
from mono_quant.kernels.watching import is_followed, wants_gradient

_NOTHING: Product = ((), (), (), "")


def runs_on_device(x: Tensor) -> bool:
    """Say whether the device of a tensor has kernels of ours."""
    path = accelerators.path_of(x)
    return path is not None and path.failure is None


def run_chain(
    x: Tensor, steps: Steps, added: Tensor | None = None, keep_sum: bool = False, keep_normed: bool = False
) -> tuple[Tensor, ...] | None:
    """Apply steps to a tensor on a device; None where no path there has an answer.

    Args:
        x: float [..., K].
        steps: what to do.
        added: like `x`, added to it first.
        keep_sum: return the sum, too.
        keep_normed: return the normed values, too.

    Returns:
        The sum and the normed values where they are kept, and the result; in the dtype of `x`.
    """
    if not runs_on_device(x) or transforms.is_transformed():
        return None
    if wants_gradient(x, added, *_floats(steps)):
        return None
    inner = _joined(steps)
    if inner is None:
        return None
    found = _run(x, added, inner, keep_sum, keep_normed)
    if found is None or steps.second is not None:
        return found
    *kept, y = found
    if steps.gate is None:
        return *kept, ACTS[steps.act](y)
    width = sum(weight.shape[0] for weight in steps.gate[0])
    return *kept, ACTS[steps.act](y[..., :width]) * y[..., width:]


def _floats(steps: Steps) -> list[Tensor | None]:
    biases = [bias for product in (steps.first, steps.gate, steps.second) if product for bias in product[2]]
    return [*biases, *(steps.pre[1:3] if steps.pre else ())]


def _joined(steps: Steps) -> Steps | None:
    """Return the part that is one call: without a second product, gate and first are one and the rest is torch's."""
    first, gate = steps.first, steps.gate
    if steps.second is not None:
        return steps
    if gate is None:
        return Steps(first, steps.pre)
    if gate[3] != first[3]:
        return None
    together = (*gate[0], *first[0]), (*gate[1], *first[1]), (*gate[2], *first[2]), first[3]
    return Steps(together, steps.pre)


def _run(
    x: Tensor, added: Tensor | None, steps: Steps, keep_sum: bool, keep_normed: bool
) -> tuple[Tensor, ...] | None:
    if not is_followed():
        return _on_path(x, added, steps, keep_sum, keep_normed)
    products = [product or _NOTHING for product in (steps.first, steps.gate, steps.second)]
    found: list[Tensor] = torch.ops.mono_quant.chain(
        x,
        added,
        *(steps.pre or (None, None, None, 0.0)),
        keep_sum,
        keep_normed,
        steps.act,
        *([tensor for product in products for tensor in product[part]] for part in range(3)),
        [len(product[0]) for product in products],
        *(product[3] for product in products),
    )
    return tuple(found)


def _on_path(
    x: Tensor, added: Tensor | None, steps: Steps, keep_sum: bool, keep_normed: bool
) -> tuple[Tensor, ...] | None:
    path = accelerators.path_of(x)
    if path is None:
        return None
    first, gate, second = (
        None if product is None else (*product[:3], scheme_of(product[3], x).name)
        for product in (steps.first, steps.gate, steps.second)
    )
    named = Steps(first or _NOTHING, steps.pre, steps.act, gate, second)
    return path.chain(x, added, named, keep_sum, keep_normed)


@torch.library.custom_op("mono_quant::chain", mutates_args=())
def _chain_op(
    x: Tensor,
    added: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float,
    keep_sum: bool,
    keep_normed: bool,
    act: str | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    counts: Sequence[int],
    first_scheme: str,
    gate_scheme: str,
    second_scheme: str,
) -> list[Tensor]:
    schemes = (first_scheme, gate_scheme, second_scheme)
    first, gate, second = _products(weights, scales, biases, counts, schemes)
    pre = None if norm is None else (norm, norm_weight, norm_bias, epsilon)
    steps = Steps(first or _NOTHING, pre, act, gate, second)
    found = _on_path(x, added, steps, keep_sum, keep_normed)
    if found is not None:
        return list(found)
    total, normed, out = composed_chain(x, added, steps)
    return [
        values.contiguous()
        for values, keep in ((total, keep_sum), (normed, keep_normed), (out, True))
        if keep
    ]


def _products(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    counts: Sequence[int],
    schemes: Sequence[str],
) -> list[Product | None]:
    """Return the products that lie one after the other in flat lists; None for those without weights."""
    found: list[Product | None] = []
    start = 0
    for count, scheme in zip(counts, schemes, strict=True):
        own = slice(start, start + count)
        found.append((weights[own], scales[own], biases[own], scheme) if count else None)
        start += count
    return found


@_chain_op.register_fake
def _chain_fake(
    x: Tensor,
    added: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float,
    keep_sum: bool,
    keep_normed: bool,
    act: str | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    counts: Sequence[int],
    first_scheme: str,
    gate_scheme: str,
    second_scheme: str,
) -> list[Tensor]:
    second = weights[counts[0] + counts[1] :]
    width = sum(weight.shape[0] for weight in second or weights)
    kept = [x.new_empty(x.shape) for keep in (keep_sum, keep_normed) if keep]
    return [*kept, x.new_empty(*x.shape[:-1], width)]
