"""A saved model: written as one folder, read back bit for bit. The layouts are in `formats`."""

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant import bridge
from mono_quant.adapters import Source, side_files
from mono_quant.allowed import is_allowed
from mono_quant.cards import CardFacts, Origin, render
from mono_quant.checkpoint import open_checkpoint
from mono_quant.config import QuantizationConfig
from mono_quant.convert import cast_inputs_, install_, structural_copy
from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    FormatVersionError,
    MissingFileError,
    UnsupportedModelError,
)
from mono_quant.files import OutputFolder, new_folder
from mono_quant.formats import (
    LAYOUTS,
    PLAIN,
    STANDARD,
    check_ct,
    checked_scale,
    ct_block,
    dtype_of,
    float_dtype,
    layout_of,
    unflatten,
)
from mono_quant.json_reader import read_json_object
from mono_quant.layers import weight_owners
from mono_quant.manifest import FORMAT, FORMAT_VERSION, MANIFEST, read_manifest, verify_manifest
from mono_quant.modules import Int8TransposedLinear
from mono_quant.report import QuantReport
from mono_quant.selection import DEFAULTS
from mono_quant.sentence import load_modules, write_modules
from mono_quant.shards import write_checkpoint
from mono_quant.tensor_file import TensorEntry
from mono_quant.version import __version__

REPORT = "mono_quant_report.json"
MAX_SHARD_SIZE = 5 * 10**9


