"""The README of a saved model: plain text from the report, with nothing in it that was not measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mono_quant.report import QuantReport
from mono_quant.version import __version__


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        name: class of the model.
        repo_id: canonical Hub id of the source; None for anything local.
        sha: commit of the source.
    """

    name: str
    repo_id: str | None = None
    sha: str | None = None


def render(report: QuantReport, origin: Origin, layout: str, settings: Mapping[str, Any]) -> str:
    """Return the card.

    Args:
        report: of the conversion.
        origin: where the model came from.
        layout: the format of the folder: `compressed-tensors`, `mono_quant` or `plain`.
        settings: the request, as plain data.
    """
    what = "INT8 (W8A8, dynamic)" if report.dtype == "int8" else "FP16"
    source = f"`{origin.repo_id}` at commit `{origin.sha}`" if origin.repo_id else "a local model"
    lines = [
        f"# {origin.name}, {what}",
        "",
        f"{what} version of {source}, made with mono_quant {__version__}, without calibration data.",
        "",
        "## What became of every parameter",
        "",
        "```",
        report.table(),
        "```",
        "",
        "## How to load it",
        "",
        *_LOADING[layout],
        "",
        "## How it was made",
        "",
        "```json",
        *(f"{k}: {v!r}" for k, v in sorted(settings.items())),
        "```",
        "",
    ]
    return "\n".join(lines)


_LOADING = {
    "compressed-tensors": (
        "`mono_quant.load(folder)` keeps the weights in int8 and computes in int8. The folder is a standard "
        "compressed-tensors checkpoint as well: transformers loads it (and computes in float), vLLM serves it in int8.",
    ),
    "mono_quant": (
        "`mono_quant.load(folder)`. The weights are in mono_quant's own layout, because a standard one cannot hold "
        "all of these layers; other loaders refuse the file.",
    ),
    "plain": ("As any float16 checkpoint, or with `mono_quant.load(folder)`.",),
}
