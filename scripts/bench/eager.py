"""Models that run inside PyTorch: one pass, or token by token behind a prompt."""

from typing import Any

import torch
from torch import nn

from bench.cases import PROMPT, STEPS, Case, Inputs
from bench.runner import Runner


def eager(model: nn.Module, case: Case, dtype: torch.dtype = torch.float32, static: bool = False) -> Runner:
    """Run a torch model: one pass, or token by token behind a prompt that is read once.

    Args:
        model: what runs.
        case: how it is used.
        dtype: of its inputs; outputs are float32.
        static: keep keys and values in a cache of fixed size, in place of one that grows with every token.
    """

    def forward(inputs: Inputs) -> torch.Tensor:
        cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        return model(**cast)[0].float()  # type: ignore[no-any-return]

    if not case.decode:
        return Runner(forward)
    cache = _static_cache(model) if static else _growing_cache()

    def decode(inputs: Inputs) -> torch.Tensor:
        ids = inputs["input_ids"]
        if not int(cache.get_seq_length()):
            model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        steps = [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)[0]
            for i in range(PROMPT, ids.shape[1])
        ]
        return torch.cat(steps, 1).float()

    def reset() -> None:
        known = int(cache.get_seq_length())
        if known <= PROMPT:
            return
        if static:
            # what lies behind the prompt is masked until it is written anew
            for layer in cache.layers:
                layer.cumulative_length.fill_(PROMPT)
        else:
            cache.crop(PROMPT - known)

    return Runner(decode, "static cache" if static else "", reset)


def _growing_cache() -> Any:
    from transformers import DynamicCache  # noqa: PLC0415

    return DynamicCache()


def _static_cache(model: nn.Module) -> Any:
    from transformers import StaticCache  # noqa: PLC0415

    return StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
