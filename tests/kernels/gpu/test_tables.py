"""The choice of kernels and tiles by shape and device."""

import dataclasses
import random

import pytest

pytest.importorskip("triton")

from mono_quant.kernels.gpu.features import of_nvidia, of_others
from mono_quant.kernels.gpu.tables import DESCRIPTORS, FEW, POINTERS, TABLE, VECTORS, Config, choose, fitted

# shared memory that one program may take, as NVIDIA's programming guide has it
SHARED = {(7, 5): 64, (8, 0): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
DEVICES = {
    f"sm_{major}{minor}": of_nvidia((major, minor), kib << 10, 100, True)
    for (major, minor), kib in SHARED.items()
} | {"amd": of_others("amd", 64 << 10, 100)}
HOPPER = DEVICES["sm_90"]


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((1, 4096, 4096), Config(VECTORS, 1, 4, 1024, 4, 3)),
        ((1, 14336, 4096), Config(VECTORS, 1, 8, 1024, 4, 1)),
        ((1, 4096, 14336), Config(VECTORS, 1, 8, 1024, 4, 4)),
        ((4, 4096, 14336), Config(VECTORS, 4, 16, 1024, 4, 3)),
        ((16, 14336, 4096), Config(FEW, 16, 64, 256, 4, 5)),
        ((16, 1024, 1024), Config(FEW, 16, 16, 512, 4, 4)),
        ((64, 14336, 4096), Config(POINTERS, 64, 128, 128, 4, 5)),
        ((256, 4096, 4096), Config(POINTERS, 64, 64, 128, 4, 6)),
        ((512, 4096, 4096), Config(DESCRIPTORS, 128, 128, 128, 4, 4)),
        ((4096, 1024, 1024), Config(DESCRIPTORS, 128, 256, 128, 8, 4)),
        ((2048, 14336, 4096), Config(DESCRIPTORS, 128, 256, 128, 8, 4)),
    ],
)
def test_what_the_prototype_measured_as_fastest_is_taken(shape, config):
    assert choose(*shape, 1, 0, HOPPER) == config


def shapes():
    pick = random.Random(0)
    for _ in range(400):
        rows, outputs, depth = (pick.randrange(1, 1 << pick.randrange(1, 16)) for _ in range(3))
        yield rows, outputs, depth
        yield rows, outputs, -(-depth // 16) * 16


@pytest.mark.parametrize("features", DEVICES.values(), ids=DEVICES)
def test_every_choice_suits_shape_and_device(features):
    for rows, outputs, depth in shapes():
        for planes, group in ((1, 0), (2, 0), (1, 128), (1, 64)):
            config = choose(rows, outputs, depth, planes, group, features)
            has_vectors = features.dp4a and depth % 16 == 0 and rows * planes <= 4 and not group
            if not features.int8_dot:
                assert (config is not None) == has_vectors
            if config is None:
                continue
            assert config.bytes(planes) <= features.shared
            assert config.stages >= 1
            assert config.kernel != VECTORS or (has_vectors and rows * planes <= 4)
            assert config.kernel != FEW or rows <= config.tokens
            assert config.kernel != DESCRIPTORS or (features.tma and depth % 16 == 0)
            assert not group or (config.depth, config.split) == (group, 1)


def test_what_begins_anywhere_is_read_by_pointers():
    assert choose(2048, 4096, 4096, 1, 0, HOPPER, aligned=False).kernel == POINTERS
    assert choose(1, 4096, 4096, 1, 0, HOPPER, aligned=False).kernel == FEW


@pytest.mark.parametrize(
    ("kib", "stages", "tokens", "outputs"),
    [(227, 4, 128, 256), (163, 3, 128, 256), (99, 3, 128, 128), (64, 3, 64, 64)],
)
def test_a_tile_that_does_not_fit_is_made_smaller(kib, stages, tokens, outputs):
    config = Config(DESCRIPTORS, 128, 256, 128, 8, 4)
    small = dataclasses.replace(config, stages=stages, tokens=tokens, outputs=outputs)
    assert fitted(config, 1, kib << 10) == small


def test_no_row_is_hidden_behind_another():
    for at, row in enumerate(TABLE):
        for before in TABLE[:at]:
            same = (before.planes, before.grouped) == (row.planes, row.grouped)
            wider = before.rows >= row.rows and before.outputs >= row.outputs and before.depth >= row.depth
            # the last is for devices that pass over what needs tensor cores
            assert not (same and wider) or row is TABLE[-1], (before, row)
