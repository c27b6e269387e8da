"""Which kernel and which tiles for which shape: a list of rows, the first that covers a product counts.

Rows without a mark are the best of what was measured on an H200 for codes of one plane and one scale. Rows for 12-bit codes and for groups, and those marked
below, are derived from these and were not measured. `scripts/tune_gpu` prints such a list.
"""

import dataclasses
import functools
from dataclasses import dataclass

from mono_quant.kernels.gpu.features import Features

# Of weights one after the other, four values at a time; on tensor cores; the same for many tokens, read by pointers or descriptors.
VECTORS, FEW, POINTERS, DESCRIPTORS = "vectors", "few", "pointers", "descriptors"
# What a descriptor and the widest load need: rows and tensors that begin at multiples of so many bytes.
ALIGNMENT = 16
# Rows of codes in one program of `few.multiply_vectors`.
MAX_VECTORS = 4
ANY = 1 << 62


@dataclass(frozen=True, slots=True)
class Config:
    """How one product is cut up.

    Attributes:
        kernel: one of the names above.
        tokens: of a tile.
        outputs: of a tile.
        depth: values along K of a step; of codes with groups it is the group that counts.
        warps: of a program.
        stages: of the loads in its loop.
        split: parts of a step, each for a warp of its own where tiles are too small to be shared by warps; of FEW alone.
    """

    kernel: str
    tokens: int
    outputs: int
    depth: int
    warps: int
    stages: int
    split: int = 1

    def bytes(self, planes: int) -> int:
        """Return a bound of the shared memory that a program takes, which is that of its loads, and some for barriers."""
        return self.stages * self.split * self.depth * (planes * self.tokens + self.outputs) + 1024


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: `config` is for products of codes with `planes` planes and, if `grouped`, with several groups.

    Attributes:
        rows: tokens, at most.
        outputs: N, at most.
        depth: K, at most.
    """

    rows: int
    outputs: int
    depth: int
    config: Config
    planes: int = 1
    grouped: bool = False


TABLE: tuple[Row, ...] = (
    Row(1, 4096, 8192, Config(VECTORS, 1, 4, 1024, 4, 3)),
    Row(1, ANY, 8192, Config(VECTORS, 1, 8, 1024, 4, 1)),
    Row(1, ANY, ANY, Config(VECTORS, 1, 8, 1024, 4, 4)),
    Row(4, 1024, 4096, Config(FEW, 16, 16, 512, 4, 4)),
    # not measured: there K was split among programs, which needs counters that somebody has to keep
    Row(4, 4096, 4096, Config(FEW, 16, 16, 128, 4, 5, split=4)),
    Row(4, 4096, ANY, Config(VECTORS, 4, 16, 1024, 4, 3)),
    Row(16, 1024, ANY, Config(FEW, 16, 16, 512, 4, 4)),
    # not measured, as above
    Row(8, 8192, 8192, Config(FEW, 16, 16, 128, 4, 5, split=4)),
    Row(16, ANY, 8192, Config(FEW, 16, 64, 256, 4, 5)),
    # not measured, as above
    Row(16, 8192, ANY, Config(FEW, 16, 16, 128, 4, 5, split=4)),
    Row(16, ANY, ANY, Config(FEW, 16, 64, 256, 4, 5)),
    # not measured, as above
    Row(64, 8191, ANY, Config(FEW, 64, 32, 256, 4, 4)),
    Row(64, ANY, ANY, Config(POINTERS, 64, 128, 128, 4, 5)),
    Row(256, 4096, ANY, Config(POINTERS, 64, 64, 128, 4, 6)),
    Row(2048, 1024, ANY, Config(DESCRIPTORS, 128, 128, 128, 4, 4)),
    Row(256, 8191, ANY, Config(DESCRIPTORS, 128, 128, 128, 4, 4)),
    Row(512, 4096, ANY, Config(DESCRIPTORS, 128, 128, 128, 4, 4)),
    Row(ANY, ANY, ANY, Config(DESCRIPTORS, 128, 256, 128, 8, 4)),
    # two sums for each output: half the tile
    Row(2, 4096, 8192, Config(VECTORS, 2, 4, 1024, 4, 3), planes=2),
    Row(2, ANY, ANY, Config(VECTORS, 2, 8, 1024, 4, 4), planes=2),
    Row(16, 8192, ANY, Config(FEW, 16, 16, 128, 4, 5, split=4), planes=2),
    Row(16, ANY, ANY, Config(FEW, 16, 64, 256, 4, 4), planes=2),
    Row(64, 8191, ANY, Config(FEW, 64, 32, 128, 4, 4), planes=2),
    Row(256, 4096, ANY, Config(POINTERS, 64, 64, 128, 4, 5), planes=2),
    Row(ANY, ANY, ANY, Config(DESCRIPTORS, 128, 128, 128, 8, 4), planes=2),
    # a step is a group, and groups are added in their order
    Row(16, ANY, ANY, Config(FEW, 16, 32, 128, 4, 5), grouped=True),
    Row(64, 8191, ANY, Config(FEW, 64, 32, 128, 4, 5), grouped=True),
    Row(256, 4096, ANY, Config(POINTERS, 64, 64, 128, 4, 5), grouped=True),
    Row(256, ANY, ANY, Config(POINTERS, 64, 128, 128, 4, 4), grouped=True),
    Row(ANY, ANY, ANY, Config(DESCRIPTORS, 128, 128, 128, 8, 4), grouped=True),
    # reached where Triton has no int8 on tensor cores
    Row(4, ANY, ANY, Config(VECTORS, 4, 16, 1024, 4, 3)),
)


@functools.lru_cache(maxsize=1024)
def choose(
    rows: int, outputs: int, depth: int, planes: int, group: int, features: Features, aligned: bool = True
) -> Config | None:
    """Return how a product is to be cut up on a device, or None where Triton has no instructions for it.

    Args:
        rows: tokens, M.
        outputs: N.
        depth: K.
        planes: of the codes: 2 for 12 bits.
        group: values that share a scale, where a token has several of them; else 0.
        features: of the device.
        aligned: codes and weights begin at multiples of `ALIGNMENT` bytes.
    """
    aligned = aligned and depth % ALIGNMENT == 0 and depth > 0
    has_vectors = features.dp4a and aligned and rows * planes <= MAX_VECTORS
    for row in TABLE:
        covers = rows <= row.rows and outputs <= row.outputs and depth <= row.depth
        if not covers or (row.planes, row.grouped) != (planes, group > 0):
            continue
        if not (has_vectors if row.config.kernel == VECTORS else features.int8_dot):
            continue
        config = dataclasses.replace(row.config, depth=group or row.config.depth)
        if config.kernel == DESCRIPTORS and not (features.tma and aligned):
            config = dataclasses.replace(config, kernel=POINTERS)
        return fitted(config, planes, features.shared)
    return None


def fitted(config: Config, planes: int, shared: int) -> Config:
    """Return `config`, or the next smaller one that takes no more than `shared` bytes: stages go first, then the longer side."""
    while config.bytes(planes) > shared:
        if config.stages > 3:
            config = dataclasses.replace(config, stages=config.stages - 1)
        elif config.outputs >= max(64, config.tokens):
            config = dataclasses.replace(config, outputs=config.outputs // 2)
        elif config.kernel != FEW and config.tokens > 32:
            config = dataclasses.replace(config, tokens=config.tokens // 2)
        else:
            config = dataclasses.replace(config, stages=config.stages - 1)
    return config
