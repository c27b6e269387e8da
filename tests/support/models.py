"""Tiny random models of every family with inputs for them; making one leaves the global random state alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

transformer = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 200,
}


@dataclass(frozen=True)
class Family:
    """How to make a model and inputs for it, and the layout that its int8 form is saved in."""

    make: Callable[[], nn.Module]
    make_inputs: Callable[[], dict[str, Tensor]]
    layout: str = "compressed-tensors"

    def build(self) -> nn.Module:
        """Return the same model every time, in evaluation mode."""
        return seeded(self.make).eval()

    def inputs(self) -> dict[str, Tensor]:
        """Return the same inputs every time, by keyword."""
        return seeded(self.make_inputs)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def bert(**changes: Any) -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**transformer, num_labels=3, **changes))


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    # as from_pretrained(dtype=...) does: tables that are not saved stay in float32
    config = hf.LlamaConfig(**transformer, num_key_value_heads=2, **changes)
    return hf.LlamaForCausalLM._from_config(config, dtype=dtype)


def tiny_llama(**changes: Any) -> nn.Module:
    return seeded(lambda: llama(**changes)).eval()


def gpt2() -> nn.Module:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, vocab_size=200, bos_token_id=0, eos_token_id=1))


def t5() -> nn.Module:
    config = hf.T5Config(d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, vocab_size=200)
    return hf.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    sizes = {k: v for k, v in transformer.items() if k != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3))


def whisper() -> nn.Module:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"num_mel_bins": 20, "max_source_positions": 40, "max_target_positions": 32}
    config = hf.WhisperConfig(d_model=64, vocab_size=200, **sides, **special, **lengths)
    return hf.WhisperForConditionalGeneration(config)


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(
        **transformer | {"intermediate_size": 96},
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return hf.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    config = hf.Qwen3MoeConfig(
        **transformer,
        moe_intermediate_size=48,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return hf.Qwen3MoeForCausalLM(config)


class Cnn(nn.Module):
    """Convolutions of several kinds with BatchNorm, whose running values are not those of a fresh one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.b = nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2, padding_mode="reflect")
        self.bn2, self.fc = nn.BatchNorm2d(64), nn.Linear(64, 100)
        for norm in (self.bn, self.bn2):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            norm.num_batches_tracked.fill_(7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.a(x)))
        return self.fc(torch.relu(self.bn2(self.b(x))).mean((2, 3)))


class Lstm(nn.Module):
    """A recurrent net under a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lstm = nn.Embedding(100, 64), nn.LSTM(64, 64, batch_first=True)
        self.out = nn.Linear(64, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.emb(x))[0])


class Attention(nn.Module):
    """A bare `nn.MultiheadAttention` between two sequences, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return self.mha(x, y, y, key_padding_mask=mask)[0]


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)


def tokens(high: int = 200, **more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, high, (2, 7)), **more}


def text() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return tokens(attention_mask=mask)


def text_to_text() -> dict[str, Tensor]:
    return tokens(decoder_input_ids=torch.randint(3, 200, (2, 5)))


def sound() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 20, 80), "decoder_input_ids": torch.randint(3, 200, (2, 5))}


def two_sequences() -> dict[str, Tensor]:
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    return {"x": torch.randn(2, 5, 64), "y": torch.randn(2, 6, 64), "mask": mask}


OWN = "mono_quant"
FAMILIES: Mapping[str, Family] = {
    "bert": Family(bert, text),
    "llama": Family(llama, text),
    "llama_tied": Family(lambda: llama(tie_word_embeddings=True), text),
    "llama_bf16": Family(lambda: llama(torch.bfloat16, tie_word_embeddings=True), text),
    "gpt2": Family(gpt2, text, OWN),
    "t5": Family(t5, text_to_text),
    "vit": Family(vit, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "whisper": Family(whisper, sound),
    "mixtral": Family(mixtral, text),
    "qwen3_moe": Family(qwen3_moe, text),
    "cnn": Family(Cnn, lambda: {"x": torch.randn(2, 3, 16, 16)}, OWN),
    "lstm": Family(Lstm, lambda: {"x": torch.randint(0, 100, (2, 7))}, OWN),
    "encoder": Family(encoder, lambda: {"src": torch.randn(2, 5, 64)}, OWN),
    "attention": Family(Attention, two_sequences, OWN),
}
MOE = ("mixtral", "qwen3_moe")


def is_plain(model: nn.Module) -> bool:
    return not isinstance(model, hf.PreTrainedModel)


def run(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits, in the dtype in which they came; floating inputs get the dtype that the model computes in."""
    named = {n: p.dtype for n, p in model.named_parameters() if p.is_floating_point()}
    dtypes = {dtype for name, dtype in named.items() if not name.endswith("_scale")}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.inference_mode():
        out = model(**cast)
    return out if isinstance(out, Tensor) else out.logits


def relative_error(reference: Tensor, value: Tensor) -> float:
    reference, value = reference.detach().double(), value.detach().double()
    return float((value - reference).norm() / reference.norm())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
