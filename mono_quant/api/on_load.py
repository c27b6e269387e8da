"""`from_pretrained` of transformers: a model becomes int8 while it is read, and int8 checkpoints stay int8.

The classes need transformers as their base, so they are made when they are first asked for.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant.api.recipe import NOT_ASKED, convert_source, decided, finished
from mono_quant.artifact.buffers import read_values, restore_
from mono_quant.artifact.facts import Manifest
from mono_quant.artifact.keeping import keep_, keep_loaded_
from mono_quant.artifact.loading import check_foreign, override_schemes_, restore_schemes_, tell_differences
from mono_quant.artifact.tensors import ZERO_POINT
from mono_quant.convert.arrival import Arrival, unfilled, unfinite
from mono_quant.convert.contract import Task
from mono_quant.convert.int8 import keep_unfinite
from mono_quant.convert.int8_layers import Int8Module
from mono_quant.convert.schemes import ARRIVALS
from mono_quant.convert.surgery import recast_
from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    FormatVersionError,
    MissingFileError,
    Option,
)
from mono_quant.hf.dtypes import built_dtype, loaded_dtypes
from mono_quant.hf.marks import METHOD
from mono_quant.hf.models import skeleton, tie_
from mono_quant.hf.names import SCALE, grouped, on_meta, place
from mono_quant.hf.quantizer import Headers, headers_of, initialize_, unmark_config_
from mono_quant.hf.quantizer import classes as loader_classes
from mono_quant.io.disk.manifest import FORMAT_VERSION, MANIFEST, REPORT
from mono_quant.io.hub.repo import cached_commit
from mono_quant.io.tensors.checkpoint import Checkpoint, open_checkpoint, open_weights
from mono_quant.planning.config import QuantizationConfig, merge
from mono_quant.planning.schemes import MEASURED, Asked
from mono_quant.planning.walk import tensor_names
from mono_quant.sources.folder import are_safe, loaded_from
from mono_quant.sources.source import Source

_NAMES = ("MonoQuantConfig", "OnLoad")


def __getattr__(name: str) -> Any:
    # pickle needs to find them here
    if name in _NAMES:
        return classes()[_NAMES.index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make transformers know the method `mono_quant`; any number of times."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        config_class, quantizer_class = classes()
        register_quantization_config(METHOD)(config_class)
        register_quantizer(METHOD)(quantizer_class)
        _let_it_say_how_to_load_(config_class)


def _let_it_say_how_to_load_(config_class: type[Any]) -> None:
    """Let a config that is passed for an int8 folder say how to load it: transformers asks some methods, by a tuple of their classes."""
    from transformers.quantizers import auto

    asked = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)
    if isinstance(asked, tuple):
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*asked, config_class)


def asked_config(given: Any) -> Any:
    """Return a `MonoQuantConfig` for what was passed as `quantization_config`: one, or a request of `mono_quant.quantize`."""
    if not isinstance(given, QuantizationConfig):
        return given
    return classes()[0](**given.to_dict() | {"fidelity": given.fidelity is True})


def refuse_disk(device_map: Any) -> set[Any]:
    """Return the devices of a map.

    Raises:
        ConfigError: one of them is the disk, from where the float file would be read again.
    """
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if "disk" in devices:
        raise ConfigError(
            "device_map puts layers on the disk, where they would stay in float; convert the model first, "
            "mono_quant.quantize(...).save(folder), and load that folder"
        )
    return devices


def check_version(version: int, folder: Path | None) -> None:
    """Refuse a folder in a format that is newer than this package.

    Raises:
        FormatVersionError: it is.
    """
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{folder} has format {version}, and this version of mono_quant knows {FORMAT_VERSION}; update mono_quant"
        )


def complete_(
    model: Any,
    source: Source,
    request: QuantizationConfig,
    names: Sequence[str],
    task: Task | None,
    arrival: Arrival | None,
) -> None:
    """Give a model that was converted on load its report and its keeper, or convert it now that it has been loaded.

    Args:
        model: that was loaded.
        source: of the skeleton that was decided on.
        request: what is asked for.
        names: of the tensors of the skeleton.
        task, arrival: of the conversion; None where nothing became int8 while it was read.
    """
    subject = replace(source.subject, model=model)
    if task is None or arrival is None:
        result = convert_source(replace(source, subject=subject), request, inplace=True, probe=None)
        model.mono_quant_report = result.report
        return
    report = finished(replace(task, model=model), arrival.outcome(), names, source.notes)
    model.mono_quant_report = report.with_fidelity(None, NOT_ASKED)
    keep_(subject, request.dtype, model.mono_quant_report, request)


class Loading:
    """What our quantizer does at each step of a loading; transformers' base class, and `hf.quantizer`, stand behind it."""

    pre_quantized: bool
    quantization_config: Any
    headers: Headers
    fill_: Callable[[Any, Any], None]

    arrival: Arrival | None = None
    folder: Path | None = None
    files: Sequence[Path] = ()
    task: Task
    source: Source

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(asked_config(quantization_config), **options)  # type: ignore[call-arg]

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Refuse a place where a model cannot be converted; transformers asks before it builds one.

        Raises:
            ConfigError: it is the disk, or several devices for float16.
        """
        if self.pre_quantized:
            return
        devices = refuse_disk(device_map)
        if self.quantization_config.request.dtype == "fp16" and len(devices) > 1:
            raise ConfigError(
                "fp16 is converted on one device, and device_map names several; for a GPU pass dtype=torch.float16 in place of "
                "quantization_config"
            )

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Tell whether a tensor may come in another shape than the parameter has."""
        # of a checkpoint of ours: codes lie flat in it, and the layer gives them their shape
        owner, own = param_name.rpartition(".")[::2]
        module = model.get_submodule(owner)
        return (
            self.arrival is None
            and isinstance(module, Int8Module)
            and own.removesuffix("_scale") in module.held
        )

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Return the bytes of a value, for maps of devices: what will be int8 has one."""
        coming = self.arrival is not None and param_name in self.arrival.names
        owner, own = param_name.rpartition(".")[::2]
        module = model.get_submodule(owner)
        if coming or (isinstance(module, Int8Module) and own in module.held):
            return 1
        return float(param.element_size())

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        self.files = [Path(file) for file in checkpoint_files or ()]
        if self.files:
            self.folder = self.files[0].parent
        if self.pre_quantized:
            self._expect_codes_(model)
            model.__dict__["initialize_weights"] = functools.partial(self._initialize_, model)
            return
        request = self.quantization_config.request
        asked = dtype or built_dtype(model)
        bare = skeleton(type(model), model.config, asked, type(model).__name__)
        tie_(bare)
        recast_(bare, loaded_dtypes(bare, asked))
        self.source = loaded_from(bare, self.files)
        model.__dict__["initialize_weights"] = functools.partial(self._initialize_, model)
        if request.dtype not in ARRIVALS:
            return
        self.task, decisions = decided(self.source, self.source.subject, request)
        if request.on_nonfinite == "keep":
            decisions = keep_unfinite(decisions, self._unfinite(bare))
        self.arrival = ARRIVALS[request.dtype](self.task, decisions, lambda *_: None)
        self.arrival.await_(model)

    def _initialize_(self, model: Any) -> None:
        """Let weights be made that no file has: heads of another class are, but those of a folder of ours are lost."""
        anew = unfilled(model)
        lost = [name for name in anew if name not in self.headers]
        if self.pre_quantized and self.folder is not None:
            saved = type(model).__name__ in (model.config.architectures or ())
            if lost and saved and (self.folder / MANIFEST).exists():
                raise CorruptCheckpointError(
                    f"{self.folder}: {len(lost)} weights of {type(model).__name__} are missing: {grouped(lost)}; fetch the "
                    f"whole folder again"
                )
        elif anew:
            self.source.notes.append(f"not in the checkpoint, so made anew as for training: {grouped(anew)}")
        if self.pre_quantized or self.arrival is not None:
            initialize_(model, self.arrival)
        else:
            del model.__dict__["initialize_weights"]
            model.initialize_weights()

    def _unfinite(self, bare: nn.Module) -> frozenset[str]:
        if self.folder is None or not are_safe(self.files):
            raise ConfigError(
                Option("on_nonfinite", "keep"), " needs safetensors files to look into; leave it out"
            )
        # transformers builds on meta at this moment
        with torch.device("cpu"), open_weights(self.folder, [f.name for f in self.files]) as checkpoint:
            shapes = {name: (h.dtype, h.shape) for name, h in checkpoint.headers.items()}
            return frozenset(unfinite(checkpoint, place(bare, on_meta(shapes)).sources))

    def _expect_codes_(self, model: Any) -> None:
        asked, folder = self.quantization_config, self.folder
        if folder is None:
            raise MissingFileError(
                "an int8 model is loaded from its files; give the folder or the id of the model"
            )
        check_version(asked.format_version, folder)
        self.manifest = _manifest_of(folder)
        if asked.checkpoint is None and self.manifest is None:
            raise MissingFileError(
                f"{folder} holds int8 codes of mono_quant, but not the {MANIFEST} that belongs to them; fetch the whole "
                f"folder again"
            )
        with open_checkpoint(folder) as checkpoint:
            if asked.checkpoint is not None:
                check_foreign(checkpoint, asked.checkpoint)
            shapes = _shapes(checkpoint, self.manifest)
        bare = [n for n, (dtype, _) in shapes.items() if dtype == torch.int8 and f"{n}{SCALE}" not in shapes]
        if bare:
            raise CorruptCheckpointError(
                f"{folder}: the scales of {len(bare)} int8 weights are missing: {grouped(bare)}; fetch the whole folder again"
            )
        tensors_config, _ = loader_classes()
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model.__dict__["_keys_to_ignore_on_load_unexpected"] = {*ignored, rf"{re.escape(ZERO_POINT)}$"}
        self.fill_(model, tensors_config(headers_of(shapes)))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        super()._process_model_after_weight_loading(model)  # type: ignore[misc]
        if self.pre_quantized and self.folder is not None:
            _settle_(model)
            if self.quantization_config.checkpoint is not None:
                tell_differences(self.folder, self.quantization_config.checkpoint, model)
            if self.manifest is not None:
                restore_(model, self.manifest.buffers, read_values(self.folder))
                restore_schemes_(model, self.manifest, self.folder)
            if self.quantization_config.override is not None:
                override_schemes_(model, self.quantization_config.override)
            keep_loaded_(self.folder, model, self.manifest)
        else:
            self._complete_(model)
        # a model made from this config is a float one
        unmark_config_(model)

    def _complete_(self, model: Any) -> None:
        names = [name for name, _, _ in tensor_names(self.source.subject.model)]
        task = None if self.arrival is None else self.task
        complete_(model, self.source, self.quantization_config.request, names, task, self.arrival)


def classes() -> tuple[type[Any], type[Any]]:
    """Make the classes that transformers wants for a quantization method.

    Returns:
        `MonoQuantConfig`, and the quantizer that it asks for.
    """
    # before the cache: importing it may bring us here a second time
    import transformers.quantizers.auto  # noqa: F401

    return _classes()


@functools.cache
def _classes() -> tuple[type[Any], type[Any]]:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    _, filling = loader_classes()

    class MonoQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """A request to convert a model while transformers loads it: `from_pretrained(..., quantization_config=MonoQuantConfig())`.

        int8 layers are made one weight at a time, so that memory holds the int8 model and one layer in float. A float16 model
        is converted when it has been loaded. The rules, reasons and the report (`model.mono_quant_report`) are those of
        `mono_quant.quantize`; the output is not measured, as there is no float model to compare it with.

        Attributes:
            request: the conversion.
            checkpoint: the `quantization_config` of an int8 checkpoint that is loaded as it is.
            override: schemes of activations in place of those that such a checkpoint was saved with; None leaves them.

        Args:
            dtype: `int8` or `fp16`.
            checkpoint: see above.
            **options: fields of `QuantizationConfig`, such as `skip` and `embeddings`, but not `fidelity`.

        Raises:
            ConfigError: an option is unknown or its value is not supported.
        """

        def __init__(
            self,
            dtype: str | torch.dtype = "int8",
            *,
            checkpoint: Mapping[str, Any] | None = None,
            format_version: int = FORMAT_VERSION,
            quant_method: str = METHOD,
            **options: Any,
        ) -> None:
            self.quant_method = METHOD
            self.checkpoint, self.format_version = checkpoint, format_version
            self.override: Asked | None = None
            self._asks_for_schemes = "activations" in options
            self.request = merge(None, {"dtype": dtype, "fidelity": False, **options})
            if self.request.activations == MEASURED:
                raise ConfigError(
                    Option("activations", MEASURED),
                    " needs a run of the model, which is not made while it is quantized on load; name a scheme, or use "
                    "mono_quant.quantize(...)",
                )
            if self.request.fidelity is not False:
                raise ConfigError(
                    Option("fidelity", self.request.fidelity),
                    " needs the float model, which is not there while a model is quantized on load; leave it out, or measure "
                    "with mono_quant.quantize(...)",
                )

        def get_loading_attributes(self) -> dict[str, Any]:
            """Return what counts of a config that is passed for a checkpoint that is int8 already."""
            return {"override": self.request.asked_activations} if self._asks_for_schemes else {}

        def to_dict(self) -> dict[str, Any]:
            """Return plain data; `from_dict` gives back an equal config."""
            asked = {k: v for k, v in self.request.to_dict().items() if k != "fidelity"}
            return {"quant_method": METHOD, "format_version": self.format_version, **asked}

    class OnLoad(Loading, filling):  # type: ignore[misc,valid-type]
        """Converts a model while it is loaded, or loads one that was converted."""

    for cls in (MonoQuantConfig, OnLoad):
        cls.__module__, cls.__qualname__ = __name__, cls.__name__
    return MonoQuantConfig, OnLoad


def _settle_(model: nn.Module) -> None:
    """Put int8 codes in the order of the kernels, and refuse scales that mean nothing."""
    for name, module in model.named_modules():
        if isinstance(module, Int8Module):
            module.settle_()
            for weight in module.held:
                scale = module.scale(weight)
                if not scale.is_meta and not bool((scale.isfinite() & (scale > 0)).all()):
                    raise CorruptCheckpointError(
                        f"{name}.{weight}_scale holds a scale that is not finite and positive; the file is damaged"
                    )


def _manifest_of(folder: Path) -> Manifest | None:
    """Return the manifest of a folder of ours, fetched with the report where transformers left them on the Hub; None for others."""
    from transformers.utils import cached_file

    commit = cached_commit(folder)
    for name in (MANIFEST, REPORT):
        if commit is not None and not (folder / name).exists():
            repo_id, sha = commit
            cached_file(
                repo_id,
                name,
                revision=sha,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
    return Manifest.read(folder) if (folder / MANIFEST).exists() else None


def _shapes(
    checkpoint: Checkpoint, manifest: Manifest | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor, of codes that lie flat the shape of the float weight."""
    known = {} if manifest is None else manifest.tensors
    return {
        name: (header.dtype, known[name].shape if name in known else header.shape)
        for name, header in checkpoint.headers.items()
        if not name.endswith(ZERO_POINT)
    }
