"""Which layers are quantized: safe defaults, then the user's rules on top.

Works on names, kinds and sizes alone, never on a model, so that a plan made from file headers and a conversion of
a model in memory decide alike. User rules add to the defaults; a default is only lifted by naming it in
`disable_defaults`.
"""

import difflib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mono_quant.errors import ConfigError, Name, Option, PatternError, Words

# Below this a layer's time and memory are noise: 16 kB in fp32.
MIN_PARAMS = 4096
# A row this short pays more for its scale and its rounding than it saves.
MIN_ROW = 16

DEFAULTS: Mapping[str, str] = {
    "head": "output head: its errors reach the output directly",
    "tied": "tied: shares its memory with another layer",
    "router": "router: a small error sends a token to other experts",
    "keep_in_fp32": "the model declares that it must stay in float32",
    "small": "tiny: too few weights to gain from int8",
    "portable": "convolution, fused attention or recurrent layer in a transformer: int8 here would keep transformers and "
    "vLLM from loading the checkpoint",
    "embedding": Words("embedding: int8 only on request (", Option("embeddings", True), ")"),
}

# Layers that engines fuse into one, or that must not differ: decided together.
_UNITS = (
    ("q_proj", "k_proj", "v_proj", "g_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("linear_q", "linear_k", "linear_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("wk", "weights_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


@dataclass(frozen=True)
class Layer:
    """One layer that holds a weight matrix.

    Attributes:
        name: full module name; the weight is `weight_name` below it.
        kind: `linear`, `transposed_linear`, `conv1d`, `conv2d`, `embedding`, `experts`, `attention`, `lstm`, `gru`, `rnn`,
            `lstm_cell`, `gru_cell`, `rnn_cell`, or the class name of a layer that int8 cannot hold.
        class_name: of the module.
        rows, depth: output channels and length of one row; several matrices count as one with the longest rows.
        defaults: names of the default rules that apply to it.
        unsupported: why int8 cannot hold it; empty when it can.
        aliases: other names the same module has.
        matrices: names below it of the parameters that become int8.
    """

    name: str
    kind: str
    class_name: str
    rows: int
    depth: int
    defaults: frozenset[str] = frozenset()
    unsupported: str = ""
    aliases: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.depth


@dataclass(frozen=True)
class Rules:
    """The user's side of the decision.

    Attributes:
        skip: patterns of layers to keep: a name, part of a dotted name, a glob, or `re:` and a regular expression.
        skip_types: class names of modules to keep, with everything inside them.
        min_params: layers with fewer weights are kept.
        disable_defaults: default rules that do not apply, from `DEFAULTS`.
        embeddings: quantize embeddings too.
    """

    skip: tuple[str, ...] = ()
    skip_types: tuple[str, ...] = ()
    min_params: int = 0
    disable_defaults: tuple[str, ...] = ()
    embeddings: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.disable_defaults) - set(DEFAULTS))
        if unknown:
            raise ConfigError(
                Name("disable_defaults"),
                f" names unknown rules {unknown}; the default rules are {sorted(DEFAULTS)}",
            )
        if "tied" in self.disable_defaults:
            raise ConfigError(
                Name("disable_defaults"),
                " names 'tied', which cannot be lifted: codes for one layer and floats for the other would "
                "be two weights. Untie them first, e.g. head.weight = nn.Parameter(head.weight.clone())",
            )
        if self.min_params < 0:
            raise ConfigError(Name("min_params"), f" is {self.min_params}; give 0 or a number of weights")
        for pattern in self.skip:
            compile_pattern(pattern, "skip")


@dataclass(frozen=True)
class Decision:
    """What is to happen to one layer; `reason` says why it is kept, and is empty when it is quantized."""

    layer: Layer
    reason: str = field(default="")

    @property
    def quantize(self) -> bool:
        """True when the layer becomes int8."""
        return not self.reason


def select(
    layers: Sequence[Layer], rules: Rules, modules: Mapping[str, str] | None = None
) -> dict[str, Decision]:
    """Decide about every layer.

    Args:
        layers: all layers with a weight matrix.
        rules: the user's rules.
        modules: class names of all modules by name; a pattern may also name a module that is no layer.

    Returns:
        One decision per layer name, in the order of `layers`.

    Raises:
        PatternError: a pattern or type matches nothing.
    """
    modules = modules or {}
    _check_matches(layers, rules, modules)
    reasons = {
        layer.name: _own_reason(layer, rules, container_reason((layer.name, *layer.aliases), modules, rules))
        for layer in layers
    }
    for unit in _units(layers):
        _size_unit(unit, reasons, rules)
        _keep_unit_together(unit, reasons)
    return {layer.name: Decision(layer, reasons[layer.name]) for layer in layers}


def _own_reason(layer: Layer, rules: Rules, around: str) -> str:
    if layer.unsupported:
        return DEFAULTS["router"] if "router" in layer.defaults else layer.unsupported
    reason = around or user_reason((layer.name, *layer.aliases), layer.class_name, layer.weights, rules)
    if reason:
        return reason
    for rule, reason in DEFAULTS.items():
        lifted = rule in rules.disable_defaults or (rule == "embedding" and rules.embeddings)
        if rule in layer.defaults and not lifted:
            return reason
    if layer.depth < MIN_ROW and "small" not in rules.disable_defaults:
        return short_rows(layer.depth)
    return _size_reason(layer.weights, rules)


def short_rows(depth: int) -> str:
    """Return why a matrix with rows of `depth` values stays in float."""
    return f"short rows: {depth} weights share one scale, fewer than {MIN_ROW}"


def user_reason(names: Iterable[str], class_name: str, weights: int | None, rules: Rules) -> str:
    """Return why the user's rules keep a module, or an empty string.

    Args:
        names: all names of the module.
        class_name: of the module.
        weights: how many it has; None when `min_params` does not apply to it.
        rules: the user's rules.
    """
    for pattern in rules.skip:
        if any(matches(pattern, name) for name in names):
            return f"skipped by the user: {pattern}"
    if class_name in rules.skip_types:
        return f"skipped by the user: type {class_name}"
    if weights is not None and weights < rules.min_params:
        return _too_few(rules.min_params)
    return ""


def _too_few(weights: int) -> str:
    return Words("fewer than ", Option("min_params", weights), " weights")


def reread(reason: str) -> str:
    """Return a reason as this module gave it, from the text that a report holds: with the options that it speaks of."""
    # what else became of a tensor follows the reason why it was kept
    asked = re.fullmatch(r"fewer than min_params=(\d+) weights((?:; .*)?)", reason)
    if asked:
        return Words(_too_few(int(asked[1])), asked[2])
    known = next((known for known in DEFAULTS.values() if f"{reason}; ".startswith(f"{known}; ")), None)
    return reason if known is None else Words(known, reason.removeprefix(known))


def container_reason(names: Iterable[str], modules: Mapping[str, str], rules: Rules) -> str:
    """Return why `skip_types` keeps a module that lies inside one of these types, or an empty string.

    Args:
        names: all names of the module.
        modules: class names of all modules by name.
        rules: the user's rules.
    """
    for name in names if rules.skip_types else ():
        parts = name.split(".")
        for depth in range(len(parts)):
            around = modules.get(".".join(parts[:depth]), "")
            if around in rules.skip_types:
                return f"skipped by the user: type {around}"
    return ""


def _size_reason(weights: int, rules: Rules) -> str:
    if weights < rules.min_params:
        return user_reason((), "", weights, rules)
    if weights < MIN_PARAMS and "small" not in rules.disable_defaults:
        return DEFAULTS["small"]
    return ""


def _units(layers: Sequence[Layer]) -> Iterable[list[Layer]]:
    by_name = {layer.name: layer for layer in layers}
    return ([by_name[name] for name in unit] for unit in units_of(by_name))


def units_of(names: Iterable[str]) -> list[list[str]]:
    """Return the layers among these that are decided together, in groups of more than one."""
    families: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for name in names:
        parent, _, last = name.rpartition(".")
        for unit in _UNITS:
            if last in unit:
                families[parent, unit].append(name)
    return [unit for unit in families.values() if len(unit) > 1]


def keep_also(decisions: Mapping[str, Decision], reasons: Mapping[str, str]) -> dict[str, Decision]:
    """Keep more layers, and what has to be decided together with them.

    Args:
        decisions: by layer name.
        reasons: why, by name of a layer that is to be kept.
    """
    merged = {name: reasons.get(name, decision.reason) for name, decision in decisions.items()}
    layers = [decision.layer for decision in decisions.values()]
    for unit in _units(layers):
        _keep_unit_together(unit, merged)
    return {layer.name: Decision(layer, merged[layer.name]) for layer in layers}


def _size_unit(unit: list[Layer], reasons: dict[str, str], rules: Rules) -> None:
    total = sum(layer.weights for layer in unit)
    for layer in unit:
        # the unit is fused by engines, so its size is what counts: a small k_proj does not hold back q_proj
        if reasons[layer.name] and reasons[layer.name] == _size_reason(layer.weights, rules):
            reasons[layer.name] = _size_reason(total, rules)


def _keep_unit_together(unit: list[Layer], reasons: dict[str, str]) -> None:
    kept = next((layer for layer in unit if reasons[layer.name]), None)
    for layer in unit if kept else ():
        if kept and not reasons[layer.name]:
            reasons[layer.name] = f"decided together with {kept.name.rpartition('.')[2]}, which is kept"


def compile_pattern(pattern: str, option: str = "") -> re.Pattern[str]:
    """Return a pattern of names as an expression for the whole name.

    Args:
        pattern: a name, which covers any dotted part, a glob, or `re:` and an expression.
        option: that it is of, for errors.

    Raises:
        ConfigError: it is none of these.
    """
    if not isinstance(pattern, str) or not pattern or pattern == "re:":
        raise ConfigError(
            f"{option} pattern {pattern!r} is empty or no text; give a name, a glob or re:<expression>"
        )
    try:
        if pattern.startswith("re:"):
            return re.compile(pattern[3:])
        if any(c in pattern for c in "*?["):
            return re.compile(fnmatch.translate(pattern))
    except re.error as e:
        raise ConfigError(f"{option} pattern {pattern!r} is no valid regular expression: {e}") from e
    return re.compile(rf"(?:.*\.)?{re.escape(pattern)}(?:\..*)?", re.DOTALL)


def matches(pattern: str, name: str) -> bool:
    """True when the pattern covers `name`: expressions and globs the whole name, plain names any dotted part."""
    return compile_pattern(pattern).fullmatch(name) is not None


def _check_matches(layers: Sequence[Layer], rules: Rules, modules: Mapping[str, str]) -> None:
    names = sorted({n for layer in layers for n in (layer.name, *layer.aliases)} | modules.keys() - {""})
    types = sorted({layer.class_name for layer in layers} | set(modules.values()))
    problems = [
        f"{pattern!r} matches no module; {near(pattern, names)}"
        for pattern in rules.skip
        if not any(matches(pattern, name) for name in names)
    ] + [
        f"type {name!r} is no module of this model; its types are {', '.join(types) or 'none'}"
        for name in rules.skip_types
        if name not in types
    ]
    if problems:
        raise PatternError(f"skip rule without a match: {'; '.join(problems)}")


def near(pattern: str, names: list[str]) -> str:
    """Say which names are like a pattern that matches none."""
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    known = dict.fromkeys([*names, *parts])
    near = difflib.get_close_matches(pattern.removeprefix("re:"), known, n=5, cutoff=0.4)
    return (
        f"near names: {', '.join(near)}" if near else f"the model's modules are named {', '.join(parts[:12])}"
    )
