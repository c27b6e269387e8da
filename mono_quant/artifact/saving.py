"""Writing a converted model as one folder that appears whole or not at all; see `layouts` for the forms."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mono_quant.artifact.buffers import buffers_of, write_values
from mono_quant.artifact.cards import CardFacts, render
from mono_quant.artifact.changes import as_it_is, asked_again
from mono_quant.artifact.facts import Manifest, StoredCodes, card_facts
from mono_quant.artifact.layouts import IN_OWN_NAMES, PLAIN, float_dtype, layout_of
from mono_quant.artifact.merging import foresee, merge_card
from mono_quant.convert.int8_layers import Int8Module, narrow_scales, schemes_in, tensors_of
from mono_quant.convert.kept import read_dtypes
from mono_quant.errors import MonoQuantError, OutputExistsError, UnsupportedModelError
from mono_quant.hf import diffusion, models
from mono_quant.hf.adapters import refuse_adapters
from mono_quant.hf.around import is_as_filed
from mono_quant.hf.compressed_tensors import STANDARD, ct_block
from mono_quant.hf.configs import clean_config, config_to_write
from mono_quant.hf.diffusion import STEM, check_diffusion, config_of
from mono_quant.hf.encoders import encoder_of
from mono_quant.hf.floats import refuse_offloaded
from mono_quant.hf.names import standard_obstacle
from mono_quant.hf.remedies import check_described
from mono_quant.hf.sentence import check_modules, settings_of, write_modules
from mono_quant.hf.state import at_rest, checkpoint_state
from mono_quant.io.disk.allowed import is_licence
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.manifest import FORMAT, FORMAT_VERSION, README, REPORT
from mono_quant.io.disk.output import OutputFolder, check_target, new_folder, shared_folder
from mono_quant.io.disk.reading import open_regular, read_all
from mono_quant.io.hub.metadata import MAX_CARD_BYTES
from mono_quant.io.tensors.shards import write_checkpoint
from mono_quant.io.tensors.tensor_file import TensorEntry
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.kinds import flattened
from mono_quant.planning.report import QuantReport, dtype_name
from mono_quant.planning.walk import is_transformers_model, memory_of
from mono_quant.sources.origin import Origin
from mono_quant.sources.source import Subject

MAX_SHARD_SIZE = 5 * 10**9

# Puts tensors into the files of a folder under construction, with the stem of their names.
Put = Callable[[OutputFolder, Sequence[TensorEntry], str], None]


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
        target: the folder; it must not exist, unless `overwrite` and mono_quant wrote all that is in it. What its owner wrote
            on the card of an older result stays.
        subject: the converted model and what belongs to it.
        report: of the conversion.
        config: the request.
        overwrite: replace an older result.
        max_shard_size: in bytes, or text such as `5GB`.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: `load` would not give this model back, or adapters are attached to it.
        OutputExistsError: files that mono_quant did not write would get lost, or the card's words contradict the new model.
        OutputError: it could not be written; nothing was changed.
    """
    refuse_offloaded(subject.model)
    return save_with(target, subject, report, config, _writer(max_shard_size), overwrite=overwrite)


def save_with(
    target: str | Path,
    subject: Subject,
    report: QuantReport,
    config: QuantizationConfig,
    put: Put,
    *,
    overwrite: bool = False,
) -> Path:
    """Do the same, with the weights put into the folder by the caller.

    Args:
        target, subject, report, config, overwrite: as for `save`; the model may be on meta.
        put: called with the folder under construction, what belongs into its weight files, and the stem of their names.

    Returns:
        The folder.

    Raises:
        MonoQuantError: as `save`.
    """
    subject = _as_saved(subject)
    sources = [subject.folder] if subject.folder else []
    opened = new_folder(target, overwrite=overwrite, sources=sources, merges=[README])
    with at_rest(subject.model):
        _save(opened, target, subject, report, config, put)
    return Path(target)


def weights_to_save(subject: Subject, report: QuantReport) -> tuple[list[TensorEntry], str]:
    """Return what `save` puts into the weight files of a model, and the stem of their names; the model may be on meta.

    Raises:
        UnsupportedModelError: `load` would not give this model back.
    """
    subject = _in_saved_form(subject)
    with at_rest(subject.model):
        state = state_of(subject, report)
        layout = _layout(subject, report, state)
        _check_savable(subject, state, layout)
        entries, _ = _entries(subject, state, layout)
    return entries, _stem(subject)


