"""The life of a model, over many architectures: tiny ones with random weights, from a folder and back.

    scripts/lives [--models NAME ...]

Of each model: is the one that `from_pretrained(..., quantization_config=MonoQuantConfig())` makes that of `quantize` tensor by
tensor, how far is its output from the float model's, does it come back bit for bit, are the bytes of a second save the same,
what does transformers make of the folder that never heard of mono_quant (its output, and the tokens or features of a call that
does not go through the outermost forward, against a float model with the weights that the codes stand for), how many of
the bytes in memory are int8, is the whole graph compiled, and are the tokens those of the saved model. Prints a table in Markdown.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from readers.models import CASES
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/support"))

COLUMNS = (
    "model", "on load = in memory", "error", "loads as saved", "saves the same bytes", "int8 of parameters", "vanilla", "its calls",
    "compiled", "tokens",
)  # fmt: skip
TEXTS = (
    "llama", "llama-tied", "llama-bf16", "qwen2", "qwen3", "mistral", "gemma3-text", "phi3", "gpt-neox", "falcon", "olmo2", "bloom", "opt",
    "modernbert-headless", "mixtral", "qwen3-moe", "deepseek-v2",
)  # fmt: skip
TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {**TOWER, "vocab_size": 256, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
PICTURE = {**TOWER, "image_size": 32, "patch_size": 8}
SIDES = {
    "d_model": 128, "vocab_size": 256, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Life:
    """A model with inputs, and a call of its that is not its forward."""

    build: Callable[[], Any]
    inputs: Mapping[str, Tensor]
    call: str = ""


def _seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
SOUND = torch.randn(2, 20, 80, generator=torch.Generator().manual_seed(3))
GREEDY = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}


def lives() -> dict[str, Life]:
    """Return every model by name."""
    text = {"input_ids": IDS}
    found = {
        name: Life(CASES[name].build, text, "generate" if CASES[name].read == "logits" else "")
        for name in TEXTS
        if name in CASES
    }
    both = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    t5 = hf.T5Config(
        vocab_size=256,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    clip = hf.CLIPConfig(text_config=WORDS, vision_config=PICTURE, projection_dim=64)
    whisper = hf.WhisperConfig(**SIDES, num_mel_bins=20, max_source_positions=40, max_target_positions=64)
    gpt2 = hf.GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=256, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    makers: dict[str, tuple[Callable[[], Any], Mapping[str, Tensor], str]] = {
        "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**WORDS, num_labels=3)), text, ""),
        "gpt2": (lambda: hf.GPT2LMHeadModel(gpt2), text, "generate"),
        "t5": (lambda: hf.T5ForConditionalGeneration(t5), both, "generate"),
        "bart": (
            lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SIDES, max_position_embeddings=64)),
            both,
            "generate",
        ),
        "whisper": (
            lambda: hf.WhisperForConditionalGeneration(whisper),
            {"input_features": SOUND.transpose(1, 2).reshape(2, 20, 80), "decoder_input_ids": IDS[:, :5]},
            "generate",
        ),
        "vit": (
            lambda: hf.ViTForImageClassification(hf.ViTConfig(**PICTURE, num_labels=3)),
            {"pixel_values": PIXELS},
            "",
        ),
        "clip": (lambda: hf.CLIPModel(clip), {"input_ids": IDS, "pixel_values": PIXELS}, "get_text_features"),
    }
    return found | {
        name: Life(lambda make=make: _seeded(make), inputs, call)
        for name, (make, inputs, call) in makers.items()
    }


def output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what a forward gives, as one float32 tensor."""
    with torch.no_grad():
        out = model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    return next(
        out[name] for name in ("logits", "logits_per_text", "last_hidden_state") if name in out
    ).float()


def called(model: Any, life: Life) -> Tensor:
    """Return what the other call gives: tokens, or features."""
    first = {k: v for k, v in life.inputs.items() if k != "decoder_input_ids"}
    with torch.no_grad():
        if life.call == "generate":
            return model.generate(**first, **GREEDY)
        out = getattr(model, life.call)(life.inputs["input_ids"])
    return (out if isinstance(out, Tensor) else out.pooler_output).float()


