"""Writing a converted model as one folder that appears whole or not at all; the layouts are in `formats`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mono_quant.artifact.buffers import buffers_of, write_values
from mono_quant.artifact.cards import render
from mono_quant.artifact.facts import REPORT, Manifest, StoredCodes, card_facts
from mono_quant.artifact.layouts import PLAIN, float_dtype, layout_of
from mono_quant.convert.int8_layers import Int8Module
from mono_quant.errors import (
    UnsupportedModelError,
)
from mono_quant.hf.compressed_tensors import STANDARD, ct_block
from mono_quant.hf.configs import clean_config, plain_config
from mono_quant.hf.names import standard_obstacle
from mono_quant.hf.sentence import write_modules
from mono_quant.hf.state import at_rest, checkpoint_state
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.manifest import FORMAT, FORMAT_VERSION
from mono_quant.io.disk.output import OutputFolder, new_folder
from mono_quant.io.tensors.shards import write_checkpoint
from mono_quant.io.tensors.tensor_file import TensorEntry
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.report import QuantReport, dtype_name
from mono_quant.sources.source import Subject

MAX_SHARD_SIZE = 5 * 10**9


def save(
    target: str | Path,
    subject: Subject,
    report: QuantReport,
    config: QuantizationConfig,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a converted model as a folder that appears whole or not at all.

    Args:
        target: the folder; it must not exist, unless `overwrite` and mono_quant wrote it.
        subject: the converted model and what belongs to it.
        report: of the conversion.
        config: the request.
        overwrite: replace an older result.
        max_shard_size: in bytes, or text such as `5GB`.

    Returns:
        The folder.

    Raises:
        OutputError: it could not be written; nothing was changed.
    """
    with at_rest(subject.model):
        _save(target, subject, report, config, overwrite, max_shard_size)
    return Path(target)


def _save(
    target: str | Path,
    subject: Subject,
    report: QuantReport,
    config: QuantizationConfig,
    overwrite: bool,
    max_shard_size: int | str,
) -> None:
    state = state_of(subject, report)
    layout = _layout(subject, report, state)
    dtype = read_dtype(subject, layout)
    buffers = buffers_of(subject.core, dtype)
    with new_folder(
        target, overwrite=overwrite, sources=[subject.folder] if subject.folder else []
    ) as folder:
        table = _write_tensors(folder, subject, state, layout, max_shard_size)
        if subject.kind != "module":
            _write_configs(folder, subject, state, layout, dtype)
        _write_side_files(folder, subject)
        write_values(folder, buffers.values)
        about = card_facts(subject, report, config, layout, "tokenizer_config.json" in folder.files)
        folder.write_text("README.md", render(about))
        folder.write_text(REPORT, report.to_json())
        folder.manifest |= Manifest(
            type(subject.core).__name__,
            subject.kind,
            layout,
            report.dtype,
            table,
            buffers.casts,
            subject.origin,
            config.to_dict(),
            about.versions,
            about.inputs,
            about.generates,
            buffers.built,
        ).to_dict()


def render_card(subject: Subject, report: QuantReport, config: QuantizationConfig) -> str:
    """Return the card that `save` would write."""
    layout = _layout(subject, report, state_of(subject, report))
    has_tokenizer = "tokenizer_config.json" in subject.side_files or subject.processor is not None
    return render(card_facts(subject, report, config, layout, has_tokenizer))


def _layout(subject: Subject, report: QuantReport, state: Mapping[str, Tensor]) -> str:
    obstacle = "" if subject.kind == "module" else standard_obstacle(subject.core)
    return layout_of(subject.kind, report, state, obstacle)


