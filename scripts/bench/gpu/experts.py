"""Mixtral's and Qwen3-MoE's experts against the grouped product that transformers runs in bf16."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import ours
from bench.gpu.clock import Clock
from bench.gpu.journal import Journal
from bench.gpu.sizes import Experts, Sizes

_IMPLEMENTATION = "grouped_mm"
_NEEDED = 6


def run_experts(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Time both, eager and in a graph."""
    for shape in sizes.experts:
        if not journal.enough(shape.name, _NEEDED):
            continue
        floats = new_experts(shape, clock.device, sizes.dtype)
        # experts alone are no model of anybody's: their implementation is named in a config that the decorator looks up
        model = ours.quantized(torch.nn.ModuleDict({"experts": floats})).model["experts"]
        for count in sizes.expert_tokens:
            args = routed(shape, count, clock.device, sizes.dtype)
            base: dict[str, float] = {}
            for name, module in ((f"bf16 {_IMPLEMENTATION}", floats), ("int8", model)):
                _time(journal, clock, shape, count, name, partial(module, *args), base)
            _compare(journal, shape, count, floats(*args), model(*args))


def _time(
    journal: Journal,
    clock: Clock,
    shape: Experts,
    count: int,
    name: str,
    call: Any,
    base: dict[str, float],
) -> None:
    for mode, measure in (("graph", clock.replays), ("eager", clock.eager)):
        try:
            seconds = measure(call)
        except Exception as e:  # noqa: BLE001 - an implementation may fit in no graph
            journal.error(f"{shape.name} T={count} {name} {mode}", e)
            continue
        ratio = base.setdefault(mode, seconds) / seconds
        journal.row("experts", shape=shape.name, T=count, what=name, mode=mode, ms=1e3 * seconds, ratio=ratio)


def _compare(journal: Journal, shape: Experts, count: int, floats: Tensor, ours_out: Tensor) -> None:
    error = (ours_out.float() - floats.float()).norm() / floats.float().norm()
    journal.row("experts_error", shape=shape.name, T=count, to_bf16=float(error))


def new_experts(shape: Experts, device: torch.device, dtype: torch.dtype) -> Any:
    """Return experts of transformers with random weights."""
    from transformers import MixtralConfig  # noqa: PLC0415
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: PLC0415

    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_local_experts=shape.count,
        num_experts_per_tok=shape.taken,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config._experts_implementation = _IMPLEMENTATION  # noqa: SLF001
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            experts = MixtralExperts(config)
    finally:
        torch.set_default_dtype(before)
    for parameter in experts.requires_grad_(False).parameters():
        parameter.normal_(0, 0.02)
    return experts.eval()


def routed(
    shape: Experts, count: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, the experts of each, and their weights."""
    x = torch.randn(count, shape.hidden, device=device, dtype=dtype)
    chosen = torch.rand(count, shape.count, device=device).topk(shape.taken).indices
    weights = torch.rand(count, shape.taken, device=device).softmax(-1)
    return x, chosen, weights
