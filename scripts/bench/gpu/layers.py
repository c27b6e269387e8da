"""Single layers in a graph, quantization included, weights rotated through more than the L2 holds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu import ours
from bench.gpu.clock import Clock
from bench.gpu.journal import Journal
from bench.gpu.peers import COMPILED, PEERS, importable
from bench.gpu.sizes import Sizes
from mono_quant import kernels

Shape = tuple[int, int]
# One replay does not end before its launches are hidden.
_FEWEST_CALLS = 48
_CACHES = 4
_FEW_TOKENS, _SOME_TOKENS = 64, 1024
# seconds that a shape takes at most, once everything is compiled
_SHAPE, _COMPILE = 3, 12


def run_layers(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time the package's layers in the scheme that suits the device."""
    for shape in sizes.shapes:
        if journal.enough(f"{shape}", _SHAPE):
            _shape(journal, clock, sizes, shape, sizes.tokens, ["auto"])


def run_schemes(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time every scheme at a few shapes."""
    for shape in sizes.scheme_shapes:
        if journal.enough(f"{shape}", _SHAPE):
            _shape(journal, clock, sizes, shape, sizes.scheme_tokens, list(kernels.SCHEMES))


def run_layer_peers(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time the peers where the schemes are timed."""
    for shape in sizes.scheme_shapes:
        if journal.enough(f"int_mm {shape}", _SHAPE):
            _fallback(journal, clock, sizes, shape)
    found = [name for name in PEERS if importable(name)]
    for name in set(PEERS) - set(found):
        journal.row("absent", what=name)
    for compiled in (False, True):
        for name in found:
            for shape in sizes.scheme_shapes if not compiled or name in COMPILED else ():
                if not journal.enough(f"{name} {shape}", _COMPILE if compiled else _SHAPE):
                    continue
                try:
                    _peer(journal, clock, sizes, shape, name, compiled)
                except Exception as e:  # noqa: BLE001 - whatever a peer does, the others are measured
                    journal.error(f"{name} {shape}", e)


def _shape(
    journal: Journal, clock: Clock, sizes: Sizes, shape: Shape, tokens: Sequence[int], schemes: list[str]
) -> None:
    device = clock.device
    floats = ours.layers(shape, copies(shape, device, sizes.most_copies), device, sizes.dtype)
    stacks = {scheme: ours.quantized(floats, scheme).model for scheme in schemes}
    for count in tokens:
        x = _tokens(count, shape, sizes, device)
        base = timed(clock, floats, x)
        for scheme, stack in stacks.items():
            try:
                seconds = timed(clock, stack, x)
                wrong = ours.differing(stack[0], x, stack[0](x))
            except Exception as e:  # noqa: BLE001 - the other points are measured
                journal.error(f"{shape} M={count} {scheme}", e)
                continue
            named = kernels.activation_scheme(scheme, device)
            values = {"N": shape[0], "K": shape[1], "M": count, "scheme": named, "copies": len(floats)}
            journal.row(
                "layer", **values, bf16_us=1e6 * base, us=1e6 * seconds, ratio=base / seconds, wrong=wrong
            )


def _fallback(journal: Journal, clock: Clock, sizes: Sizes, shape: Shape) -> None:
    """Time the package's own layers as they run without Triton: `torch._int_mm` with the codes and the scales around it."""
    device = clock.device
    floats = ours.layers(shape, copies(shape, device, sizes.most_copies), device, sizes.dtype)
    stack = ours.quantized(floats, "int8").model
    for count in sizes.scheme_tokens:
        x = _tokens(count, shape, sizes, device)
        base = timed(clock, floats, x)
        try:
            with kernels.using(gpu="int_mm"):
                seconds = timed(clock, stack, x)
        except Exception as e:  # noqa: BLE001 - the others are measured
            journal.error(f"{shape} M={count} without Triton", e)
            continue
        values = {"N": shape[0], "K": shape[1], "M": count, "what": "the package without Triton"}
        journal.row("peer", **values, bf16_us=1e6 * base, us=1e6 * seconds, ratio=base / seconds)


def _peer(journal: Journal, clock: Clock, sizes: Sizes, shape: Shape, name: str, compiled: bool) -> None:
    device = clock.device
    floats = ours.layers(shape, copies(shape, device, sizes.most_copies), device, sizes.dtype)
    made = [PEERS[name](layer) for layer in floats]
    for count in sizes.scheme_tokens:
        x = _tokens(count, shape, sizes, device)
        base = timed(clock, floats, x)
        stack: list[Callable[[Tensor], Tensor]] = list(made)
        if compiled:
            # one function for all copies, whose weights are inputs: compiled once a number of tokens
            torch._dynamo.reset()  # noqa: SLF001
            call = torch.compile(_apply, dynamic=False, fullgraph=True)
            stack = [lambda x, layer=layer, call=call: call(layer, x) for layer in made]
        seconds = timed(clock, stack, x)
        values = {
            "N": shape[0],
            "K": shape[1],
            "M": count,
            "what": f"{name}{' compiled' if compiled else ''}",
        }
        journal.row("peer", **values, bf16_us=1e6 * base, us=1e6 * seconds, ratio=base / seconds)


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out


def timed(clock: Clock, stack: Sequence[Callable[[Tensor], Any]], x: Tensor) -> float:
    """Return the seconds of one layer of a stack, each call through another copy of the weight."""
    count = len(stack)
    few = _FEWEST_CALLS if len(x) <= _FEW_TOKENS else 12 if len(x) <= _SOME_TOKENS else 4
    return clock.in_graph(lambda i: stack[i % count](x), max(few, count if len(x) <= _FEW_TOKENS else 0))


def copies(shape: Shape, device: torch.device, most: int) -> int:
    """Return how many int8 weights of a shape are some times what the L2 holds, or as many as are allowed."""
    if device.type != "cuda":
        return most
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(most, -(-_CACHES * cache // (shape[0] * shape[1]))))


def _tokens(count: int, shape: Shape, sizes: Sizes, device: torch.device) -> Tensor:
    return torch.randn(count, shape[1], device=device, dtype=sizes.dtype)
