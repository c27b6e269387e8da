"""The three layouts of a saved model, as pure functions: which one a model needs, and what goes into it.

`compressed-tensors`: int8 linear layers of a transformers model, in the `int-quantized` format that transformers and vLLM read.
`mono_quant`: everything else in int8. The codes lie flat (1-D) under the original names, so that every other loader stops at the
shape instead of taking codes for weights. `plain`: float16.
"""

from collections.abc import Iterable

import torch
from torch import nn

from mono_quant.convert.stored import StoredModule
from mono_quant.hf.compressed_tensors import STANDARD
from mono_quant.io.disk.manifest import FORMAT
from mono_quant.planning.kinds import PORTABLE_KINDS
from mono_quant.planning.report import QuantReport
from mono_quant.planning.walk import common_dtype

PLAIN = "plain"
KINDS = ("module", "transformers", "diffusers", "sentence_transformer")
# Kinds whose tensors have one name in memory and in the file, and whose config says no dtype.
IN_OWN_NAMES = ("module", "diffusers")
LAYOUTS = (STANDARD, FORMAT, PLAIN)


def layout_of(kind: str, report: QuantReport, ranks: Iterable[int], obstacle: str = "") -> str:
    """Return the layout that a converted model needs.

    Args:
        kind: of the source, one of `KINDS`.
        report: of the conversion.
        ranks: number of dimensions of each tensor that holds int8 codes in the file.
        obstacle: why transformers cannot load the standard layout of this model; empty when it can.
    """
    if report.dtype == "fp16":
        return PLAIN
    portable = not obstacle and all(row.kind in PORTABLE_KINDS for row in report.quantized)
    # experts that lie in one tensor in the file, too, have no standard form
    portable = portable and all(rank == 2 for rank in ranks)
    return STANDARD if portable and kind not in IN_OWN_NAMES else FORMAT


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of most of the float part, in which a weight that is stored otherwise counts as what it reads as."""
    stored = [module for module in model.modules() if isinstance(module, StoredModule)]
    inside = {id(p) for module in stored for p in module.parameters(recurse=False)}
    return common_dtype([
        *((p.dtype, p.numel()) for p in model.parameters() if id(p) not in inside),
        *((m.float_dtype, sum(p.numel() for p in m.parameters(recurse=False))) for m in stored),
    ])
