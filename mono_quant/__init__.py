"""Quantize any Hugging Face or PyTorch model to INT8 or FP16, without calibration data."""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mono_quant.hf.late import when_imported

if TYPE_CHECKING:
    from mono_quant.api.enabled import enable
    from mono_quant.api.on_load import MonoQuantConfig
    from mono_quant.api.result import QuantizedModel
    from mono_quant.api.verbs import (
        dynamic_quantize,
        inspect,
        load,
        plan,
        push_to_hub,
        quantize,
        quantize_checkpoint,
        quantize_from_hub,
        suggest,
        verify,
    )
    from mono_quant.errors import MonoQuantError
    from mono_quant.planning.config import QuantizationConfig
    from mono_quant.version import __version__

__all__ = [
    "MonoQuantConfig",
    "MonoQuantError",
    "QuantizationConfig",
    "QuantizedModel",
    "__version__",
    "dynamic_quantize",
    "enable",
    "inspect",
    "load",
    "plan",
    "push_to_hub",
    "quantize",
    "quantize_checkpoint",
    "quantize_from_hub",
    "suggest",
    "verify",
]
# Where a name is, so that it is imported when it is asked for: what most of them need, torch, takes a second.
_HOMES = {
    "api.enabled": ("enable",),
    "api.on_load": ("MonoQuantConfig",),
    "api.result": ("QuantizedModel",),
    "api.verbs": (
        "dynamic_quantize",
        "inspect",
        "load",
        "plan",
        "push_to_hub",
        "quantize",
        "quantize_checkpoint",
        "quantize_from_hub",
        "suggest",
        "verify",
    ),
    "errors": ("MonoQuantError",),
    "planning.config": ("QuantizationConfig",),
    "version": ("__version__",),
}
_FOLDERS = (
    "api",
    "apps",
    "artifact",
    "convert",
    "errors",
    "graphs",
    "hf",
    "io",
    "kernels",
    "planning",
    "sources",
    "stream",
    "version",
)


if not TYPE_CHECKING:  # who checks types would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _FOLDERS:
            return import_module(f"{__name__}.{name}")
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _call(home: str, name: str) -> None:
    getattr(import_module(f"{__name__}.{home}"), name)()


# what a neighbour learns of us when it is imported, be it before or after
when_imported("transformers.quantizers.auto", partial(_call, "api.on_load", "register"))
when_imported("transformers.modeling_utils", partial(_call, "hf.attention", "wrap_"))
when_imported("sentence_transformers.base.model", partial(_call, "hf.marks", "mark_encoders_"))
when_imported("sentence_transformers.base.model", partial(_call, "hf.padding", "wrap_"))
when_imported("torch._dynamo", partial(_call, "graphs.backend", "register"))
when_imported("diffusers.quantizers.auto", partial(_call, "api.diffusion_on_load", "register"))


def __dir__() -> list[str]:
    return sorted({*__all__, *_FOLDERS, *(name for name in globals() if name.startswith("__"))})
