"""Tiny random models of sentence-transformers, one for each way in which they are built."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentence_transformers as st
import torch
import transformers as hf
from models import seeded
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer import modules as dense
from sentence_transformers.sparse_encoder import modules as sparse
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = 1000
WIDE = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
DEEP = {"num_hidden_layers": 2, "num_attention_heads": 4}
BERT = hf.BertConfig(**WIDE, **DEEP, bos_token_id=None, eos_token_id=None)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_into(folder: Path) -> None:
    """Write a tokenizer of whole words, made on the spot."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS - 5))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip


def transformer(make: Callable[[], Any], dtype: torch.dtype = torch.float32, **options: Any) -> Transformer:
    """Return the module of sentence-transformers around a model of transformers with random weights."""
    folder = Path(tempfile.mkdtemp())
    try:
        seeded(make).to(dtype).save_pretrained(folder)
        tokenizer_into(folder)
        return Transformer(str(folder), model_kwargs={"dtype": dtype}, **options)
    finally:
        shutil.rmtree(folder)


def bert(**options: Any) -> Transformer:
    return transformer(lambda: hf.BertModel(BERT), **options)


def _embedder(*behind: Any, first: Transformer | None = None, **options: Any) -> Any:
    modules = [bert() if first is None else first, *behind]
    return st.SentenceTransformer(modules=modules, device="cpu", **options).eval()


def _routes() -> Router:
    return Router({"query": [Dense(64, 24)], "document": [Dense(64, 24)]}, default_route="document")


def _masked(cls: Any = hf.BertForMaskedLM, config: Any = BERT) -> Transformer:
    return transformer(lambda: cls(config), transformer_task="fill-mask")


def _reranker() -> Any:
    config = hf.BertConfig(**BERT.to_dict() | {"num_labels": 1})
    first = transformer(
        lambda: hf.BertForSequenceClassification(config), transformer_task="sequence-classification"
    )
    return st.CrossEncoder(modules=[first], device="cpu").eval()


def _qwen() -> Transformer:
    config = hf.Qwen3Config(**WIDE, **DEEP, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    return transformer(lambda: hf.Qwen3Model(config))


def _t5() -> Transformer:
    config = hf.T5Config(vocab_size=WORDS, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    return transformer(lambda: hf.T5EncoderModel(config))


def _gpt2() -> Transformer:
    config = hf.GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return transformer(lambda: hf.GPT2Model(config))


ENCODERS: dict[str, Callable[[], Any]] = {
    "mean": lambda: _embedder(dense.Pooling(64), prompts={"query": "w1 w2 "}, truncate_dim=32),
    "dense": lambda: _embedder(
        dense.Pooling(64, "cls"),
        seeded(lambda: Dense(64, 48)),
        dense.LayerNorm(48),
        Normalize(),
        similarity_fn_name="dot",
    ),
    "cnn": lambda: _embedder(seeded(lambda: dense.CNN(64, 16)), dense.Pooling(48)),
    "router": lambda: _embedder(dense.Pooling(64), seeded(_routes)),
    "half_core": lambda: _embedder(
        dense.Pooling(64), seeded(lambda: Dense(64, 48)), first=bert(dtype=torch.bfloat16)
    ),
    "last_token": lambda: _embedder(dense.Pooling(64, "lasttoken"), first=_qwen()),
    "t5": lambda: _embedder(dense.Pooling(64), first=_t5()),
    "gpt2": lambda: _embedder(dense.Pooling(64), first=_gpt2()),
    "reranker": _reranker,
    "splade": lambda: st.SparseEncoder(modules=[_masked(), sparse.SpladePooling()], device="cpu").eval(),
    "csr": lambda: st.SparseEncoder(
        modules=[bert(), dense.Pooling(64), seeded(lambda: sparse.SparseAutoEncoder(64, 128, k=8, k_aux=16))],
        device="cpu",
    ).eval(),
}


def answers(model: Any) -> torch.Tensor:
    """What an encoder says to three texts, or pairs of texts, by the method its users call."""
    texts = ["w1 w2 w3", "w10 w20 w30 w40 w50 w60", "w7"]
    if isinstance(model, st.CrossEncoder):
        return torch.as_tensor(model.predict([(text, "w5 w6") for text in texts]))
    found = model.encode(texts, convert_to_tensor=True)
    return found.to_dense() if found.is_sparse else found
