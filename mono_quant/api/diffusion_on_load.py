"""`from_pretrained` of diffusers: a model, also one in a pipeline, becomes int8 while it is read, and int8 folders of ours load.

diffusers has no way to register a method but its two tables of them. The class needs diffusers as its base, so it is made when it
is first asked for.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.api import on_load
from mono_quant.api.recipe import decided
from mono_quant.artifact.buffers import read_values, restore_
from mono_quant.artifact.facts import Manifest
from mono_quant.artifact.keeping import keep_loaded_
from mono_quant.artifact.loading import restore_schemes_
from mono_quant.convert.arrival import FILLED, Arrival
from mono_quant.convert.int8 import install_
from mono_quant.convert.schemes import ARRIVALS
from mono_quant.convert.surgery import recast_
from mono_quant.errors import ConfigError, CorruptCheckpointError, Option
from mono_quant.hf.marks import METHOD
from mono_quant.hf.marks import classes as marks
from mono_quant.hf.names import SCALE
from mono_quant.io.disk.manifest import MANIFEST
from mono_quant.planning.layers import declared_float32
from mono_quant.planning.walk import tensor_names, weight_owners
from mono_quant.sources.folder import loaded_from


def __getattr__(name: str) -> Any:
    # pickle needs to find it here
    if name == "DiffusionOnLoad":
        return quantizer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make diffusers know the method `mono_quant`; any number of times."""
    from diffusers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, on_load.classes()[0])
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, quantizer())


# What a loading needs and a loaded model does not.
_WORK = ("arrival", "task", "source", "names", "codes")


class _Method(str):
    """The name of the method; diffusers has its own in an Enum and asks for its `value`."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


@functools.cache
def quantizer() -> type[Any]:
    """Make the class that diffusers wants for a quantization method."""
    from diffusers.quantizers.base import DiffusersQuantizer

    _, converted, _ = marks()

    class DiffusionOnLoad(DiffusersQuantizer, converted):  # type: ignore[misc,valid-type]
        """Converts a model while diffusers loads it, or loads one that was converted; then it speaks for the model."""

        use_keep_in_fp32_modules = True
        supports_parallel_loading = False
        is_serializable = True
        is_trainable, is_compileable = converted.is_trainable, converted.is_compileable
        dequantize = converted.dequantize
        arrival: Arrival | None = None
        folder: Path | None = None
        files: Sequence[Path] = ()
        codes: frozenset[str] = frozenset()

        def __init__(self, quantization_config: Any, **options: Any) -> None:
            config = copy.copy(on_load.asked_config(quantization_config))
            config.quant_method = _Method(METHOD)
            super().__init__(config, **options)

        def validate_environment(self, device_map: Any = None, **_: Any) -> None:
            if not self.pre_quantized:
                on_load.refuse_disk(device_map)

        def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
            self.files = [Path(file) for file in checkpoint_files]
            self.folder = self.files[0].parent
            if self.pre_quantized:
                keys = set(loaded_keys)
                self.codes = frozenset(key for key in keys if f"{key}{SCALE}" in keys)
            return loaded_keys

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            if self.pre_quantized:
                self._expect_codes_(model)
                return
            request = self.quantization_config.request
            bare = copy.deepcopy(model)
            # what diffusers gives the tensors that the class wants in float32
            recast_(bare, dict.fromkeys(declared_float32(bare, model.dtype), torch.float32))
            self.source = loaded_from(bare, self.files, "diffusers")
            self.names = [name for name, _, _ in tensor_names(bare)]
            if request.dtype not in ARRIVALS:
                return
            if request.on_nonfinite == "keep":
                raise ConfigError(
                    Option("on_nonfinite", "keep"),
                    " needs to look at the weights first; leave it out, or use mono_quant.quantize(folder)",
                )
            self.task, decisions = decided(self.source, self.source.subject, request)
            self.arrival = ARRIVALS[request.dtype](self.task, decisions, lambda *_: None)
            self.arrival.await_(model)

        def _expect_codes_(self, model: nn.Module) -> None:
            on_load.check_version(self.quantization_config.format_version, self.folder)
            owners = weight_owners(model)
            stray = sorted(self.codes - owners.keys())
            if stray:
                raise CorruptCheckpointError(
                    f"{self.folder}: {stray[0]} is int8, but {type(model).__name__} has no layer there that can hold it; it does not "
                    f"fit its config.json"
                )
            install_(model, sorted({owners[name] for name in self.codes}))

        def check_if_quantized_param(
            self, model: Any, param_value: Tensor, param_name: str, *_: Any, **__: Any
        ) -> bool:
            name = param_name.removesuffix(SCALE)
            return name in self.codes or (self.arrival is not None and param_name in self.arrival.names)

        def create_quantized_param(
            self,
            model: nn.Module,
            param_value: Tensor,
            param_name: str,
            target_device: Any,
            state_dict: Mapping[str, Tensor],
            *_: Any,
            **__: Any,
        ) -> None:
            owner, name = param_name.rpartition(".")[::2]
            is_stored = self.arrival is None
            # scales keep their dtype, in which diffusers would load floats
            value = (state_dict[param_name] if is_stored else param_value).to(target_device)
            parameter = nn.Parameter(value, requires_grad=False)
            setattr(parameter, FILLED, True)
            model.get_submodule(owner).register_parameter(name, parameter)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            if self.pre_quantized:
                self._complete_stored_(model)
            else:
                self._complete_(model)
            for name in _WORK:
                self.__dict__.pop(name, None)
            # diffusers makes this object the quantizer of the model
            self.watch(model, model.__dict__.pop("hf_quantizer").keeper)

        def _complete_stored_(self, model: Any) -> None:
            folder = self.folder
            manifest = None
            if folder is not None and (folder / MANIFEST).exists():
                manifest = Manifest.read(folder)
                restore_(model, manifest.buffers, read_values(folder))
                restore_schemes_(model, manifest, folder)
            keep_loaded_(folder or Path(), model, manifest)

        def _complete_(self, model: Any) -> None:
            task = None
            if self.arrival is not None:
                self.arrival.finish_()
                task = self.task
            request = self.quantization_config.request
            on_load.complete_(model, self.source, request, self.names, task, self.arrival)
            self.what = model.hf_quantizer.what

    DiffusionOnLoad.__module__, DiffusionOnLoad.__qualname__ = __name__, DiffusionOnLoad.__name__
    return DiffusionOnLoad
