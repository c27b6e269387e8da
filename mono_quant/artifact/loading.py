"""Reading a saved folder back, bit for bit, or a compressed-tensors int8 checkpoint of somebody else."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mono_quant.artifact.buffers import read_values, restore_
from mono_quant.artifact.facts import Manifest
from mono_quant.artifact.layouts import PLAIN
from mono_quant.artifact.tensors import ZERO_POINT, check_zero_point, read_tensors
from mono_quant.convert.filling import fill_, misfit
from mono_quant.convert.half import compute_in_float_
from mono_quant.convert.int8 import install_
from mono_quant.convert.int8_layers import Int8Module, layers_with_schemes, put_scheme_, put_schemes_
from mono_quant.convert.kept import hold_named_
from mono_quant.convert.surgery import structural_copy
from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    MissingFileError,
    Name,
    UnsupportedModelError,
)
from mono_quant.hf.around import around, fill_around_
from mono_quant.hf.compressed_tensors import STANDARD, check_ct, ct_differences
from mono_quant.hf.configs import dtype_of, set_generation_
from mono_quant.hf.diffusion import diffusion_class, load_diffusion
from mono_quant.hf.encoders import encoder_of
from mono_quant.hf.fp8 import METHOD as FP8
from mono_quant.hf.fp8 import fp8_weights
from mono_quant.hf.methods import method_of, way_out
from mono_quant.hf.models import load_as_stored, load_int8, model_class
from mono_quant.hf.sentence import is_encoder, settings_of, transformer_in
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.manifest import FORMAT, MANIFEST
from mono_quant.io.phases import phase
from mono_quant.io.tensors.checkpoint import Checkpoint, open_checkpoint
from mono_quant.planning.schemes import MEASURED, Asked, blocks_of, check_patterns, choose, plain
from mono_quant.planning.walk import module_aliases, weight_owners
from mono_quant.sources.folder import find_side_files
from mono_quant.sources.guards import Shapes, check_proportion, packed_weights
from mono_quant.sources.source import Subject

logger = logging.getLogger(__name__)


def load(
    folder: Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    verify: bool = True,
    mapped: bool = False,
) -> tuple[nn.Module, Manifest | None]:
    """Read a saved model back, or a compressed-tensors int8 checkpoint of somebody else.

    Args:
        folder: to read.
        model: for a plain module, an instance or a function that makes one; its weights are not used.
        verify: compare every file with the manifest's sha256 first.
        mapped: leave what is large in its file; see `Checkpoint.mapped`.

    Returns:
        The model in evaluation mode, and the manifest (None for a foreign checkpoint).

    Raises:
        MonoQuantError: a typed error for a missing, tampered, foreign or newer folder.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is no folder; give the folder that save() wrote")
    if (folder / MANIFEST).exists():
        with phase("Checking the files"):
            manifest = Manifest.read(folder, hashes=verify, extras=True)
        with phase("Loading the model"):
            return _load_own(folder, manifest, model, mapped), manifest
    with phase("Loading the model"):
        return _load_foreign(folder, mapped), None


def loaded_subject(folder: Path, model: nn.Module, manifest: Manifest) -> Subject:
    """Return the subject that a loaded model stands for, so that it can be saved again."""
    # transformers loads the transformer of an encoder alone
    whole = is_encoder(model)
    core = transformer_in(model) if whole else model
    kind = "transformers" if manifest.kind == "sentence_transformer" and not whole else manifest.kind
    name = next(path for path, module in model.named_modules() if module is core)
    raw = read_json_object(folder / "config.json") if (folder / "config.json").exists() else None
    subject = Subject(model, kind, name, folder, raw, find_side_files(folder), origin=manifest.source)
    return replace(subject, settings=settings_of(model)) if whole else subject


def _load_own(
    folder: Path, manifest: Manifest, model: nn.Module | Callable[[], nn.Module] | None, mapped: bool
) -> nn.Module:
    if manifest.kind == "module":
        return _load_plain(folder, manifest, model, mapped)
    if model is not None:
        raise ConfigError(f"{folder} holds a {manifest.class_name} that builds itself; leave out model=")
    raw = read_json_object(folder / "config.json")
    if manifest.kind == "diffusers":
        return _load_diffusion(folder, raw, manifest, mapped)
    with open_checkpoint(folder) as checkpoint:
        check_proportion(folder, raw, _shapes(checkpoint))
        cls, config = model_class(raw, folder, trust_remote_code=False)
        tensors = read_tensors(checkpoint, manifest, mapped)
    dtype = dtype_of(raw, folder)
    if manifest.layout == PLAIN:
        _refuse_codes(folder, tensors)
    loaded = load_as_stored(cls, config, tensors, str(folder), dtype, manifest.built)
    set_generation_(loaded, folder)
    whole = _encoder(folder, raw, loaded) if manifest.kind == "sentence_transformer" else loaded
    return _settled(whole, loaded, folder, manifest, dtype)


