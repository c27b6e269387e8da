"""A model of Llama's shape in transformers: a prompt in eager mode, decoding in a graph, and the bytes of the weights."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu import ours
from bench.gpu.clock import Clock
from bench.gpu.journal import Journal
from bench.gpu.llama import Decoder, layer_and_other_bytes, new_llama, prefill
from bench.gpu.peers import COMPILED, PEERS, importable, swap_
from bench.gpu.sizes import Sizes

BF16, INT8, BACKEND, INDUCTOR = "bf16", "int8", "int8, backend mono_quant", "inductor"
# of Llama-3-8B; layers of a shorter model count so many times over
_WHOLE = 32
_ROW, _COMPILE = 4, 25

Forward = Callable[..., Any]


def run_model(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time bf16, int8 modules, and int8 through the package's backend of `torch.compile`."""
    floats, model = _pair(journal, clock, sizes)
    compiled = _compiled(model, "mono_quant")
    stacks: list[tuple[str, Any, Forward]] = [
        (BF16, floats, floats),
        (INT8, model, model),
        (BACKEND, model, compiled),
    ]
    bases: dict[Any, float] = {}
    for name, owner, forward in stacks:
        _guarded(
            journal, f"prefill {name}", partial(_prefill, journal, clock, sizes, name, owner, forward, bases)
        )
    for batch in sizes.batches:
        for name, owner, forward in stacks:
            decode = partial(_decode, journal, clock, sizes, name, owner, forward, batch, bases)
            _guarded(journal, f"decode {name} {batch}", decode)


def run_inductor(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time bf16 and int8 under `torch.compile` with its own backend, our products opaque to it."""
    floats, model = _pair(journal, clock, sizes)
    bases: dict[Any, float] = {}
    for name, owner in ((BF16, floats), (INT8, model)):
        what, forward = f"{name}, {INDUCTOR}", _compiled(owner, "inductor")
        if journal.enough(what, _COMPILE):
            batch = sizes.batches[0]
            decode = partial(_decode, journal, clock, sizes, what, owner, forward, batch, bases)
            _guarded(journal, f"decode {what}", decode)
        if journal.enough(what, _COMPILE):
            read = partial(_prefill, journal, clock, sizes, what, owner, forward, bases)
            _guarded(journal, f"prefill {what}", read)


def run_model_peers(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time the peers in the same model, the same weights, against bf16 beside them."""
    bases: dict[Any, float] = {}
    floats = new_llama(sizes, sizes.layers, clock.device)
    _both(journal, clock, sizes, BF16, floats, floats, bases)
    del floats
    ready = {}
    for name in PEERS:
        if not importable(name):
            journal.row("absent", what=name)
        elif journal.enough(name, 2 * _ROW):
            ready[name] = _guarded(journal, name, partial(_peer, journal, clock, sizes, name, bases))
    for name, model in ready.items():
        if model is not None and name in COMPILED and journal.enough(f"{name} compiled", _COMPILE):
            forward = _compiled(model, "inductor")
            _both(journal, clock, sizes, f"{name} compiled", model, forward, bases)


def _pair(journal: Journal, clock: Clock, sizes: Sizes) -> tuple[Any, Any]:
    floats = new_llama(sizes, sizes.layers, clock.device)
    clock.wait()
    start = time.perf_counter()
    result = ours.quantized(floats)
    clock.wait()
    seconds = time.perf_counter() - start
    (before, once), (after, still) = layer_and_other_bytes(floats), layer_and_other_bytes(result.model)
    whole = (_WHOLE / sizes.layers * after + still) / (_WHOLE / sizes.layers * before + once)
    journal.row(
        "weights",
        layers=sizes.layers,
        bf16_bytes=before + once,
        int8_bytes=after + still,
        ratio=(after + still) / (before + once),
        ratio_of_32_layers=whole,
        quantized_in_s=seconds,
    )
    return floats, result.model


def _peer(journal: Journal, clock: Clock, sizes: Sizes, name: str, bases: dict[Any, float]) -> Any:
    model = swap_(new_llama(sizes, sizes.layers, clock.device), PEERS[name])
    _both(journal, clock, sizes, name, model, model, bases)
    return model


def _both(
    journal: Journal,
    clock: Clock,
    sizes: Sizes,
    name: str,
    owner: Any,
    forward: Forward,
    bases: dict[Any, float],
) -> None:
    read = partial(_prefill, journal, clock, sizes, name, owner, forward, bases)
    _guarded(journal, f"prefill {name}", read)
    for batch in sizes.batches[:1]:
        decode = partial(_decode, journal, clock, sizes, name, owner, forward, batch, bases)
        _guarded(journal, f"decode {name} {batch}", decode)


def _prefill(
    journal: Journal,
    clock: Clock,
    sizes: Sizes,
    name: str,
    owner: Any,
    forward: Forward,
    bases: dict[Any, float],
) -> None:
    seconds = clock.eager(prefill(owner, forward, sizes.prefill), calls=2)
    base = bases.setdefault("prefill", seconds)
    ratio = base / seconds
    journal.row(
        "prefill", what=name, tokens=sizes.prefill, layers=sizes.layers, ms=1e3 * seconds, ratio=ratio
    )


def _decode(
    journal: Journal,
    clock: Clock,
    sizes: Sizes,
    name: str,
    owner: Any,
    forward: Forward,
    batch: int,
    bases: dict[Any, float],
) -> None:
    decoder = Decoder(owner, forward, batch, sizes.filled, sizes.room)
    for _ in range(2):
        decoder.step()
    decoder.rewind()
    seconds = clock.replays(decoder.step)
    base = bases.setdefault(("decode", batch), seconds)
    journal.row(
        "decode",
        what=name,
        batch=batch,
        layers=sizes.layers,
        ms=1e3 * seconds,
        tokens_per_s=batch / seconds,
        ratio=base / seconds,
    )


def _compiled(model: Any, backend: str) -> Forward:
    torch._dynamo.reset()  # noqa: SLF001
    return torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)


def _guarded(journal: Journal, where: str, measure: Callable[[], Any]) -> Any:
    """Measure something, or write down why not: the others are measured."""
    if not journal.enough(where, _ROW):
        return None
    try:
        return measure()
    except Exception as e:  # noqa: BLE001
        journal.error(where, e)
        return None
