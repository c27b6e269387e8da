"""What transformers wants of a quantization method, so that its own loader fills our layers.

The classes need transformers as their base, so they are made when they are first asked for.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mono_quant.convert.int8 import install_
from mono_quant.errors import CorruptCheckpointError, UnsupportedModelError
from mono_quant.hf.dtypes import take_dtypes_
from mono_quant.hf.names import renamer, split_names
from mono_quant.planning.layers import DECLARATIONS
from mono_quant.planning.walk import weight_owners

METHOD = "mono_quant"


def __getattr__(name: str) -> Any:
    # The classes need transformers as their base, and pickle needs to find them here.
    if name in ("Int8Config", "Int8Quantizer"):
        return classes()[name == "Int8Quantizer"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make transformers know our int8 layers, so that a config with `quant_method: mono_quant` loads into them."""
    classes()


def codes_among(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the int8 codes of a checkpoint."""
    return sorted(name for name, tensor in tensors.items() if tensor.dtype == torch.int8)


def stored_method(stored: Mapping[str, torch.dtype], dtype: torch.dtype) -> dict[str, Any]:
    """Return a `quantization_config` that fills a model with what a checkpoint holds, codes and floats, as they are.

    Args:
        stored: dtype of every tensor of the checkpoint, by name.
        dtype: of most float tensors, and what int8 weights read as.
    """
    codes = sorted(name for name, held in stored.items() if held == torch.int8)
    scales = {f"{name}_scale" for name in codes}
    floats = {n: str(held) for n, held in stored.items() if held.is_floating_point and n not in scales}
    return {"quant_method": METHOD, "codes": codes, "dtype": str(dtype), "floats": floats}


def mark_int8_(model: nn.Module) -> None:
    """Tell transformers that the model is quantized by us, so that its own saving does not write codes as floats."""
    config_class, quantizer_class = classes()
    unmark_(model)
    model.hf_quantizer = quantizer_class(config_class(), pre_quantized=True)


def unmark_(model: nn.Module) -> None:
    """Remove from a loaded model what says that its loader was a quantization method."""
    model.__dict__.pop("hf_quantizer", None)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_is_quantized"):
            delattr(config, "_is_quantized")
        if config is not None and getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
    for name in ("is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)


@functools.cache
def classes() -> tuple[type[Any], type[Any]]:
    """Make the two classes that transformers wants for a quantization method, and register them once."""
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]
        """What the loader has to know: which checkpoint tensors are int8 codes, and which dtypes the others have.

        Without `dtype`, the others get the dtypes that transformers gives them.
        """

        def __init__(
            self,
            codes: list[str] | None = None,
            dtype: str = "",
            floats: Mapping[str, str] | None = None,
            **_: Any,
        ) -> None:
            self.quant_method = METHOD
            self.codes = codes or []
            self.dtype = dtype
            self.floats = floats or {}

    class Int8Quantizer(HfQuantizer):  # type: ignore[misc]
        """Puts int8 layers where the checkpoint has int8 codes."""

        serialized_names: ClassVar = {"weight": ["weight", "weight_scale"]}
        is_trainable = False

        def is_serializable(self) -> bool:
            raise UnsupportedModelError(
                "save_pretrained and push_to_hub of transformers would write the int8 codes without what is needed to read "
                "them. Use quantize(...).save(folder) or .push_to_hub(repo)"
            )

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            asked = self.quantization_config
            if asked.dtype:
                take_dtypes_(model, _dtype(asked.dtype), {n: _dtype(d) for n, d in asked.floats.items()})
                # what the class declares would be cast: here the file decides
                self.declared = {name: getattr(model, name, None) for name in DECLARATIONS}
                model.__dict__.update(dict.fromkeys(DECLARATIONS, frozenset()))
            install_(model, _modules_of(model, asked.codes))

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            model.__dict__.update(getattr(self, "declared", {}))

        def _dequantize(self, model: Any, dtype: Any = None) -> Any:
            raise UnsupportedModelError("dequantize() is not supported; load the original model instead")

    for cls in (Int8Config, Int8Quantizer):
        cls.__module__, cls.__qualname__ = __name__, cls.__name__
    register_quantization_config(METHOD)(Int8Config)
    register_quantizer(METHOD)(Int8Quantizer)
    return Int8Config, Int8Quantizer


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype


def _modules_of(model: nn.Module, codes: list[str]) -> list[str]:
    """Return the layers of a float skeleton that int8 checkpoint tensors belong to."""
    rename = renamer(model)
    owners = weight_owners(model)
    found: dict[str, None] = {}
    for key in codes:
        for name in split_names(model, rename(key)[0]):
            if name not in owners:
                raise CorruptCheckpointError(
                    f"{key} holds int8 codes, but {type(model).__name__} has no layer there that can use them; "
                    f"the checkpoint does not fit its config.json"
                )
            found[owners[name]] = None
    return list(found)
