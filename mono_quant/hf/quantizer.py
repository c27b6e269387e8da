"""What transformers wants of a quantization method, so that its own loader fills our layers.

The classes need transformers as their base, so they are made when they are first asked for.
"""

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.convert.arrival import Arrival
from mono_quant.convert.int8 import install_
from mono_quant.convert.surgery import recast_
from mono_quant.errors import CorruptCheckpointError
from mono_quant.hf.computed import computed_on, put_buffers_
from mono_quant.hf.configs import BUILD_ERRORS
from mono_quant.hf.dtypes import take_dtypes_
from mono_quant.hf.names import SCALE, Placement, on_meta, place, plain_class, scales_follow
from mono_quant.planning.layers import DECLARATIONS
from mono_quant.planning.walk import weight_owners

# Between our own loading and transformers' loader alone: no file names it.
METHOD = "mono_quant_tensors"
logger = logging.getLogger(__name__)


def register() -> None:
    """Make transformers' loader fill our layers where a config carries a `loading_method`."""
    classes()


class Headers(dict[str, tuple[str, tuple[int, ...]]]):
    """Dtype and shape of every tensor of a checkpoint, by name; of int8 codes the shape of the float weight."""

    def __deepcopy__(self, memo: object) -> "Headers":
        # transformers copies a config many times, and this has an entry per expert
        return self

    @property
    def codes(self) -> list[str]:
        """Names of the int8 codes."""
        return [name for name, (dtype, _) in self.items() if dtype == str(torch.int8)]

    def weights(self) -> dict[str, Tensor]:
        """Return tensors without data for everything but the scales of int8 codes."""
        scales = {f"{name}{SCALE}" for name in self.codes}
        return on_meta({n: (_dtype(own), shape) for n, (own, shape) in self.items() if n not in scales})


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype


def loading_method(
    headers: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    dtype: torch.dtype | None = None,
    arrival: Arrival | None = None,
) -> dict[str, Any]:
    """Return a `quantization_config` that makes transformers' loader fill our layers.

    Args:
        headers: dtype and shape of every tensor of the checkpoint, by name; of int8 codes the shape of the float weight.
        dtype: of most float tensors, and what int8 weights read as: every tensor gets the dtype that it has in the checkpoint.
            None gives floats the dtypes that transformers gives them.
        arrival: of a float checkpoint, the layers that become int8 while it is read.
    """
    dtype_name = "" if dtype is None else str(dtype)
    return {"quant_method": METHOD, "headers": headers_of(headers), "dtype": dtype_name, "arrival": arrival}


def headers_of(headers: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> Headers:
    """Return the headers of a checkpoint in the form that a config carries: as text, because transformers logs configs."""
    return Headers({name: (str(own), tuple(shape)) for name, (own, shape) in headers.items()})


def unmark_(model: nn.Module) -> None:
    """Remove from a loaded model what says that its loader was a quantization method."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    unmark_config_(model)
    # those that scales followed cannot be pickled
    for conversion in getattr(model, "_weight_conversions", None) or ():
        conversion.__class__ = plain_class(conversion)


def unmark_config_(model: nn.Module) -> None:
    """Remove from the configs of a loaded model what says so."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_is_quantized"):
            delattr(config, "_is_quantized")
        if config is not None and getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


def classes() -> tuple[type[Any], type[Any]]:
    """Make the classes that transformers wants for a quantization method, and register them once.

    Returns:
        The config, and the quantizer that it asks for.
    """
    # before the cache: importing it may bring us here a second time
    import transformers.quantizers.auto  # noqa: F401

    return _classes()