def state_of(subject: Subject, report: QuantReport) -> dict[str, Tensor]:
    """Return the tensors of a converted model by the names they have in the file."""
    prefix = f"{subject.core_name}." if subject.core_name else ""
    # some of a float16 model is float32 in memory, with values that float16 holds
    halves = {row.name.removeprefix(prefix) for row in report.rows if row.dtype_after == "float16"}
    if subject.kind == "module":
        first: dict[tuple[int, torch.Size], str] = {}
        state = subject.model.state_dict()
        for name, tensor in list(state.items()):
            if not isinstance(tensor, Tensor):
                raise UnsupportedModelError(
                    f"{name} in the state dict is a {type(tensor).__name__}, not a tensor"
                )
            key = (tensor.data_ptr(), tensor.shape)
            if tensor.numel() and first.setdefault(key, name) != name:
                del state[name]
        return {name: tensor.half() if name in halves else tensor for name, tensor in state.items()}
    return checkpoint_state(subject.core, halves)


def _write_tensors(
    folder: OutputFolder,
    subject: Subject,
    state: Mapping[str, Tensor],
    layout: str,
    max_shard_size: int | str,
) -> dict[str, StoredCodes]:
    """Write the weights and say how the int8 codes lie in them."""
    transposed = {
        f"{name}.weight".lstrip(".")
        for name, module in subject.core.named_modules()
        if isinstance(module, Int8Module) and module.kind == "transposed_linear"
    }
    table: dict[str, StoredCodes] = {}
    entries = []
    for name, tensor in sorted(state.items()):
        scale = state.get(f"{name}_scale")
        is_code = tensor.dtype == torch.int8 and scale is not None and layout != PLAIN
        if is_code and scale is not None:
            table[name] = StoredCodes(tuple(tensor.shape), name in transposed, tuple(scale.shape))
        if is_code and layout == FORMAT:
            rows = tensor.t() if name in transposed else tensor
            entries.append(_entry(name, (tensor.numel(),), torch.int8, _flat(rows)))
        else:
            entries.append(_entry(name, tuple(tensor.shape), tensor.dtype, _as_is(tensor)))
    write_checkpoint(folder, entries, max_shard_size)
    return table


def _entry(name: str, shape: tuple[int, ...], dtype: torch.dtype, get: Callable[[], Tensor]) -> TensorEntry:
    return TensorEntry(name, dtype, shape, get)


def _flat(rows: Tensor) -> Callable[[], Tensor]:
    return lambda: rows.detach().cpu().contiguous().view(-1)


def _as_is(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor.detach().cpu()


def read_dtype(subject: Subject, layout: str) -> torch.dtype:
    """Return what a float weight of a saved model is read as, unless it says otherwise for itself."""
    if layout == PLAIN:
        return torch.float16
    # a plain module has no config to say it in
    return torch.float32 if subject.kind == "module" else float_dtype(subject.core)


def _write_configs(
    folder: OutputFolder, subject: Subject, state: Mapping[str, Tensor], layout: str, dtype: torch.dtype
) -> None:
    core: Any = subject.core
    data, _ = clean_config(plain_config(core.config))
    data |= {"architectures": [type(core).__name__], "dtype": dtype_name(dtype)}
    if layout == STANDARD:
        data["quantization_config"] = ct_block(core, state)
    elif layout == FORMAT:
        data["quantization_config"] = {"quant_method": FORMAT, "format_version": FORMAT_VERSION}
    folder.write_json("config.json", data)
    generation = getattr(core, "generation_config", None)
    if generation is not None and core.can_generate():
        folder.write_json("generation_config.json", clean_config(generation.to_diff_dict())[0])


def _write_side_files(folder: OutputFolder, subject: Subject) -> None:
    if subject.folder is not None:
        for name in subject.side_files:
            _copy_side_file(folder, name, subject.folder / name)
    if subject.kind == "sentence_transformer":
        write_modules(folder, subject.model, subject.core)
    elif subject.folder is None and subject.processor is not None:
        folder.adopt(subject.processor.save_pretrained)


def _copy_side_file(folder: OutputFolder, name: str, path: Path) -> None:
    if name.endswith("_config.json") and "/" not in name:
        raw = read_json_object(path)
        clean, dropped = clean_config(raw)
        paths = [k for k in clean if k.endswith("_file")]
        if dropped or paths:
            folder.write_json(name, {k: v for k, v in clean.items() if k not in paths})
            return
    folder.copy(name, path)
