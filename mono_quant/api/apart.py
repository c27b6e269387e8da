"""A model and what it is converted to, run while their weights stay in their files: so that what fits no memory is measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from mono_quant.artifact.saving import codes_to_save
from mono_quant.artifact.tensors import SavedTensors
from mono_quant.convert.surgery import recast_, structural_copy
from mono_quant.hf.apart import apart, made_of
from mono_quant.hf.making import Made
from mono_quant.io.tensors.blockwise import Dequantized
from mono_quant.io.tensors.checkpoint import Checkpoint
from mono_quant.planning.report import QuantReport
from mono_quant.planning.walk import tensor_names
from mono_quant.sources.source import Source, Subject


@contextmanager
def original_apart(source: Source, checkpoint: Checkpoint) -> Iterator[Subject]:
    """Let the float model of a checkpoint run for the block, in the dtypes in which transformers loads it.

    Args:
        source: with a skeleton in it, which stays as it is.
        checkpoint: its weights; fp8 is dequantized as it is read.

    Raises:
        ProbeError: it cannot run like that.
    """
    work = replace(source.subject, model=structural_copy(source.subject.model))
    recast_(work.core, source.dtypes)
    shapes = {name: tensor.shape for name, tensor, _ in tensor_names(work.core)}
    tensors = checkpoint if source.codes is None else Dequantized(checkpoint, source.codes)
    with apart(work.core, Made(source.subject.core, source.placed.recipes, tensors, shapes)):
        yield work


@contextmanager
def result_apart(subject: Subject, report: QuantReport, saved: Checkpoint) -> Iterator[Subject]:
    """Let a converted model run for the block, with the weights that were written for it.

    Args:
        subject: the converted skeleton with what belongs to it; stays as it is.
        report: of the conversion.
        saved: the weight files.

    Raises:
        ProbeError: it cannot run like that.
    """
    table, is_flat = codes_to_save(subject, report)
    tensors = SavedTensors(saved, table, is_flat)
    work = replace(subject, model=structural_copy(subject.model))
    made = made_of(subject.core, tensors, tensors.headers(), table)
    prefix = f"{subject.core_name}." if subject.core_name else ""
    stored = {row.name.removeprefix(prefix): getattr(torch, row.dtype_after) for row in report.rows}
    with apart(work.core, made, stored):
        yield work
