"""Which activation scheme each layer gets: what the user asks for, over what the kind of its block needs.

Works on names alone, so that a plan, a conversion and a loaded model decide alike.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from mono_quant.errors import ConfigError, Name, PatternError
from mono_quant.kernels import ACTIVATIONS, AUTO
from mono_quant.planning.rules import compile_pattern, matches, near

# In place of a scheme: the layers for which a wider one pays are found by running the model.
MEASURED = "measured"
ASKED = "asked for"
# A scheme for all layers, or pairs of a pattern and a scheme.
Asked: TypeAlias = str | tuple[tuple[str, str], ...]

# What `auto` means for the projections of some blocks, on every processor, and why.
WIDE = "int12"
BLOCKS: Mapping[str, str] = {
    # measured on small random models of 14 recurrent and hybrid families; no trained ones were at hand
    "recurrence": "state space or linear attention: what its projections get wrong is multiplied, and carried from token to token",
}


@dataclass(frozen=True)
class Choice:
    """The scheme of one layer, and why it is that; no reason where it is left open."""

    scheme: str = AUTO
    reason: str = field(default="")


OPEN = Choice()


def parse_activations(given: object) -> Asked:
    """Return what an option `activations` asks for.

    Args:
        given: a scheme, `auto`, `measured`, or a mapping (or pairs) of patterns to schemes.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(given, str):
        return _known(given, (*ACTIVATIONS, MEASURED))
    pairs = _pairs(given)
    if not pairs:
        raise ConfigError(
            Name("activations"),
            f" is {given!r}; give one of {', '.join(map(repr, (*ACTIVATIONS, MEASURED)))}, or a mapping of patterns to schemes",
        )
    for pattern, scheme in pairs:
        compile_pattern(pattern, "activations")
        _known(scheme, ACTIVATIONS, pattern)
    return tuple(pairs)


def _pairs(given: object) -> list[tuple[str, str]]:
    """Return the pairs of a mapping, or of the list that it is in a file; none of something else."""
    if isinstance(given, Mapping):
        return list(given.items())
    are_pairs = isinstance(given, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in given
    )
    return [(pattern, scheme) for pattern, scheme in given] if are_pairs else []  # type: ignore[attr-defined]


def _known(scheme: object, allowed: Sequence[str], pattern: str = "") -> str:
    if isinstance(scheme, str) and scheme in allowed:
        return scheme
    of = f" of {pattern!r}" if pattern else ""
    raise ConfigError(
        Name("activations"), f"{of} is {scheme!r}; use one of {', '.join(repr(name) for name in allowed)}"
    )


def plain(asked: Asked) -> str | list[list[str]]:
    """Return what is asked for as data: pairs in their order, which an object of JSON does not keep."""
    return asked if isinstance(asked, str) else [list(pair) for pair in asked]


def spelled(asked: Asked) -> str | dict[str, str]:
    """Return what is asked for as users write it."""
    return asked if isinstance(asked, str) else dict(asked)


def blocks_of(model: nn.Module) -> dict[str, str]:
    """Return the names of the modules that lie in a block of `BLOCKS`, each with the name of its rule."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _decays(module) and not any(_is_gate(child) for child in module.children()):
            continue
        inner = [name, *(f"{name}.{n}" for n, child in module.named_children() if _is_gate(child))]
        for block in inner:
            children = model.get_submodule(block).named_children()
            found |= {f"{block}.{child}".lstrip("."): "recurrence" for child, _ in children}
    return found


def _decays(module: nn.Module) -> bool:
    """Say whether a module has a decay: Mamba and what came after it learn its logarithm, lightning attention has a fixed one."""
    return "A_log" in module._parameters or "slope_rate" in module._buffers


def _is_gate(module: nn.Module) -> bool:
    """Say whether a module computes the decay of the block around it (Kimi's linear attention)."""
    return _decays(module) and type(module).__name__.endswith("Gate")


def check_patterns(layers: Iterable[Sequence[str]], asked: Asked) -> None:
    """Refuse patterns that match nothing.

    Args:
        layers: all names of each layer that could have int8 activations.
        asked: see `parse_activations`.

    Raises:
        PatternError: a pattern matches no layer.
    """
    if isinstance(asked, str):
        return
    names = sorted({name for own in layers for name in own})
    problems = [
        f"{pattern!r} matches no layer; {near(pattern, names)}"
        for pattern, _ in asked
        if not any(matches(pattern, name) for name in names)
    ]
    if problems:
        raise PatternError(
            Name("activations"),
            f" without a match among the layers that can be int8: {'; '.join(problems)}",
        )


def choose(layers: Mapping[str, Sequence[str]], asked: Asked, blocks: Mapping[str, str]) -> dict[str, Choice]:
    """Return the scheme of each layer.

    Of several patterns that match a layer the last one counts; what none matches is as without a request. Only what is left open
    (`auto`) follows the kind of a block.

    Args:
        layers: all names of each int8 layer, by the name that counts.
        asked: see `parse_activations`.
        blocks: of the model; see `blocks_of`.
    """
    return {name: _choice(own, asked, blocks) for name, own in layers.items()}


def _choice(names: Sequence[str], asked: Asked, blocks: Mapping[str, str]) -> Choice:
    pairs = ((("*", asked),) if asked != MEASURED else ()) if isinstance(asked, str) else asked
    found = [(pattern, scheme) for pattern, scheme in pairs if any(matches(pattern, n) for n in names)]
    if found and found[-1][1] != AUTO:
        pattern, scheme = found[-1]
        return Choice(scheme, ASKED if isinstance(asked, str) else f"{ASKED}: {pattern}")
    rule = next((blocks[name] for name in names if name in blocks), "")
    return Choice(WIDE, BLOCKS[rule]) if rule else OPEN


def without_layer(layers: Mapping[str, Sequence[str]], asked: Asked) -> Iterator[str]:
    """Yield the patterns that match none of the layers that became int8."""
    for pattern, _ in () if isinstance(asked, str) else asked:
        if not any(matches(pattern, name) for own in layers.values() for name in own):
            yield pattern
