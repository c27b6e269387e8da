"""How far the converted model's output is from the original's, measured on the same inputs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant.convert.probes import Probe, ProbeError, probing
from mono_quant.convert.untouched import untouched


@dataclass(frozen=True)
class Output:
    """The tensor that is compared: float32 on CPU, and what it is called."""

    name: str
    values: Tensor
    mask: Tensor | None


@contextmanager
def peak_activation(model: nn.Module) -> Iterator[list[float]]:
    """Watch the forward passes of the block; the list holds the largest magnitude that left any module.

    Arithmetic in float16 overflows where it is beyond 65504, though every weight fits.
    """
    peak = [0.0]

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _flatten(output):
            if tensor.is_floating_point() and tensor.numel():
                peak[0] = max(peak[0], float(tensor.detach().abs().max()))

    handles = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        yield peak
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, probe: Probe, written: set[str] | None = None) -> Output:
    """Run the model once in inference mode and pick the output to compare.

    Everything that the model and the inputs hold, and the random states, are afterwards what they were; see `untouched`.

    Args:
        model: is not changed.
        probe: the inputs.
        written: gets the names of the model's parameters and saved buffers that its forward wrote into.

    Raises:
        ProbeError: the model does not run on these inputs, or returns no float tensor.
    """
    with (
        probing(f"the model did not run on {probe.name}"),
        untouched(model, probe, written=written),
        torch.no_grad(),
    ):
        model.eval()
        name, values = _pick(model(*probe.args, **probe.kwargs))
    mask = probe.mask if probe.mask is not None and values.shape[:2] == probe.mask.shape else None
    return Output(name, values.detach().float().cpu(), None if mask is None else mask.cpu())


def compare(reference: Output, output: Output, probe: str) -> dict[str, Any]:
    """Measure an output against the reference.

    Returns:
        `relative_error`: ||y - r|| / ||r|| over all real positions; `cosine_mean`, `cosine_min` over positions;
        for logits over a vocabulary also `kl_mean` and `kl_p99` in nats and `top1_agreement`. Numbers have four digits.
    """
    with probing("the outputs could not be compared"):
        return _compared(reference, output, probe)


def _compared(reference: Output, output: Output, probe: str) -> dict[str, Any]:
    r, y = (_rows(o.values, reference.mask) for o in (reference, output))
    if r.shape != y.shape:
        raise ProbeError(f"the outputs have different shapes, {tuple(r.shape)} and {tuple(y.shape)}")
    bad = int((~torch.isfinite(y)).any(dim=1).sum() - (~torch.isfinite(r)).any(dim=1).sum())
    facts: dict[str, Any] = {"output": reference.name, "probe": probe, "positions": r.shape[0]}
    if bad > 0:
        facts["non_finite_positions"] = bad
    norm = float(r.double().norm())
    facts["relative_error"] = float((y.double() - r.double()).norm()) / norm if norm else 0.0
    cosine = F.cosine_similarity(r.double(), y.double(), dim=1)
    facts["cosine_mean"], facts["cosine_min"] = float(cosine.mean()), float(cosine.min())
    if reference.name == "logits" and r.shape[1] > 1:
        logp, logq = r.double().log_softmax(1), y.double().log_softmax(1)
        kl = (logp.exp() * (logp - logq)).sum(1).clamp_min(0.0)
        facts["kl_mean"], facts["kl_p99"] = float(kl.mean()), float(kl.quantile(0.99))
        facts["top1_agreement"] = float((r.argmax(1) == y.argmax(1)).double().mean())
    return {k: _stable(k, v) if isinstance(v, float) else v for k, v in facts.items()}


# Decimals that the noise of float32 sums (their order may change with the memory they are in) does not reach.
_DECIMALS = {"relative_error": 5, "kl_mean": 9, "kl_p99": 9}


def _stable(key: str, value: float) -> float | None:
    rounded = digits(value)
    return rounded if rounded is None else round(rounded, _DECIMALS.get(key, 6))


def digits(value: float) -> float | None:
    """Round for a report: four digits, six where the distance to 1 is what matters, None for NaN and infinity."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.4g}") if abs(value) < 0.9 else round(value, 6)


def _pick(raw: Any) -> tuple[str, Tensor]:
    for name in ("logits", "last_hidden_state", "start_logits", "sentence_embedding", "sample"):
        value = raw.get(name) if isinstance(raw, Mapping) else getattr(raw, name, None)
        if isinstance(value, Tensor) and value.is_floating_point():
            return name, value
    for value in _flatten(raw):
        if value.is_floating_point():
            return "output", value
    raise ProbeError(f"the model returned {type(raw).__name__}, which holds no float tensor to compare")


def _flatten(raw: Any) -> Iterator[Tensor]:
    if isinstance(raw, Tensor):
        yield raw
    elif isinstance(raw, (Mapping, Sequence)) and not isinstance(raw, str):
        for value in raw.values() if isinstance(raw, Mapping) else raw:
            yield from _flatten(value)


def _rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return [positions, features]; the last dimension is the features, whatever comes before it."""
    if mask is not None:
        # one value per token (question answering, token discriminators) is one feature
        return values[mask].reshape(int(mask.sum()), -1)
    return values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(1, -1)
