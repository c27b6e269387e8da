"""A model of Llama's shape in transformers: a prompt in eager mode, decoding in a graph, and the bytes of the weights."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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


class Stack(NamedTuple):
    """A model, and what runs it: itself, or its compiled form."""

    name: str
    owner: Any
    forward: Forward


def run_model(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time bf16, int8 modules, and int8 through the package's backend of `torch.compile`."""
    floats, model = _pair(journal, clock, sizes)
    compiled = _compiled(model, "mono_quant")
    stacks = [Stack(BF16, floats, floats), Stack(INT8, model, model), Stack(BACKEND, model, compiled)]
    race = _Race(journal, clock, sizes)
    for stack in stacks:
        race.prefill(stack)
    for batch in sizes.batches:
        for stack in stacks:
            race.decode(stack, batch)


def run_inductor(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time bf16 and int8 under `torch.compile` with its own backend, our products opaque to it."""
    floats, model = _pair(journal, clock, sizes)
    race = _Race(journal, clock, sizes)
    for name, owner in ((BF16, floats), (INT8, model)):
        stack = Stack(f"{name}, {INDUCTOR}", owner, _compiled(owner, "inductor"))
        if journal.enough(stack.name, _COMPILE):
            race.decode(stack, sizes.batches[0])
        if journal.enough(stack.name, _COMPILE):
            race.prefill(stack)


def run_model_peers(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time the peers in the same model, the same weights, against bf16 beside them."""
    race = _Race(journal, clock, sizes)
    floats = new_llama(sizes, sizes.layers, clock.device)
    race.both(Stack(BF16, floats, floats))
    del floats
    ready = {}
    for name in PEERS:
        if not importable(name):
            journal.row("absent", what=name)
        elif journal.enough(name, 2 * _ROW):
            ready[name] = _guarded(journal, name, partial(_peer, race, name))
    for name, model in ready.items():
        if model is not None and name in COMPILED and journal.enough(f"{name} compiled", _COMPILE):
            race.both(Stack(f"{name} compiled", model, _compiled(model, "inductor")))


def _peer(race: "_Race", name: str) -> Any:
    model = swap_(new_llama(race.sizes, race.sizes.layers, race.clock.device), PEERS[name])
    race.both(Stack(name, model, model))
    return model


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


class _Race:
    """Times stacks against the first one, each as far as there is time; what fails is written down, and the others are measured."""

    def __init__(self, journal: Journal, clock: Clock, sizes: Sizes) -> None:
        self.journal, self.clock, self.sizes = journal, clock, sizes
        self._bases: dict[Any, float] = {}

    def both(self, stack: Stack) -> None:
        self.prefill(stack)
        for batch in self.sizes.batches[:1]:
            self.decode(stack, batch)

    def prefill(self, stack: Stack) -> None:
        _guarded(self.journal, f"prefill {stack.name}", partial(self._prefill, stack))

    def decode(self, stack: Stack, batch: int) -> None:
        _guarded(self.journal, f"decode {stack.name} {batch}", partial(self._decode, stack, batch))

    def _prefill(self, stack: Stack) -> None:
        sizes = self.sizes
        seconds = self.clock.eager(prefill(stack.owner, stack.forward, sizes.prefill), calls=2)
        ratio = self._bases.setdefault("prefill", seconds) / seconds
        self.journal.row(
            "prefill",
            what=stack.name,
            tokens=sizes.prefill,
            layers=sizes.layers,
            ms=1e3 * seconds,
            ratio=ratio,
        )

    def _decode(self, stack: Stack, batch: int) -> None:
        sizes = self.sizes
        decoder = Decoder(stack.owner, stack.forward, batch, sizes.filled, sizes.room)
        for _ in range(2):
            decoder.step()
        decoder.rewind()
        seconds = self.clock.replays(decoder.step)
        base = self._bases.setdefault(("decode", batch), seconds)
        self.journal.row(
            "decode",
            what=stack.name,
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
