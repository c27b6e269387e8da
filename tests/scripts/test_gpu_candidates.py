"""The table that follows from what was fastest: at every point that was measured it names that."""

import itertools
import random

import pytest

pytest.importorskip("triton")

from gpu.candidates import candidates, first_covering, rows_of, source

from mono_quant.kernels.gpu import tables
from mono_quant.kernels.gpu.features import of_nvidia
from mono_quant.kernels.gpu.tables import ANY, DESCRIPTORS, FEW, POINTERS, TABLE, VECTORS, Config, Row

HOPPER = of_nvidia((9, 0), 227 << 10, 132, overlap=True)
AMPERE = of_nvidia((8, 6), 99 << 10, 40, overlap=False)
POINTS = list(itertools.product((1, 16, 4096), (1024, 4096, 14336), (1024, 14336)))


def of(*numbers):
    return Config(FEW, *numbers)


@pytest.mark.parametrize("seed", range(20))
def test_a_table_names_what_was_fastest_at_every_point(seed):
    choose = random.Random(seed)
    few = [of(16, 64, 256, 4, stages) for stages in range(1 + seed % 4)] or [of(16, 64, 256, 4, 1)]
    best = {point: choose.choice(few) for point in POINTS}
    rows = rows_of(best, 1, grouped=False)
    assert {point: first_covering(rows, point) for point in POINTS} == best
    # and says something of what is larger
    assert first_covering(rows, (10**6, 10**6, 10**6)) == best[POINTS[-1]]


def test_what_differs_nowhere_is_one_row():
    same = of(16, 64, 256, 4, 5)
    assert rows_of(dict.fromkeys(POINTS, same), 2, grouped=True) == [Row(ANY, ANY, ANY, same, 2, True)]


def test_one_point_of_its_own_costs_a_row_and_no_other_point():
    same, other = of(16, 64, 256, 4, 5), of(16, 16, 512, 4, 4)
    best = {**dict.fromkeys(POINTS, same), (16, 4096, 1024): other}
    rows = rows_of(best, 1, grouped=False)
    assert rows == [
        Row(1, ANY, ANY, same),
        Row(16, 1024, ANY, same),
        Row(16, 4096, 1024, other),
        Row(ANY, ANY, ANY, same),
    ]


def test_what_is_printed_is_the_table():
    assert eval(f"({source(list(TABLE))})", vars(tables)) == TABLE


@pytest.mark.parametrize(("planes", "group"), [(1, 0), (2, 0), (1, 128)])
@pytest.mark.parametrize("features", [HOPPER, AMPERE])
def test_every_point_has_candidates_that_the_device_can_run(features, planes, group):
    for point in itertools.product((1, 4, 16, 64, 256, 4096), (1024, 14336), (1024, 14336)):
        found = candidates(point, planes, group, features)
        assert found, point
        assert all(config.bytes(planes) <= features.shared for config in found)
        assert features.tma or all(config.kernel != DESCRIPTORS for config in found)
        if group:
            assert {config.depth for config in found} == {group} and all(
                config.kernel != VECTORS for config in found
            )
        if point[0] > 64:
            assert {config.kernel for config in found} <= {POINTERS, DESCRIPTORS}


def test_a_device_without_int8_on_tensor_cores_has_vectors_alone():
    features = of_nvidia((7, 5), 64 << 10, 40, overlap=False)
    assert {config.kernel for config in candidates((1, 4096, 4096), 1, 0, features)} == {VECTORS}
    assert candidates((64, 4096, 4096), 1, 0, features) == []