def theirs(base: Path) -> None:
    """Let transformers alone load every folder below `base`, and write what comes out."""
    found = {}
    for folder in sorted(base.iterdir()):
        life = lives()[folder.name]
        try:
            cls = getattr(hf, json.loads((folder / "config.json").read_text())["architectures"][0])
            model = cls.from_pretrained(folder).eval()
            found[folder.name] = (output(model, life.inputs), called(model, life) if life.call else None)
        except Exception as e:  # noqa: BLE001 - what it raises is what is asked
            found[folder.name] = f"{type(e).__name__}"
    assert not any(name.partition(".")[0] == "mono_quant" for name in sys.modules)
    torch.save(found, base / "theirs.pt")


def error(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def row(name: str, life: Life, base: Path) -> tuple[dict[str, str], Any]:
    """Return what one model's life shows, and a float model with the weights that its codes stand for."""
    # the process that stands for others must not have it
    import mono_quant  # noqa: PLC0415

    original = life.build()
    floats, folder = base / "float" / name, base / "int8" / name
    original.save_pretrained(floats)
    original = type(original).from_pretrained(floats).eval()
    in_memory = mono_quant.quantize(original, fidelity=False).model
    model = type(original).from_pretrained(floats, quantization_config=mono_quant.MonoQuantConfig())
    a, b = in_memory.state_dict(), model.state_dict()
    same = a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
    model.save_pretrained(folder)
    loaded = mono_quant.load(folder)
    loaded.save_pretrained(base / "again" / name)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    here = output(model, life.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        try:
            compiled = output(torch.compile(loaded, fullgraph=True, backend="aot_eager"), life.inputs)
            graph = f"{error(here, compiled):.4f}"
        except Exception as e:  # noqa: BLE001 - a graph that breaks is said in the table
            graph = f"no: {type(e).__name__}"
    sizes = [(p.numel() * p.element_size(), p.dtype) for p in loaded.parameters()]
    share = sum(size for size, dtype in sizes if dtype == torch.int8) / sum(size for size, _ in sizes)
    tokens = torch.equal(called(model, life), called(loaded, life)) if life.call else None
    cells = {
        "model": name,
        "on load = in memory": _yes(same),
        "error": f"{error(output(original, life.inputs), here):.4f}",
        "loads as saved": _yes(
            torch.equal(
                output(loaded, life.inputs), output(mono_quant.load(base / "again" / name), life.inputs)
            )
        ),
        "saves the same bytes": _yes(
            files == {p.name: p.read_bytes() for p in (base / "again" / name).iterdir()}
        ),
        "int8 of parameters": f"{share:.0%} of {sum(size for size, _ in sizes) / 1e3:.0f} kB",
        "compiled": graph,
        "tokens": "" if tokens is None else _yes(tokens),
    }
    return cells, copy.deepcopy(model).dequantize()


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.theirs:
        theirs(asked.theirs)
        return 0
    chosen = {name: life for name, life in lives().items() if not asked.models or name in asked.models}
    rows, meant = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        for name, life in chosen.items():
            cells, float_model = row(name, life, base)
            rows.append(cells)
            meant[name] = (output(float_model, life.inputs), called(float_model, life) if life.call else None)
            print(name, file=sys.stderr)
        subprocess.run([sys.executable, __file__, "--theirs", str(base / "int8")], check=True)
        found = torch.load(base / "int8" / "theirs.pt")
    for cells in rows:
        ours, there = meant[cells["model"]], found[cells["model"]]
        if isinstance(there, str):
            cells |= {"vanilla": f"stops: {there}", "its calls": ""}
            continue
        cells["vanilla"] = f"{error(ours[0], there[0]):.4f}"
        if ours[1] is None:
            cells["its calls"] = ""
        elif ours[1].is_floating_point():
            cells["its calls"] = f"{error(ours[1], there[1]):.4f}"
        else:
            cells["its calls"] = _yes(torch.equal(ours[1], there[1]))
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for cells in rows:
        print("| " + " | ".join(cells[column] for column in COLUMNS) + " |")
    return any("NO" in cells.values() for cells in rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    raise SystemExit(main())