def save(
    target: str | Path,
    source: Source,
    report: QuantReport,
    config: QuantizationConfig,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a converted model as a folder that appears whole or not at all.

    Args:
        target: the folder; it must not exist, unless `overwrite` and mono_quant wrote it.
        source: the converted model and what belongs to it.
        report: of the conversion.
        config: the request.
        overwrite: replace an older result.
        max_shard_size: in bytes, or text such as `5GB`.

    Returns:
        The folder.

    Raises:
        OutputError: it could not be written; nothing was changed.
    """
    layout = layout_of(source.kind, report)
    state = _state(source)
    with new_folder(target, overwrite=overwrite, sources=[source.folder] if source.folder else []) as folder:
        table = _write_tensors(folder, source, state, layout, max_shard_size)
        if source.kind != "module":
            _write_configs(folder, source, state, layout)
        _write_side_files(folder, source)
        about = card_facts(source, report, config, "tokenizer_config.json" in folder.files)
        folder.write_text("README.md", render(about))
        folder.write_text(REPORT, report.to_json())
        folder.manifest |= {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "class": type(source.core).__name__,
            "kind": source.kind,
            "layout": layout,
            "dtype": report.dtype,
            "tensors": table,
            "kept": _kept(source, report),
            "buffers": _cast_buffers(source.core),
            "source": source.origin.to_dict(),
            "settings": config.to_dict(),
            "versions": dict(about.versions),
        }
    return Path(target)


def _state(source: Source) -> dict[str, Tensor]:
    if source.kind == "module":
        first: dict[tuple[int, torch.Size], str] = {}
        state = source.model.state_dict()
        for name, tensor in list(state.items()):
            if not isinstance(tensor, Tensor):
                raise UnsupportedModelError(
                    f"{name} in the state dict is a {type(tensor).__name__}, not a tensor"
                )
            key = (tensor.data_ptr(), tensor.shape)
            if tensor.numel() and first.setdefault(key, name) != name:
                del state[name]
        return dict(state)
    return bridge.checkpoint_state(source.core)


def _write_tensors(
    folder: OutputFolder, source: Source, state: Mapping[str, Tensor], layout: str, max_shard_size: int | str
) -> dict[str, Any]:
    """Write the weights and return the table of flat tensors: shape and whether the float one is transposed."""
    transposed = {
        f"{name}.weight".lstrip(".")
        for name, module in source.core.named_modules()
        if isinstance(module, Int8TransposedLinear)
    }
    table: dict[str, Any] = {}
    entries = []
    for name, tensor in sorted(state.items()):
        if layout == FORMAT and tensor.dtype == torch.int8 and f"{name}_scale" in state:
            rows = tensor.t() if name in transposed else tensor
            table[name] = {"shape": list(tensor.shape), "transposed": name in transposed}
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


def _write_configs(folder: OutputFolder, source: Source, state: Mapping[str, Tensor], layout: str) -> None:
    core: Any = source.core
    data, _ = bridge.clean_config(core.config.to_diff_dict())
    dtype = "float16" if layout == PLAIN else str(float_dtype(core)).removeprefix("torch.")
    data |= {"architectures": [type(core).__name__], "dtype": dtype}
    if layout == STANDARD:
        data["quantization_config"] = ct_block(core, state)
    elif layout == FORMAT:
        data["quantization_config"] = {"quant_method": FORMAT, "format_version": FORMAT_VERSION}
    folder.write_json("config.json", data)
    generation = getattr(core, "generation_config", None)
    if generation is not None and core.can_generate():
        folder.write_json("generation_config.json", bridge.clean_config(generation.to_diff_dict())[0])


def _write_side_files(folder: OutputFolder, source: Source) -> None:
    if source.folder is not None:
        for name in source.side_files:
            _copy_side_file(folder, name, source.folder / name)
    if source.kind == "sentence_transformer":
        write_modules(folder, source.model, source.core)
    elif source.folder is None and source.processor is not None:
        folder.adopt(source.processor.save_pretrained)


def _copy_side_file(folder: OutputFolder, name: str, path: Path) -> None:
    if name.endswith("_config.json") and "/" not in name:
        raw = read_json_object(path)
        clean, dropped = bridge.clean_config(raw)
        paths = [k for k in clean if k.endswith("_file")]
        if dropped or paths:
            folder.write_json(name, {k: v for k, v in clean.items() if k not in paths})
            return
    folder.copy(name, path)


def _kept(source: Source, report: QuantReport) -> dict[str, str]:
    """Name the tensors of `core` that stay in another dtype inside a float16 model."""
    if report.dtype != "fp16":
        return {}
    prefix = f"{source.core_name}." if source.core_name else ""
    return {
        row.name.removeprefix(prefix): row.dtype_after
        for row in report.rows
        if row.action == "kept" and row.dtype_after in ("float32", "bfloat16", "float64")
        if row.name.startswith(prefix) and row.reason != DEFAULTS["keep_in_fp32"]
    }


def load(
    folder: Path, model: nn.Module | Callable[[], nn.Module] | None = None, *, verify: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """Read a saved model back, or a compressed-tensors int8 checkpoint of somebody else.

    Args:
        folder: to read.
        model: for a plain module, an instance or a function that makes one; its weights are not used.
        verify: compare every file with the manifest's sha256 first.

    Returns:
        The model in evaluation mode, and the manifest (empty for a foreign checkpoint).

    Raises:
        MonoQuantError: a typed error for a missing, tampered, foreign or newer folder.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is no folder; give the folder that save() wrote")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        verify_manifest(folder, hashes=verify)
        return _load_own(folder, manifest, model), manifest
    return _load_foreign(folder), {}


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder after comparing every file with it."""
    manifest = read_manifest(folder)
    verify_manifest(folder, hashes=True)
    return manifest


def read_tensors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read all weights of a folder, codes in the shape of the float weight, without building a model.

    Raises:
        CorruptCheckpointError: codes or scales are not sound.
    """
    return _tensors(folder, manifest.get("tensors", {}))


def _load_own(
    folder: Path, manifest: Mapping[str, Any], model: nn.Module | Callable[[], nn.Module] | None
) -> nn.Module:
    kind, layout = manifest.get("kind"), manifest.get("layout")
    if kind == "module":
        return _load_plain(folder, manifest, model)
    if model is not None:
        raise ConfigError(f"{folder} holds a {manifest.get('class')} that builds itself; leave out model=")
    if kind not in ("transformers", "sentence_transformer") or layout not in LAYOUTS:
        raise FormatVersionError(
            f"{folder}: {MANIFEST} names kind {kind!r} and layout {layout!r}, which this version ({__version__}) does not "
            f"know; update mono_quant"
        )
    if kind == "sentence_transformer":
        return _load_sentence(folder, manifest)
    raw = read_json_object(folder / "config.json")
    cls, config = bridge.model_class(raw, folder, trust_remote_code=False)
    tensors = _tensors(folder, manifest.get("tensors", {}))
    if layout == PLAIN:
        loaded = bridge.load_float(cls, config, tensors, str(folder), torch.float16)
        kept = manifest.get("kept", {})
        _restore_kept(
            loaded, kept, lambda: bridge.load_float(cls, config, tensors, str(folder), torch.float32)
        )
    else:
        loaded = bridge.load_int8(cls, config, tensors, str(folder), dtype_of(raw))
    _recast_buffers(loaded, manifest)
    _set_generation(loaded, folder)
    return loaded


def _load_sentence(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    half = manifest.get("layout") == PLAIN
    model: Any = load_modules(folder, _codes(folder), half)
    kept = manifest.get("kept", {})
    if kept:
        cls, config = bridge.model_class(
            read_json_object(folder / "config.json"), folder, trust_remote_code=False
        )
        tensors = _tensors(folder, {})
        core = model[0].auto_model
        _restore_kept(core, kept, lambda: bridge.load_float(cls, config, tensors, str(folder), torch.float32))
    _recast_buffers(model[0].auto_model, manifest)
    return model  # type: ignore[no-any-return]


def _load_plain(
    folder: Path, manifest: Mapping[str, Any], model: nn.Module | Callable[[], nn.Module] | None
) -> nn.Module:
    if model is None:
        raise ConfigError(
            f"{folder} holds a {manifest.get('class')}, which only your code can build; pass it: "
            f"load({str(folder)!r}, model={manifest.get('class')}(...)) or a function that makes it"
        )
    built = structural_copy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(built, nn.Module):
        raise ConfigError(f"model= made a {type(built).__name__}, not an nn.Module")
    tensors = _tensors(folder, manifest.get("tensors", {}))
    codes = {
        name for name, tensor in tensors.items() if tensor.dtype == torch.int8 and f"{name}_scale" in tensors
    }
    owners = weight_owners(built)
    stray = sorted(codes - owners.keys())
    if stray:
        raise CorruptCheckpointError(
            f"{folder}: {stray[0]} is int8, but {type(built).__name__} has no layer there that can hold it; pass the same "
            f"architecture that was saved"
        )
    install_(built, sorted({owners[name] for name in codes}))
    _fill_plain(built, tensors, folder)
    _recast_buffers(built, manifest)
    _cast_inputs_of(built, manifest.get("kept", {}))
    return built.eval()


def _fill_plain(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = model.state_dict(keep_vars=True)
    by_identity: dict[int, str] = {}
    for name, tensor in expected.items():
        first = by_identity.setdefault(id(tensor), name)
        if name not in tensors and first in tensors:
            tensors[name] = tensors[first]
    missing, left = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    if missing or left or wrong:
        raise CorruptCheckpointError(
            f"{folder} does not fit {type(model).__name__}: missing {missing[:3]}, left over {left[:3]}, "
            f"other shape {wrong[:3]}; pass the same architecture that was saved"
        )
    fresh: dict[int, nn.Parameter] = {}
    for name, old in expected.items():
        if old.is_meta:
            owner, _, last = name.rpartition(".")
            # one Parameter for all names it has, so that ties stay ties
            new = fresh.setdefault(id(old), nn.Parameter(tensors[name], requires_grad=old.requires_grad))
            model.get_submodule(owner)._parameters[last] = new
        else:
            old.data = tensors[name]


def _load_foreign(folder: Path) -> nn.Module:
    if not (folder / "config.json").exists():
        raise MissingFileError(f"{folder} has neither {MANIFEST} nor config.json; it is no saved model")
    raw = read_json_object(folder / "config.json")
    block = raw.get("quantization_config")
    if not isinstance(block, Mapping):
        raise UnsupportedModelError(
            f"{folder} is not quantized; use quantize({str(folder)!r}) first, or transformers to load it"
        )
    if block.get("quant_method") == FORMAT:
        raise MissingFileError(
            f"{folder} is a mono_quant model without its {MANIFEST}; download the whole folder again"
        )
    check_ct(folder, block)
    cls, config = bridge.model_class(raw, folder, trust_remote_code=False)
    loaded = bridge.load_int8(cls, config, _tensors(folder, {}), str(folder), dtype_of(raw))
    _set_generation(loaded, folder)
    return loaded


def _tensors(folder: Path, table: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read all tensors, give flat codes their shape back, and check codes and scales."""
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint[name] for name in checkpoint}
    for name, facts in table.items():
        tensors[name] = unflatten(folder, name, tensors.get(name), facts)
    for name, tensor in tensors.items():
        if name.endswith("_scale") and name.removesuffix("_scale") in tensors:
            tensors[name] = checked_scale(folder, name, tensor, tensors[name.removesuffix("_scale")], table)
        elif (
            tensor.dtype == torch.int8
            and name not in table
            and tensor.dim() > 1
            and f"{name}_scale" not in tensors
        ):
            raise CorruptCheckpointError(
                f"{folder}: {name} is int8 but has no {name}_scale; the checkpoint is incomplete"
            )
    return tensors


def _codes(folder: Path) -> list[str]:
    with open_checkpoint(folder) as checkpoint:
        return sorted(name for name, header in checkpoint.headers.items() if header.dtype == torch.int8)


def _restore_kept(model: nn.Module, kept: Mapping[str, str], full: Callable[[], nn.Module]) -> None:
    """Give tensors that were not cast their own dtype back, which transformers' loader takes from them."""
    if not kept:
        return
    wide = dict(full().named_parameters()) | dict(full().named_buffers())
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, dtype in kept.items():
        own[name].data = wide[name].data.to(getattr(torch, dtype))
    _cast_inputs_of(model, kept)


def _cast_inputs_of(model: nn.Module, kept: Mapping[str, str]) -> None:
    for name in sorted({tensor.rpartition(".")[0] for tensor in kept}):
        cast_inputs_(model.get_submodule(name))


def _set_generation(model: nn.Module, folder: Path) -> None:
    path = folder / "generation_config.json"
    current = getattr(model, "generation_config", None)
    if path.exists() and current is not None:
        model.generation_config = type(current).from_dict(read_json_object(path))


def read_report(folder: Path) -> QuantReport:
    """Return the report that a saved folder carries.

    Raises:
        MissingFileError: there is none.
    """
    if not (folder / REPORT).exists():
        raise MissingFileError(f"{folder} has no {REPORT}; it was not written by mono_quant")
    return QuantReport.from_dict(read_json_object(folder / REPORT, max_bytes=1 << 28))


def is_result_file(name: str) -> bool:
    """Tell whether a file of a repository belongs to a saved model."""
    return is_allowed(name)


def card_facts(
    source: Source, report: QuantReport, config: QuantizationConfig, has_tokenizer: bool
) -> CardFacts:
    """Gather what the card of a converted model is made from."""
    packages = ["torch"] if source.kind == "module" else ["torch", "transformers"]
    versions = {"mono_quant": __version__} | {name: metadata.version(name) for name in packages}
    layout = layout_of(source.kind, report)
    return CardFacts(report, source.origin, layout, source.kind, _given(config), versions, has_tokenizer)


def read_card_facts(folder: Path, repo_id: str | None = None) -> CardFacts:
    """Gather the same from a saved folder.

    Args:
        folder: that `save` wrote.
        repo_id: where it is, or will be, published.

    Raises:
        MonoQuantError: the folder is not a complete saved model.
    """
    manifest = read_manifest(folder)
    try:
        return CardFacts(
            read_report(folder),
            Origin.from_dict(manifest["source"]),
            manifest["layout"],
            manifest["kind"],
            _given(QuantizationConfig.from_dict(manifest["settings"])),
            dict(manifest["versions"]),
            "tokenizer_config.json" in manifest["files"],
            repo_id,
        )
    except KeyError as e:
        raise CorruptCheckpointError(f"{folder}: {MANIFEST} lacks {e}; save the model again") from e


def _given(config: QuantizationConfig) -> dict[str, Any]:
    """Return the options that differ from the defaults, without the dtype."""
    default = QuantizationConfig().to_dict()
    return {k: v for k, v in config.to_dict().items() if v != default[k] and k != "dtype"}


def _cast_buffers(core: nn.Module) -> dict[str, str]:
    """Name the float buffers that are not saved (rotary tables) and are not in float32, with their dtype.

    They are computed when a model is built, in float32; a model that was cast in memory has them in another dtype.
    """
    saved = core.state_dict(keep_vars=True).keys()
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in core.named_buffers()
        if name not in saved and buffer.numel() and buffer.is_floating_point() and buffer.dtype != torch.float32
    }


def _recast_buffers(core: nn.Module, manifest: Mapping[str, Any]) -> None:
    buffers = dict(core.named_buffers())
    for name, dtype in manifest.get("buffers", {}).items():
        buffers[name].data = buffers[name].data.to(getattr(torch, dtype))


def loaded_source(folder: Path, model: nn.Module, manifest: Mapping[str, Any]) -> Source:
    """Return the source that a loaded model stands for, so that it can be saved again."""
    kind = str(manifest.get("kind", "transformers"))
    core: Any = model[0].auto_model if kind == "sentence_transformer" else model  # type: ignore[index]
    name = next(path for path, module in model.named_modules() if module is core)
    origin = Origin.from_dict(manifest.get("source") or {"name": type(core).__name__})
    side = side_files(folder) if kind == "transformers" else ()
    return Source(model, core, kind, name, folder=folder, side_files=side, owned=True, origin=origin)
