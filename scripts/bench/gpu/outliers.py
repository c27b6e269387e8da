"""A model whose norms scale some channels by 20: what schemes of activations are there for."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import ours
from bench.gpu.clock import Clock
from bench.gpu.journal import Journal
from bench.gpu.llama import new_llama, norms, twin
from bench.gpu.sizes import Sizes

_FACTOR = 20
_SCHEMES = ("int8", "int8-g128", "int12", "measured")
_NEEDED = 4


def run_outliers(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Hold the logits of every scheme against fp32, with and without such channels."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for factor in (_FACTOR, 1):
        exact = new_llama(sizes, sizes.step_layers, clock.device, torch.float32)
        for norm in norms(exact):
            norm.weight[: sizes.outliers] *= factor
        ids, others = _ids(exact, sizes, 1), _ids(exact, sizes, 2)
        expected = _logits(exact, ids)
        half = twin(exact, torch.bfloat16)
        note = partial(_note, journal, factor, expected)
        note("bf16", _logits(half, ids))
        for scheme in _SCHEMES:
            if not journal.enough(scheme, _NEEDED):
                continue
            try:
                # on other inputs than those that are compared
                options = {"probe": {"input_ids": others}} if scheme == "measured" else {}
                model = ours.quantized(twin(exact, sizes.dtype), scheme, inplace=True, **options).model
                note(scheme, _logits(model, ids))
            except Exception as e:  # noqa: BLE001 - the other schemes are measured
                journal.error(f"outliers {scheme}", e)


def _note(journal: Journal, factor: int, expected: Tensor, what: str, logits: Tensor) -> None:
    error = float((logits - expected).norm() / expected.norm())
    top = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    journal.row("outliers", scaled_by=factor, what=what, error=error, same_top=top)


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits


def _ids(model: Any, sizes: Sizes, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (1, sizes.measured_tokens), generator=generator)
    return ids.to(next(model.parameters()).device)
