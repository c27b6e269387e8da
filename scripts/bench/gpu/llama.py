"""A random model of Llama's shape in transformers, made on the device, and the two things that are timed of it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.sizes import Sizes

SEED = 7


def new_llama(sizes: Sizes, layers: int, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Return a model with the same random weights at every call, norms with a spread."""
    from transformers import LlamaConfig, LlamaForCausalLM, logging  # noqa: PLC0415

    logging.set_verbosity_error()
    shape = sizes.decoder
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        num_hidden_layers=layers,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or sizes.dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).eval()
    for norm in norms(model):
        norm.weight.copy_(1 + 0.1 * torch.randn_like(norm.weight))
    return model


def norms(model: Any) -> list[Any]:
    """Return the norms before attention and MLP of every layer."""
    return [
        norm
        for layer in model.model.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]


def twin(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy in another dtype, with the rotary table of the first, which a cast would round."""
    other = copy.deepcopy(model).to(dtype)
    other.model.rotary_emb = model.model.rotary_emb
    return other


def prefill(model: Any, forward: Callable[..., Any], tokens: int) -> Callable[[], Tensor]:
    """Return what reads a prompt and gives the logits after it."""
    ids = _ids(model, 1, tokens)

    def call() -> Tensor:
        logits: Tensor = forward(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    return call


class Decoder:
    """Greedy decoding into a static cache, a step a call.

    Attributes:
        token: int64 [B, 1], what the next step reads.
        logits: of the last step, [B, V].
    """

    def __init__(self, model: Any, forward: Callable[..., Any], batch: int, filled: int, room: int) -> None:
        from transformers import StaticCache  # noqa: PLC0415

        self._forward, self._filled = forward, filled
        self._cache = StaticCache(config=model.config, max_cache_len=room)
        ids = _ids(model, batch, filled)
        model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._first = ids[:, :1].clone()
        self.token, self.logits = self._first.clone(), torch.empty(0)

    def step(self) -> None:
        logits = self._forward(input_ids=self.token, past_key_values=self._cache, use_cache=True).logits
        self.logits = logits[:, -1]
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def rewind(self) -> None:
        """Go back to where decoding began: what lies beyond is masked."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._filled)
        self.token.copy_(self._first)


def layer_and_other_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of the decoder's layers, and those of what is there once: embedding, head, last norm."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inside = sum(t.nbytes for name, t in held.items() if ".layers." in name)
    return inside, sum(t.nbytes for t in held.values()) - inside


def _ids(model: Any, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator)
    return ids.to(next(model.parameters()).device)