def _encoder(folder: Path, raw: Mapping[str, Any], core: nn.Module) -> nn.Module:
    """Build what lies around the transformer of a model of sentence-transformers."""
    encoder = encoder_of(folder, raw)
    if encoder is None:
        raise MissingFileError(
            f"{folder} holds a model of sentence-transformers without its modules.json; download the whole folder again"
        )
    whole = around(folder, core, encoder, torch.float32)
    fill_around_(whole, folder, encoder)
    return whole


def _load_diffusion(folder: Path, raw: Mapping[str, Any], manifest: Manifest, mapped: bool) -> nn.Module:
    with open_checkpoint(folder) as checkpoint:
        check_proportion(folder, raw, _shapes(checkpoint))
        tensors = read_tensors(checkpoint, manifest, mapped)
    if manifest.layout == PLAIN:
        _refuse_codes(folder, tensors)
    model = load_diffusion(diffusion_class(raw, folder), raw, tensors, str(folder))
    return _settled(model, model, folder, manifest, torch.float32)


def _shapes(checkpoint: Checkpoint) -> Shapes:
    return {name: (header.dtype, header.shape) for name, header in checkpoint.headers.items()}


def _refuse_codes(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    codes = [n for n, t in tensors.items() if t.dtype == torch.int8 and f"{n}_scale" in tensors]
    if codes:
        raise CorruptCheckpointError(
            f"{folder}: {codes[0]} holds int8 codes, but {MANIFEST} says that the layout is {PLAIN!r}; save the model again"
        )


def _settled(
    model: nn.Module, core: nn.Module, folder: Path, manifest: Manifest, dtype: torch.dtype
) -> nn.Module:
    """Bring a model that was filled from files into the form that runs.

    Args:
        model: that was filled.
        core: the part of it that is converted.
        folder: that it came from.
        manifest: of the folder.
        dtype: that int8 weights read as, unless the manifest says otherwise.
    """
    settle_(core, dtype)
    restore_(core, manifest.buffers, read_values(folder))
    restore_schemes_(core, manifest, folder)
    if manifest.layout == PLAIN:
        compute_in_float_(model, next(path for path, module in model.named_modules() if module is core))
    hold_named_(core, manifest.narrowed)
    return model.eval()


def restore_schemes_(core: nn.Module, manifest: Manifest, folder: Path) -> None:
    """Give the int8 layers of a loaded model the schemes of the model that was saved.

    Raises:
        CorruptCheckpointError: the manifest names layers that the class which was saved does not have.
    """
    strange = put_schemes_(core, manifest.activations)
    if strange and type(core).__name__ == manifest.class_name:
        raise CorruptCheckpointError(
            f"{folder}: {MANIFEST} gives {strange[0]} a scheme for its activations, but {type(core).__name__} has no int8 layer "
            f"there; save the model again"
        )


def override_schemes_(model: nn.Module, asked: Asked) -> None:
    """Give the int8 layers of a loaded model other schemes than it was saved with.

    Args:
        model: that was loaded.
        asked: as in a request; patterns see names in `model`.

    Raises:
        ConfigError: it has no int8 layers, or a run would have to find the scheme.
        PatternError: a pattern matches none of them.
    """
    if asked == MEASURED:
        raise ConfigError(
            Name("activations"),
            f" is {MEASURED!r}, which a loaded model cannot be given; ask mono_quant.suggest(model), and pass its activations",
        )
    aliases = module_aliases(model)
    layers = layers_with_schemes(model)
    if not layers:
        raise ConfigError(
            Name("activations"),
            f" is {plain(asked)!r}, but {type(model).__name__} has no int8 layers; leave it out",
        )
    names = {name: (name, *aliases[id(layer)]) for name, layer in layers.items()}
    check_patterns(names.values(), asked)
    for name, choice in choose(names, asked, blocks_of(model)).items():
        put_scheme_(layers[name], choice.scheme)


def settle_(model: nn.Module, dtype: torch.dtype) -> None:
    """Put int8 codes that came from a file into the order of the kernels, and say what the weights read as."""
    for module in model.modules():
        if isinstance(module, Int8Module):
            module.settle_()
            module.read_as_(dtype)


def _load_plain(
    folder: Path, manifest: Manifest, model: nn.Module | Callable[[], nn.Module] | None, mapped: bool
) -> nn.Module:
    if model is None:
        raise ConfigError(
            f"{folder} holds a {manifest.class_name}, which only your code can build; pass it: "
            f"load({str(folder)!r}, model={manifest.class_name}(...)) or a function that makes it"
        )
    if not isinstance(model, nn.Module) and not callable(model):
        raise ConfigError(
            f"model= is a {type(model).__name__}; give an nn.Module or a function that makes one"
        )
    built = structural_copy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(built, nn.Module):
        raise ConfigError(f"model= made a {type(built).__name__}, not an nn.Module")
    with open_checkpoint(folder) as checkpoint:
        tensors = read_tensors(checkpoint, manifest, mapped)
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
    _fill(built, tensors, folder)
    return _settled(built, built, folder, manifest, torch.float32)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    found = misfit(model, tensors)
    if found.missing or found.left or found.wrong:
        raise CorruptCheckpointError(
            f"{folder} does not fit {type(model).__name__}: missing {found.missing[:3]}, left over {found.left[:3]}, "
            f"other shape {found.wrong[:3]}; pass the same architecture that was saved"
        )
    fill_(model, tensors)


def _load_foreign(folder: Path, mapped: bool) -> nn.Module:
    if not (folder / "config.json").exists():
        raise MissingFileError(f"{folder} has neither {MANIFEST} nor config.json; it is no saved model")
    raw = read_json_object(folder / "config.json")
    method = method_of(raw, {path.name for path in folder.iterdir()})
    if method == FORMAT:
        raise MissingFileError(
            f"{folder} is a mono_quant model without its {MANIFEST}; download the whole folder again"
        )
    if method not in ("", STANDARD):
        raise UnsupportedModelError(
            f"{folder} was quantized by another method (quant_method is {method!r}); {_way_out(folder, raw, method)}"
        )
    with open_checkpoint(folder) as checkpoint:
        shapes = _shapes(checkpoint)
        if not method:
            _refuse_unnamed(folder, shapes)
        check_foreign(checkpoint, raw["quantization_config"])
        check_proportion(folder, raw, shapes)
        cls, config = model_class(raw, folder, trust_remote_code=False)
        tensors = read_tensors(checkpoint, None, mapped)
    loaded = load_int8(cls, config, tensors, str(folder), dtype_of(raw, folder))
    tell_differences(folder, raw["quantization_config"], loaded)
    set_generation_(loaded, folder)
    for module in loaded.modules():
        if isinstance(module, Int8Module):
            module.settle_()
    return loaded if encoder_of(folder, raw) is None else _encoder(folder, raw, loaded)


def _way_out(folder: Path, raw: Mapping[str, Any], method: str) -> str:
    if method != FP8:
        return way_out(method)
    with open_checkpoint(folder) as checkpoint:
        # says itself what is wrong with it
        fp8_weights(raw, _shapes(checkpoint), str(folder))
    return f"use quantize({str(folder)!r}) to convert it"


def check_foreign(checkpoint: Checkpoint, block: Mapping[str, Any]) -> None:
    """Refuse compressed-tensors checkpoints that are not int8 with dynamic activations.

    Args:
        checkpoint: that others made.
        block: the `quantization_config` of its config.

    Raises:
        UnsupportedModelError: it is another kind of checkpoint.
        CorruptCheckpointError: block and tensors contradict each other.
    """
    dtypes = {name: header.dtype for name, header in checkpoint.headers.items()}
    check_ct(checkpoint.folder, block, dtypes)
    for name in [name for name in dtypes if name.endswith(ZERO_POINT)]:
        check_zero_point(checkpoint.folder, name, checkpoint[name])


def tell_differences(folder: Path, block: Mapping[str, Any], model: nn.Module) -> None:
    """Tell what of a checkpoint that others made is computed otherwise here; see `ct_differences`."""
    for difference in ct_differences(block, model):
        logger.warning("%s: %s; outputs differ a little", folder, difference)


def _refuse_unnamed(folder: Path, shapes: Shapes) -> NoReturn:
    """Say what to do with a folder whose config names no quantization method."""
    packed = packed_weights(shapes)
    if packed:
        raise UnsupportedModelError(
            f"{folder}: {packed[0]} is {shapes[packed[0]][0]}, but config.json has no quantization_config that says how to "
            f"read it; run it with the library that wrote it"
        )
    raise UnsupportedModelError(
        f"{folder} is not quantized; use quantize({str(folder)!r}) first, or transformers to load it"
    )
