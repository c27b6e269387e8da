"""What the host does for a call, whether a model is captured whole, and whether a graph gives the bits of eager mode."""

from typing import Any

import torch

from bench.gpu import ours
from bench.gpu.clock import Clock
from bench.gpu.journal import Journal
from bench.gpu.llama import Decoder, new_llama, prefill
from bench.gpu.sizes import Sizes

_COMPILE = 25


def run_host(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time what the host does for one eager call, against `nn.Linear`."""
    floats = ours.layers(sizes.host_shape, 1, clock.device, sizes.dtype)
    model = ours.quantized(floats).model
    rows, depth = sizes.host_shape
    for count in sizes.host_tokens:
        x = torch.randn(1, count, depth, device=clock.device, dtype=sizes.dtype)
        base, mine = (clock.on_host(lambda layer=layer, x=x: layer[0](x)) for layer in (floats, model))
        values = {"N": rows, "K": depth, "M": count, "linear_us": 1e6 * base, "us": 1e6 * mine}
        journal.row("host", **values, ratio=base / mine)


def run_capture(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Capture a model whole, and hold what the compiled one says against eager mode."""
    model = ours.quantized(new_llama(sizes, sizes.step_layers, clock.device), inplace=True).model
    eager = prefill(model, model, sizes.prefill)().float()
    for backend in ("mono_quant", "inductor"):
        if not journal.enough(backend, _COMPILE):
            continue
        torch._dynamo.reset()  # noqa: SLF001
        forward = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)
        try:
            out = prefill(model, forward, sizes.prefill)().float()
        except Exception as e:  # noqa: BLE001 - a break in the graph is an error that torch raises
            journal.error(f"fullgraph {backend}", e)
            continue
        error = float((out - eager).norm() / eager.norm())
        journal.row("fullgraph", backend=backend, error=error, equal=torch.equal(out, eager))
    if journal.enough("generate", _COMPILE):
        try:
            _generate(journal, model, sizes)
        except Exception as e:  # noqa: BLE001 - as above
            journal.error("generate", e)


def _generate(journal: Journal, model: Any, sizes: Sizes) -> None:
    """Let transformers generate with a static cache: on a device it compiles each step, with `mode="reduce-overhead"`."""
    torch._dynamo.reset()  # noqa: SLF001
    ids = torch.arange(sizes.filled, device=next(model.parameters()).device)[None]
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    plain = model.generate(ids, **asked, disable_compile=True)
    found = model.generate(ids, **asked)
    journal.row("generate", tokens=found.shape[1] - ids.shape[1], equal=torch.equal(plain, found))


def run_steps(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Decode a long text eager and in a graph, and count the steps whose logits differ in a bit."""
    model = ours.quantized(new_llama(sizes, sizes.step_layers, clock.device), inplace=True).model
    decoder = Decoder(model, model, 1, sizes.filled, sizes.filled + sizes.steps + 1)
    eager = _decoded(decoder, decoder.step, sizes.steps)
    replay = clock.capture(decoder.step)
    again = _decoded(decoder, replay, sizes.steps)
    differ = int((eager != again).any(1).sum())
    journal.row(
        "steps", steps=sizes.steps, layers=sizes.step_layers, differ=differ, nan=int(again.isnan().sum())
    )


def _decoded(decoder: Decoder, call: object, steps: int) -> torch.Tensor:
    """Return the logits of every step from the beginning, [steps, V]."""
    decoder.rewind()
    held = []
    for _ in range(steps):
        call()  # type: ignore[operator]
        held.append(decoder.logits[0].clone())
    decoder.rewind()
    return torch.stack(held)
