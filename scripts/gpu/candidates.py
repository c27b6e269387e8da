"""How products may be cut up, and the table that follows from what was fastest."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from mono_quant.kernels.gpu.features import Features
from mono_quant.kernels.gpu.tables import (
    ANY,
    DESCRIPTORS,
    FEW,
    MAX_VECTORS,
    POINTERS,
    TABLE,
    VECTORS,
    Config,
    Row,
    fitted,
)

# Beside those of the table: what was worth trying with the prototype (gpu_probe.py), tokens x outputs x depth, warps, stages.
_TILES = (
    (128, 256, 128, 8, 3), (128, 256, 128, 8, 4), (256, 128, 128, 8, 3), (256, 128, 128, 8, 4), (128, 128, 128, 4, 4),
    (128, 128, 128, 8, 4), (64, 256, 128, 4, 4), (64, 128, 128, 4, 5), (64, 64, 128, 4, 6), (64, 64, 256, 4, 4), (64, 32, 256, 4, 4),
)  # fmt: skip
# outputs, depth, warps, stages
_VECTORS = (
    (4, 1024, 4, 3), (8, 1024, 4, 1), (8, 1024, 4, 4), (16, 1024, 4, 3), (8, 4096, 8, 1), (4, 4096, 8, 2), (16, 1024, 8, 3), (32, 512, 8, 3),
)  # fmt: skip
# tokens, outputs, depth, warps, stages, split
_FEW = (
    (16, 64, 256, 4, 5, 1), (16, 64, 256, 4, 4, 1), (16, 64, 128, 4, 6, 1), (16, 64, 512, 4, 3, 1), (16, 128, 256, 4, 4, 1),
    (16, 32, 256, 4, 4, 1), (16, 16, 512, 4, 4, 1), (16, 32, 128, 4, 5, 2), (16, 16, 128, 4, 5, 4), (16, 16, 256, 4, 4, 4),
    (64, 64, 256, 4, 4, 1), (64, 64, 128, 4, 5, 1), (64, 128, 128, 4, 5, 1), (64, 32, 128, 4, 4, 2), (64, 32, 128, 4, 4, 1),
)  # fmt: skip
_FEWEST_TOKENS = 64

Point = tuple[int, int, int]


def candidates(
    point: Point, planes: int, group: int, features: Features, *, more: bool = True
) -> list[Config]:
    """Return what is worth trying for M tokens, N outputs and depth K on a device.

    Args:
        point: M, N and K, both multiples of 16.
        planes: of the codes.
        group: values that share a scale, or 0: then a step has the depth of a group.
        features: of the device.
        more: beside the configurations of the table, those that a prototype tried.
    """
    table = (row.config for row in TABLE if (row.planes, row.grouped) == (planes, group > 0))
    tried = (*table, *(_more() if more else ()))
    # a step has the depth of a group, and what takes too much memory is made smaller, as for a product that is not timed
    groups = (dataclasses.replace(config, depth=group or config.depth) for config in tried)
    every = dict.fromkeys(fitted(config, planes, features.shared) for config in groups)
    return [config for config in every if _is_worth_it(config, point, planes, group, features)]


def _more() -> Iterator[Config]:
    yield from (Config(VECTORS, 1, *numbers) for numbers in _VECTORS)
    yield from (Config(FEW, *numbers) for numbers in _FEW)
    yield from (Config(kernel, *numbers) for numbers in _TILES for kernel in (POINTERS, DESCRIPTORS))


def _is_worth_it(config: Config, point: Point, planes: int, group: int, features: Features) -> bool:
    count, _, depth = point
    if config.kernel == VECTORS:
        return features.dp4a and not group and count * planes <= MAX_VECTORS
    if not features.int8_dot:
        return False
    if config.split > 1 and group:
        return False
    if depth < config.depth * config.split:
        return False
    if config.kernel == FEW:
        return count <= config.tokens and config.tokens <= max(16, 4 * count)
    if config.kernel == DESCRIPTORS and not features.tma:
        return False
    if count < _FEWEST_TOKENS // 2:
        return False
    return config.tokens <= max(_FEWEST_TOKENS, count)


def rows_of(best: Mapping[Point, Config], planes: int, *, grouped: bool) -> list[Row]:
    """Return the rows of the table that say what was fastest, for whole grids of M, N and K: the last of each covers what is larger.

    Args:
        best: by M, N and K.
        planes: of the codes.
        grouped: tokens have several groups.
    """
    largest = [max(point[axis] for point in best) for axis in range(3)]
    rows = []
    for point in sorted(best):
        limits = [ANY if value == most else value for value, most in zip(point, largest, strict=True)]
        rows.append(Row(*limits, best[point], planes, grouped))
    for row in list(rows):
        # between points, rows cover what they cover at the next larger one: nothing else has to be looked at
        without = [other for other in rows if other is not row]
        if all(first_covering(without, point) == config for point, config in best.items()):
            rows = without
    return rows


def first_covering(rows: Sequence[Row], point: Point) -> Config | None:
    """Return what a table says of M, N and K, if it says something."""
    count, outputs, depth = point
    for row in rows:
        if count <= row.rows and outputs <= row.outputs and depth <= row.depth:
            return row.config
    return None


def source(rows: list[Row]) -> str:
    """Return rows as `kernels/gpu/tables.py` has them."""
    return "".join(f"    {_row(row)},\n" for row in rows)


def _row(row: Row) -> str:
    limits = ", ".join("ANY" if value == ANY else str(value) for value in (row.rows, row.outputs, row.depth))
    config = row.config
    numbers = ", ".join(map(str, (config.tokens, config.outputs, config.depth, config.warps, config.stages)))
    split = f", split={config.split}" if config.split != 1 else ""
    more = (f", planes={row.planes}" if row.planes != 1 else "") + (", grouped=True" if row.grouped else "")
    return f"Row({limits}, Config({config.kernel.upper()}, {numbers}{split}){more})"
