"""How activations become codes: the schemes that a layer may ask for.

A scheme says how wide codes are and how many consecutive values of a token share a scale; `reference` defines what is computed
from them. One that is named gives the same bits on every processor and device; "auto" names the one that suits the path that runs
(`choice.activation_scheme`).
"""

from dataclasses import dataclass

AUTO = "auto"
# |sum| <= code * 128 * K must stay below 2^31: very long rows get narrower codes, whatever their batch is.
_CODE_BUDGET = (2**31 - 1) // 128


@dataclass(frozen=True)
class ActivationScheme:
    """Codes of `bits` bits, and one scale per token or per group of its values.

    Attributes:
        name: as users write it.
        bits: width of the codes; they lie in [-qmax, qmax].
        group: consecutive values along K that share a scale, a multiple of 64; 0 for all of a token.
        qmax: the largest code of rows that are not very long.
    """

    name: str
    bits: int
    group: int = 0

    @property
    def qmax(self) -> int:
        return (1 << self.bits - 1) - 1

    def widest_code(self, depth: int) -> int:
        """Return the largest code for rows of `depth` values, such that the sums of products stay exact in int32."""
        depth = min(depth, self.group) if self.group else depth
        return min(self.qmax, max(INT8.qmax, _CODE_BUDGET // max(1, depth)))

    def spans(self, depth: int) -> list[slice]:
        """Return where the groups of a row of `depth` values lie; a row without values has one."""
        step = self.group or max(1, depth)
        return [slice(start, min(start + step, depth)) for start in range(0, max(1, depth), step)]


INT8 = ActivationScheme("int8", 8)
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        INT8,
        ActivationScheme("int8-g128", 8, 128),
        ActivationScheme("int8-g64", 8, 64),
        ActivationScheme("int12", 12),
    )
}
# What a layer, a configuration or the command line may name.
ACTIVATIONS = (AUTO, *SCHEMES)


def check_activations(name: str) -> str:
    """Return `name` if it is one of `ACTIVATIONS`.

    Raises:
        ValueError: it is not.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation scheme {name!r}; choose from {', '.join(ACTIVATIONS)}")
    return name