@functools.cache
def _classes() -> tuple[type[Any], type[Any]]:
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class TensorsConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """What the loader has to know of a checkpoint; without `dtype`, floats get the dtypes that transformers gives them."""

        def __init__(
            self,
            headers: Headers | None = None,
            dtype: str = "",
            arrival: Arrival | None = None,
            **_: Any,
        ) -> None:
            self.quant_method = METHOD
            self.headers = headers or Headers()
            self.dtype = dtype
            self.arrival = arrival

    class Filling(HfQuantizer):  # type: ignore[misc]
        """Puts int8 layers where a checkpoint has int8 codes, and where its floats shall become some."""

        is_trainable = False
        headers = Headers()

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            self.fill_(model, self.quantization_config)

        def fill_(self, model: Any, asked: Any) -> None:
            """Prepare a skeleton for what will be put into it.

            Args:
                model: on meta.
                asked: a `TensorsConfig`.
            """
            self.headers = asked.headers
            placed = place(model, asked.headers.weights())
            if asked.dtype:
                # in the dtype that it is built in, not in those of the file
                with contextlib.suppress(*BUILD_ERRORS):
                    self.computed = computed_on(model)
                stored = {name: tensor.dtype for name, tensor in placed.tensors.items()}
                take_dtypes_(model, _dtype(asked.dtype), stored)
                if asked.arrival is not None:
                    recast_(model, asked.arrival.floats)
                # what the class declares would be cast: here the file decides
                self.declared = {name: getattr(model, name, None) for name in DECLARATIONS}
                model.__dict__.update(dict.fromkeys(DECLARATIONS, frozenset()))
            modules = _modules_of(model, placed, set(asked.headers.codes))
            weights = {name for name, layer in weight_owners(model).items() if layer in modules}
            install_(model, modules)
            _untie_(model, weights)
            if asked.arrival is not None:
                # then transformers reads one weight at a time
                self.pre_quantized = False
                asked.arrival.await_(model)
            model.__dict__["initialize_weights"] = functools.partial(initialize_, model, asked.arrival)

        def update_weight_conversions(self, weight_conversions: Any, *_: Any) -> Any:
            codes = self.headers.codes
            return scales_follow(weight_conversions, codes, self.headers) if codes else weight_conversions

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            model.__dict__.update(getattr(self, "declared", {}))
            put_buffers_(model, getattr(self, "computed", {}))

    register_quantization_config(METHOD)(TensorsConfig)
    register_quantizer(METHOD)(Filling)
    return TensorsConfig, Filling


def initialize_(model: Any, arrival: Arrival | None = None) -> None:
    """Let transformers compute what is not in the checkpoint; some classes also set padding rows to zero that are in it."""
    del model.__dict__["initialize_weights"]
    tables = [(dict(m.named_parameters(recurse=False)).get("weight"), m) for m in model.modules()]
    rows = [
        weight.data[module.padding_idx]
        for weight, module in tables
        if weight is not None and isinstance(getattr(module, "padding_idx", None), int)
    ]
    loaded = [row.clone() for row in rows]
    model.initialize_weights()
    for row, values in zip(rows, loaded, strict=True):
        row.copy_(values)
    if arrival is not None:
        arrival.finish_()


def _untie_(model: Any, weights: set[str]) -> None:
    """Take int8 weights out of the model's ties: codes of their own are in the file, and a float table cannot be one of them.

    transformers does the same with two float tensors that differ.
    """
    ties: dict[str, str] = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        if {target, source} & weights:
            del ties[target]
            model.config.tie_word_embeddings = False
            logger.warning(
                "config.json ties %s to %s, but the checkpoint has int8 codes for one of them, which are used. Set "
                "tie_word_embeddings to false there, as other loaders may use the other",
                target,
                source,
            )


def _modules_of(model: Any, placed: Placement, codes: set[str]) -> list[str]:
    """Return the layers of a float skeleton that the int8 codes of a checkpoint belong to."""
    owners = weight_owners(model)
    coded = [name for name, sources in placed.sources.items() if not codes.isdisjoint(sources)]
    # what is merged of codes and floats is no int8 tensor
    stray = [n for n in coded if n not in owners or placed.tensors[n].dtype != torch.int8]
    if type(model).__name__ in (model.config.architectures or (type(model).__name__,)):
        # another class than the one that was saved has other heads
        stray += [key for key in placed.left if key in codes]
    if codes:
        stray += [f"{name}: {why}" for name, why in placed.broken.items()]
    if stray:
        raise CorruptCheckpointError(
            f"the checkpoint holds int8 codes where {type(model).__name__} has no layer that can use them "
            f"({'; '.join(stray[:3])}); it does not fit its config.json"
        )
    return list(dict.fromkeys(owners[name] for name in coded))
