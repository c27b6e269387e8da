"""What the user asks for: one frozen value, merged from arguments, a config and defaults in that order."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch

from mono_quant.errors import ConfigError, Name, Option
from mono_quant.kernels import AUTO
from mono_quant.planning.rules import Rules
from mono_quant.planning.schemes import Asked, parse_activations, plain

DTYPES = ("int8", "fp16")
# What matrices that stay in float can be stored in beside int8 layers, by the name of the request.
HALVES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}

_DTYPE_NAMES: Mapping[Any, str] = {
    "int8": "int8",
    "qint8": "int8",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    torch.int8: "int8",
    torch.float16: "fp16",
}

# Names from torch.ao, transformers and the first mono-quant, and what they are called here.
_ALIASES = {
    "modules_to_not_convert": "skip",
    "skip_layer_names": "skip",
    "skip_layer_types": "skip_types",
    "skip_param_threshold": "min_params",
    "scheme": "dtype",
}

# Options of other tools that name a choice which is fixed here: the one value that is true, or an error.
_FIXED = {
    "symmetric": (True, "weights and activations are symmetric"),
    "per_channel": (True, "weights have one scale per output channel"),
    "dynamic": (True, "activation scales are computed per token at run time"),
}


def parse_dtype(dtype: object) -> str:
    """Return `int8` or `fp16` for a name or a torch dtype.

    Raises:
        ConfigError: it is neither.
    """
    # By name, so that the removal of torch.qint8 changes nothing here.
    name = "qint8" if str(dtype) == "torch.qint8" else dtype
    if isinstance(name, str):
        name = name.removeprefix("torch.").lower()
    if isinstance(name, (str, torch.dtype)) and name in _DTYPE_NAMES:
        return _DTYPE_NAMES[name]
    raise ConfigError(
        Name("dtype"),
        f" is {dtype!r}; use 'int8' or 'fp16' (torch.int8, torch.qint8 and torch.float16 work too)",
    )


@dataclass(frozen=True)
class QuantizationConfig:
    """A request for a conversion.

    Attributes:
        dtype: `int8` or `fp16`.
        skip: layers to keep, on top of the defaults: names, parts of dotted names, globs, `re:` expressions that
            match the whole name.
        skip_types: classes or class names of modules to keep, with everything inside them.
        min_params: keep layers with fewer weights than this.
        disable_defaults: default rules to lift: `head`, `tied`, `router`, `keep_in_fp32`, `small`, `portable`,
            `embedding`.
        embeddings: quantize `nn.Embedding` tables per row (int8).
        on_nonfinite: `error`, or `keep` a layer whose weight holds NaN or infinity as it is.
        on_overflow: `keep` a layer whose values do not fit float16 (a matrix that does not fit what `kept` asks for) as it
            is, or `error`.
        fidelity: measure the output against the original: True, False, or `auto` (models up to one billion
            parameters that can be run).
        kept: how matrices that an int8 conversion leaves in float are stored: `same`, or in `fp16` or `bf16` where they are
            wider. What is declared to need float32, routers, and vectors stay as they are.
        activations: how the inputs of int8 layers become codes: `auto` (what suits the processor that runs, and what the block
            of a layer needs), `int8`, `int8-g128`, `int8-g64` or `int12` (the same bits on every processor), `measured` (the few
            layers for which it pays get more bits), or a mapping of patterns, as in `skip`, to schemes; of several that match
            the last one counts, and what none matches is `auto`.
    """

    # what transformers asks a `quantization_config`
    quant_method: ClassVar[str] = "mono_quant"

    dtype: str = "int8"
    skip: tuple[str, ...] = ()
    skip_types: tuple[str, ...] = ()
    min_params: int = 0
    disable_defaults: tuple[str, ...] = ()
    embeddings: bool = False
    on_nonfinite: str = "error"
    on_overflow: str = "keep"
    fidelity: bool | str = "auto"
    kept: str = "same"
    activations: Asked | Mapping[str, str] = AUTO

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "dtype", parse_dtype(self.dtype))
        put(self, "skip", _names(self.skip, "skip"))
        put(self, "skip_types", _names(self.skip_types, "skip_types"))
        put(self, "disable_defaults", _names(self.disable_defaults, "disable_defaults"))
        if type(self.min_params) is not int:
            raise ConfigError(f"min_params is {self.min_params!r}; give a whole number of weights")
        _one_of("on_nonfinite", self.on_nonfinite, ("error", "keep"))
        _one_of("on_overflow", self.on_overflow, ("keep", "error"))
        _one_of("fidelity", self.fidelity, (True, False, "auto"))
        _one_of("embeddings", self.embeddings, (True, False))
        _one_of("kept", self.kept, ("same", *HALVES))
        put(self, "activations", parse_activations(self.activations))
        if self.dtype == "fp16" and self.activations != AUTO:
            raise ConfigError(
                Name("activations"),
                f" is {plain(self.asked_activations)!r}, but fp16 leaves activations in float. Leave it out, or convert to int8",
            )
        if self.dtype == "fp16" and self.kept == "bf16":
            raise ConfigError(
                Option("kept", "bf16"),
                " is about what int8 leaves in float; fp16 stores all that fits in float16. Leave it out",
            )
        self.rules()

    def rules(self) -> Rules:
        """Return the selection rules of this request."""
        return Rules(self.skip, self.skip_types, self.min_params, self.disable_defaults, self.embeddings)

    @property
    def asked_activations(self) -> Asked:
        """`activations` in its one form: a name, or pairs of a pattern and a scheme."""
        return parse_activations(self.activations)

    @property
    def activations_summary(self) -> str:
        """What is asked for in a word: a name, or `by pattern`."""
        return self.asked_activations if isinstance(self.asked_activations, str) else "by pattern"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives back an equal config."""
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return data | {"activations": plain(self.asked_activations)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantizationConfig":
        """Rebuild a config from `to_dict` or from keyword arguments, aliases included.

        Raises:
            ConfigError: an option is unknown or its value is not supported.
        """
        return cls(**_canonical(data))

    def override(self, given: Mapping[str, Any]) -> "QuantizationConfig":
        """Return a copy in which the given arguments win, also where they equal a default.

        Raises:
            ConfigError: an option is unknown or its value is not supported.
        """
        return replace(self, **_canonical(given))


def merge(
    config: QuantizationConfig | Mapping[str, Any] | None, given: Mapping[str, Any]
) -> QuantizationConfig:
    """Merge explicit arguments over a config over the defaults.

    Args:
        config: the base, or None for the defaults.
        given: only what the caller really passed.

    Raises:
        ConfigError: an option is unknown or its value is not supported.
    """
    if config is None:
        base = QuantizationConfig()
    elif isinstance(config, QuantizationConfig):
        base = config
    elif isinstance(config, Mapping):
        base = QuantizationConfig.from_dict(config)
    else:
        raise ConfigError(f"config is a {type(config).__name__}; give a QuantizationConfig or a dict")
    return base.override(given)


def _canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(QuantizationConfig)}
    result: dict[str, Any] = {}
    for name, value in given.items():
        if name in _FIXED:
            expected, why = _FIXED[name]
            if value is not expected:
                raise ConfigError(
                    f"{name}={value!r} is not supported: {why}; leave it out or give {expected}"
                )
            continue
        target = _ALIASES.get(name, name)
        if target not in known:
            raise ConfigError(f"unknown option {name!r}; the options are {', '.join(sorted(known))}")
        if target in result and target not in ("skip", "skip_types"):
            raise ConfigError(f"{target} is given twice, the second time as {name}={value!r}; give it once")
        if target in result:
            value = (*_names(result[target], target), *_names(value, name))
        result[target] = value
    return result


def _names(value: object, option: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, type)):
        value = (value,)
    if not isinstance(value, Iterable):
        raise ConfigError(f"{option} is {value!r}; give a name or a list of names")
    names = tuple(item.__name__ if isinstance(item, type) else item for item in value)
    bad = [n for n in names if not isinstance(n, str)]
    if bad:
        raise ConfigError(f"{option} holds {bad[0]!r}, which is no name; give names as text")
    return names


def _one_of(option: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        raise ConfigError(Name(option), f" is {value!r}; use one of {', '.join(repr(a) for a in allowed)}")