def codes_to_save(subject: Subject, report: QuantReport) -> tuple[dict[str, StoredCodes], bool]:
    """Return how the int8 codes of a model lie in the files that `save` writes, by name there, and whether they lie flat."""
    subject = _in_saved_form(subject)
    with at_rest(subject.model):
        state = state_of(subject, report)
        layout = _layout(subject, report, state)
        _, table = _entries(subject, state, layout)
    return table, layout == FORMAT


def _writer(max_shard_size: int | str) -> Put:
    def put(folder: OutputFolder, entries: Sequence[TensorEntry], stem: str) -> None:
        write_checkpoint(folder, entries, max_shard_size, stem)

    return put


def _stem(subject: Subject) -> str:
    return STEM if subject.kind == "diffusers" else "model"


def save_beside(
    target: str | Path,
    subject: Subject,
    report: QuantReport,
    config: QuantizationConfig,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write a converted model into a folder that others use as well, as transformers does: their files stay.

    Args:
        target: the folder; made when missing.
        subject, report, config, max_shard_size: as for `save`.

    Raises:
        MonoQuantError: as `save`; nothing was changed.
    """
    refuse_offloaded(subject.model)
    subject = _as_saved(subject)
    with at_rest(subject.model):
        _save(shared_folder(target), target, subject, report, config, _writer(max_shard_size))


def _save(
    opened: AbstractContextManager[OutputFolder],
    target: str | Path,
    subject: Subject,
    report: QuantReport,
    config: QuantizationConfig,
    put: Put,
) -> None:
    refuse_adapters(subject.model)
    converted = report
    report = as_it_is(report, subject.model, subject.core_name, subject.samples)
    config = asked_again(config, converted, report)
    state = state_of(subject, report)
    layout = _layout(subject, report, state)
    _check_savable(subject, state, layout)
    dtype = read_dtype(subject, layout)
    buffers = buffers_of(subject.core, dtype)
    with opened as folder:
        entries, table = _entries(subject, state, layout)
        put(folder, entries, _stem(subject))
        if subject.kind == "diffusers":
            folder.write_json("config.json", config_of(subject.core) | _own_method(layout))
        elif is_transformers_model(subject.core):
            _write_configs(folder, subject, state, layout)
        _write_side_files(folder, subject)
        write_values(folder, buffers.values)
        about = card_facts(subject, report, config, layout, "tokenizer_config.json" in folder.files)
        folder.write_text(README, _card(Path(target), about))
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
            about.encoder,
            buffers.built,
            narrowed=narrowed_in(subject, report),
            activations=schemes_in(subject.core),
        ).to_dict()


def check_save(target: str | Path, origin: Origin, *, overwrite: bool = False) -> None:
    """Refuse early what `save` would refuse after long work.

    Args:
        target: the folder.
        origin: of the model that will be converted.
        overwrite: replace an older result.

    Raises:
        OutputError: see `save`.
    """
    check_target(target, overwrite=overwrite, merges=[README])
    there, earlier = _old_card(Path(target))
    _refuse_card(Path(target), foresee(there, earlier, origin, None))


def _card(target: Path, about: CardFacts) -> str:
    """Return the card of a folder, with what the owner of the one that it replaces wrote."""
    merged = merge_card(*_old_card(target), render(about), about)
    _refuse_card(target, merged.problems)
    return merged.text


def _old_card(target: Path) -> tuple[bytes | None, Origin | None]:
    """Return the card of an older result, and where the model came from that it speaks of."""
    if not (target / README).is_file():
        return None, None
    descriptor = open_regular(target / README)
    try:
        there = read_all(descriptor, MAX_CARD_BYTES + 1)
    finally:
        os.close(descriptor)
    with suppress(MonoQuantError):
        return there, Manifest.read(target).source
    return there, None


def _refuse_card(target: Path, problems: Sequence[str]) -> None:
    if problems:
        raise OutputExistsError(
            f"{target / README} has words of its owner, and cannot hold ours beside them: {'; '.join(problems[:5])}. "
            "Correct it, move it away, or choose another folder"
        )


def render_card(subject: Subject, report: QuantReport, config: QuantizationConfig) -> str:
    """Return the card that `save` would write."""
    subject = _as_saved(subject)
    with at_rest(subject.model):
        converted = report
        report = as_it_is(report, subject.model, subject.core_name, subject.samples)
        config = asked_again(config, converted, report)
    # float16 has one layout, whatever the tensors: none is cast to choose it
    state = {} if report.dtype == "fp16" else state_of(subject, report)
    layout = _layout(subject, report, state)
    has_tokenizer = "tokenizer_config.json" in subject.side_files or subject.processor is not None
    return render(card_facts(subject, report, config, layout, has_tokenizer))


def _as_saved(subject: Subject) -> Subject:
    """Return the subject in the form it is saved in: what only the user's code can build is a plain module."""
    return _in_saved_form(subject.with_hashes())


def _in_saved_form(subject: Subject) -> Subject:
    if subject.kind == "module" or _builds_itself(subject):
        return subject
    if subject.kind == "sentence_transformer":
        raise UnsupportedModelError(
            f"a {type(subject.model).__name__} builds its transformer by itself, and transformers has no class "
            f"{type(subject.core).__name__} that is this one; quantize model[0].auto_model by itself"
        )
    return replace(subject, kind="module")


def _builds_itself(subject: Subject) -> bool:
    if subject.kind == "diffusers":
        return diffusion.builds_itself(subject.core)
    return models.builds_itself(subject.core)


def _check_savable(subject: Subject, state: Mapping[str, Tensor], layout: str) -> None:
    """Refuse a model that `load` would not give back, before anything is written."""
    if subject.kind == "diffusers":
        check_diffusion(subject.core, state)
    elif subject.kind != "module":
        _check_described(subject, state, layout)


def _check_described(subject: Subject, state: Mapping[str, Tensor], layout: str) -> None:
    """Refuse what `load` would not build, before anything is written."""
    core, name = subject.core, type(subject.core).__name__
    where = "result.model.config"
    otherwise = f"make it in a class of your own (class My{name}({name}): ...) for load(folder, model=...)"
    if subject.kind == "sentence_transformer":
        check_modules(subject.model)
        where = "result.model[0].auto_model.config"
        otherwise = ""
    check_described(
        core, state, lambda config: _config_json(subject, config, state, layout), where, otherwise
    )


def _layout(subject: Subject, report: QuantReport, state: Mapping[str, Tensor]) -> str:
    obstacle = "" if subject.kind in IN_OWN_NAMES else standard_obstacle(subject.core)
    ranks = (tensor.dim() for tensor in state.values() if tensor.dtype == torch.int8)
    return layout_of(subject.kind, report, ranks, obstacle)


def state_of(subject: Subject, report: QuantReport) -> dict[str, Tensor]:
    """Return the tensors of a converted model by the names they have in the file."""
    prefix = f"{subject.core_name}." if subject.core_name else ""
    # some of what the file has in half precision is float32 in memory, with the same values
    rows = {row.name.removeprefix(prefix): row for row in report.rows}
    asked = _narrowed(subject, report)
    halves = {n: torch.float16 for n, row in rows.items() if row.dtype_after == "float16" and n not in asked}
    halves |= {name: getattr(torch, rows[name].dtype_after) for name in narrowed_in(subject, report)}
    if subject.kind in IN_OWN_NAMES:
        first: dict[tuple[int, torch.Size], str] = {}
        state = tensors_of(subject.model)
        for name, tensor in list(state.items()):
            if not isinstance(tensor, Tensor):
                raise UnsupportedModelError(
                    f"{name} in the state dict is a {type(tensor).__name__}, not a tensor"
                )
            if tensor.numel() and first.setdefault(memory_of(tensor), name) != name:
                del state[name]
        state = {name: tensor.to(halves.get(name, tensor.dtype)) for name, tensor in state.items()}
        return narrow_scales(subject.model, state)
    return checkpoint_state(subject.core, halves)


def narrowed_in(subject: Subject, report: QuantReport) -> dict[str, torch.dtype]:
    """Return what a forward sees of the tensors that are stored in half precision on request, by all their names in the core."""
    return read_dtypes(subject.core, _narrowed(subject, report))


def _narrowed(subject: Subject, report: QuantReport) -> set[str]:
    prefix = f"{subject.core_name}." if subject.core_name else ""
    first = {row.name for row in report.rows if row.narrowed}
    names = first | {row.name for row in report.rows if row.action == "shared" and row.reason in first}
    return {name.removeprefix(prefix) for name in names}


def _entries(
    subject: Subject, state: Mapping[str, Tensor], layout: str
) -> tuple[list[TensorEntry], dict[str, StoredCodes]]:
    """Return what goes into the weight files, and how the int8 codes lie in them."""
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
            kind = "transposed_linear" if name in transposed else "linear"
            entries.append(_entry(name, (tensor.numel(),), torch.int8, _flat(tensor, kind)))
        else:
            entries.append(_entry(name, tuple(tensor.shape), tensor.dtype, _as_is(tensor)))
    return entries, table


def _entry(name: str, shape: tuple[int, ...], dtype: torch.dtype, get: Callable[[], Tensor]) -> TensorEntry:
    return TensorEntry(name, dtype, shape, get)


def _flat(codes: Tensor, kind: str) -> Callable[[], Tensor]:
    return lambda: flattened(codes.detach().cpu(), kind)


def _as_is(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor.detach().cpu()


def read_dtype(subject: Subject, layout: str) -> torch.dtype:
    """Return what a float weight of a saved model is read as, unless it says otherwise for itself."""
    if layout == PLAIN:
        return torch.float16
    # a plain module has no config to say it in, and that of diffusers names no dtype
    return torch.float32 if subject.kind in IN_OWN_NAMES else float_dtype(subject.core)


def _write_configs(folder: OutputFolder, subject: Subject, state: Mapping[str, Tensor], layout: str) -> None:
    core: Any = subject.core
    folder.write_json("config.json", _config_json(subject, core.config, state, layout))
    generation = getattr(core, "generation_config", None)
    if generation is not None and core.can_generate():
        folder.write_json("generation_config.json", clean_config(generation.to_diff_dict())[0])


def _config_json(subject: Subject, config: Any, state: Mapping[str, Tensor], layout: str) -> dict[str, Any]:
    core = subject.core
    dtype = torch.float16 if layout == PLAIN else float_dtype(core)
    data = config_to_write(config, subject.config, dtype_name(dtype))
    data["architectures"] = [type(core).__name__]
    if layout == STANDARD:
        data["quantization_config"] = ct_block(core, state)
    return data | _own_method(layout)


def _own_method(layout: str) -> dict[str, Any]:
    """Return what a `config.json` says of codes that only mono_quant reads."""
    if layout != FORMAT:
        return {}
    return {"quantization_config": {"quant_method": FORMAT, "format_version": FORMAT_VERSION}}


def _write_side_files(folder: OutputFolder, subject: Subject) -> None:
    own = subject.kind == "sentence_transformer" and not _is_as_read(subject)
    if own:
        write_modules(folder, subject.model, subject.core)
    if subject.folder is not None:
        for name in subject.side_files:
            if not own or is_licence(name):
                _copy_side_file(folder, name, subject.folder / name)
    elif subject.kind != "sentence_transformer" and subject.processor is not None:
        folder.adopt(subject.processor.save_pretrained)


def _is_as_read(subject: Subject) -> bool:
    """Tell whether the files that a SentenceTransformer was read from still say what it is."""
    if subject.folder is None or subject.settings != settings_of(subject.model):
        return False
    encoder = encoder_of(subject.folder, subject.config or {})
    return encoder is not None and is_as_filed(subject.model, subject.folder, encoder)


def _copy_side_file(folder: OutputFolder, name: str, path: Path) -> None:
    if name.endswith("_config.json") and "/" not in name:
        raw = read_json_object(path)
        clean, dropped = clean_config(raw)
        paths = [k for k in clean if k.endswith("_file")]
        if dropped or paths:
            folder.write_json(name, {k: v for k, v in clean.items() if k not in paths})
            return
    folder.copy(name, path)
