"""For which layers more bits pay: a rule over what was measured of each, and what people read of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from mono_quant.kernels import AUTO
from mono_quant.planning.report import number
from mono_quant.planning.rules import matches, units_of
from mono_quant.planning.schemes import WIDE, Asked, Choice, plain, spelled
from mono_quant.planning.tables import Columns, Part
from mono_quant.planning.tables import plain as plain_text

# What `auto` is where bits cost time; where they cost none it is the wide scheme anyway.
NARROW = "int8-g128"
# A layer is worth a wider scheme when it makes this many times as much noise as its share of the work, ...
DENSITY = 2.0
# ... and changing a few is worth it when together they make this share of all noise: with less, the output hardly gets closer.
REMOVED = 0.5


@dataclass(frozen=True)
class LayerNoise:
    """What rounding its activations does to the output of one int8 layer, on the inputs that it was measured with.

    Attributes:
        name: of the layer.
        scheme: that it has now; `auto` counts as `NARROW`.
        work: multiplications.
        crest: largest magnitude of a token over its root mean square, the median of all tokens.
        peak_crest: the same, exceeded by one token in a hundred.
        errors: ||y - r|| / ||r|| by scheme, where r is the product of the same int8 weights with activations in float.
    """

    name: str
    scheme: str
    work: int
    crest: float
    peak_crest: float
    errors: Mapping[str, float]

    @property
    def noise(self) -> float:
        """The energy of the noise with the scheme that it has, relative to that of the output."""
        return self.errors[NARROW if self.scheme == AUTO else self.scheme] ** 2

    @property
    def gain(self) -> float:
        """How much smaller that is with the wide scheme."""
        return max(0.0, self.noise - self.errors[WIDE] ** 2)


@dataclass(frozen=True, repr=False)
class Suggestion:
    """The layers for which a wider scheme pays, and what was measured.

    Attributes:
        layers: that were measured, in the order of the model.
        chosen: names of those for which it pays; empty where no few layers suffice.
        probe: the inputs.
    """

    layers: tuple[LayerNoise, ...]
    chosen: tuple[str, ...]
    probe: str

    def __repr__(self) -> str:
        return f"<Suggestion: {self.verdict}>"

    @property
    def activations(self) -> str | dict[str, str]:
        """What to pass as `activations=`: patterns with their schemes, or `auto`."""
        return spelled(self.asked)

    @property
    def asked(self) -> Asked:
        """The same in the one form that a config has."""
        return tuple((pattern, WIDE) for pattern in _patterns(self.chosen, self.layers)) or AUTO

    @property
    def removed(self) -> float:
        """Share of the noise energy, summed over all layers, that the chosen ones would no longer make."""
        return _share(
            [layer.gain for layer in self.layers if layer.name in self.chosen],
            sum(x.noise for x in self.layers),
        )

    @property
    def work(self) -> float:
        """Share of the multiplications that are in the chosen layers."""
        return _share(
            [layer.work for layer in self.layers if layer.name in self.chosen],
            sum(x.work for x in self.layers),
        )

    def total(self, scheme: str) -> float:
        """Return the root of the noise energies of all layers, summed, with one scheme in all of them."""
        return sqrt(sum(layer.errors[scheme] ** 2 for layer in self.layers))

    @property
    def verdict(self) -> str:
        """What was found, in a sentence."""
        count = len(self.layers)
        if self.chosen:
            return (
                f"{WIDE} in {len(self.chosen)} of {count} layers ({self.work:.0%} of the work) takes away {self.removed:.0%} of the "
                f"noise that rounding activations makes ({NARROW} where it is left open)"
            )
        if not any(layer.gain for layer in self.layers):
            return f"nothing to widen: none of {count} int8 layers that ran makes more noise than with {WIDE}"
        return (
            f"no few layers suffice: the noise of rounding activations is spread over the {count} layers. What helps is another "
            f"scheme for all of them: summed over the layers it is {number(self.total(NARROW))} with {NARROW}, "
            + ", ".join(f"{number(self.total(name))} with {name}" for name in self._others())
        )

    def _others(self) -> Sequence[str]:
        return [name for name in self.layers[0].errors if name not in ("int8", NARROW)]

    def choices(self) -> dict[str, Choice]:
        """Return the scheme of each chosen layer with the reason."""
        return {
            layer.name: Choice(WIDE, "measured: much more noise than its share of the work")
            for layer in self.layers
            if layer.name in self.chosen
        }

    def table(self) -> str:
        """Return what was measured as text for a terminal, the noisiest layers first."""
        return plain_text(self.parts())

    def parts(self, limit: int = 40) -> Iterator[Part]:
        """Yield the same in parts, with at most so many layers."""
        yield self.verdict
        if not self.layers:
            return
        yield f"measured on {self.probe}"
        yield ""
        schemes = list(self.layers[0].errors)
        head = ("", "layer", "work", "crest", "1 % above", *schemes)
        ordered = sorted(self.layers, key=lambda layer: -layer.gain)
        total = sum(layer.work for layer in self.layers) or 1
        rows = [
            (
                WIDE if layer.name in self.chosen else "" if layer.scheme == AUTO else f"({layer.scheme})",
                layer.name,
                f"{layer.work / total:.1%}",
                f"{layer.crest:.1f}",
                f"{layer.peak_crest:.1f}",
                *(f"{layer.errors[scheme]:.2g}" for scheme in schemes),
            )
            for layer in ordered[:limit]
        ]
        yield Columns(rows, head, right=frozenset(range(2, len(head))))
        if len(ordered) > limit:
            yield f"... and {len(ordered) - limit} more"
        if self.chosen:
            yield ""
            yield f"activations={self.activations!r}"

    def to_dict(self) -> dict[str, object]:
        """Return plain data."""
        return {
            "activations": plain(self.asked),
            "chosen": list(self.chosen),
            "probe": self.probe,
            "removed": self.removed,
            "work": self.work,
            "verdict": self.verdict,
            "layers": [
                {
                    "name": layer.name,
                    "scheme": layer.scheme,
                    "work": layer.work,
                    "crest": layer.crest,
                    "peak_crest": layer.peak_crest,
                    "errors": dict(layer.errors),
                }
                for layer in self.layers
            ],
        }


def suggest_for(layers: Sequence[LayerNoise], probe: str) -> Suggestion:
    """Choose the few layers whose wider scheme takes away most of the noise, if there are such.

    Layers are independent sources of noise, so that energies add. Those that are decided together (`units_of`) are taken together.
    As every one that is chosen makes `DENSITY` times as much noise as its share of the work, they never do more than 1 / `DENSITY`
    of it.

    Args:
        layers: as measured.
        probe: the inputs that they were measured with.
    """
    by_name = {layer.name: layer for layer in layers}
    noise = sum(layer.noise for layer in layers)
    work = sum(layer.work for layer in layers)
    units = units_of(by_name)
    together = {name for unit in units for name in unit}
    chosen: set[str] = set()
    for names in [*units, *([name] for name in by_name if name not in together)]:
        gain = _share([by_name[name].gain for name in names], noise)
        if gain and gain >= DENSITY * _share([by_name[name].work for name in names], work):
            chosen.update(names)
    pays = _share([by_name[name].gain for name in chosen], noise) >= REMOVED
    return Suggestion(tuple(layers), tuple(name for name in by_name if name in chosen and pays), probe)


def _share(parts: Sequence[float], whole: float) -> float:
    return sum(parts) / whole if whole else 0.0


def _patterns(chosen: Sequence[str], layers: Sequence[LayerNoise]) -> list[str]:
    """Return patterns that match the chosen ones of the layers and no other: by their last name where that says it."""
    patterns: dict[str, None] = {}
    for name in chosen:
        pattern = f"*.{name.rpartition('.')[2]}"
        same = [layer.name for layer in layers if matches(pattern, layer.name)]
        is_told = name in same and not name.rpartition(".")[2].isdigit() and set(same) <= set(chosen)
        patterns[pattern if is_told else name] = None
    return list(patterns)
