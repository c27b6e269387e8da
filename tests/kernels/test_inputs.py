"""What an input has to be, on every path and for whoever traces it."""

import pytest
import torch
from native import PATHS
from torch._subclasses import FakeTensorMode

from mono_quant import kernels
from mono_quant.errors import FrozenWeightError, InputError

WEIGHT = torch.ones(5, 16, dtype=torch.int8), torch.ones(5, 1), torch.zeros(5)
BAD = [torch.ones(3, 16, dtype=torch.int32), torch.ones(3, 17), torch.tensor(1.0)]
IDS = ["integers", "width", "no dimension"]


@pytest.mark.parametrize("bad", BAD, ids=IDS)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_refuses_the_same(path, bad):
    with kernels.using(path), pytest.raises(InputError, match="int8 linear layer"):
        kernels.int8_linear(bad, *WEIGHT)
    with kernels.using(path), pytest.raises(InputError, match="float16 linear layer"):
        kernels.half_linear(bad, WEIGHT[0].half(), WEIGHT[2])


@pytest.mark.parametrize("bad", BAD, ids=IDS)
def test_the_shapes_that_a_tracer_asks_for_are_refused_too(bad):
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (bad, *WEIGHT)]
        with pytest.raises(InputError, match="int8 linear layer"):
            kernels.int8_linear(*fake)
        with pytest.raises(InputError, match="float16 linear layer"):
            kernels.half_linear(fake[0], fake[1].half(), fake[3])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.float32, torch.complex64], ids=str
)
@pytest.mark.parametrize("path", PATHS)
def test_indices_are_int64_or_int32_as_torch_has_it(path, dtype):
    table = torch.ones(4, 3, dtype=torch.int8), torch.ones(4, 1), torch.float32
    with kernels.using(path), pytest.raises(InputError, match=r"int8 embedding.*\.long\(\)"):
        kernels.int8_embedding(torch.ones(2).to(dtype), *table)
    with kernels.using(path):
        for known in (torch.int64, torch.int32):
            assert kernels.int8_embedding(torch.ones(2, dtype=known), *table).shape == (2, 3)


def test_channels_are_counted_where_they_lie():
    x = torch.zeros(2, 6, 5, 5)
    kernels.check_input(x, "a layer", 6, axis=-3, dims=(3, 4))
    with pytest.raises(InputError, match=r"a layer takes inputs with 4 channels, not \(2, 6, 5, 5\)"):
        kernels.check_input(x, "a layer", 4, axis=-3, dims=(3, 4))
    with pytest.raises(InputError, match="6 channels"):
        kernels.check_input(x[0, 0], "a layer", 6, axis=-3, dims=(3, 4))


def test_float_weights_in_the_place_of_codes_are_refused_by_the_op_and_by_its_fake():
    x, floats = torch.randn(3, 16), (WEIGHT[0].float(), *WEIGHT[1:])
    with pytest.raises(FrozenWeightError, match=r"torch\.export.*leaf"):
        torch.ops.mono_quant.int8_linear(x, *floats)
    with FakeTensorMode() as mode, pytest.raises(FrozenWeightError, match="float32 weights"):
        kernels.int8_linear(*(mode.from_tensor(t) for t in (x, *floats)))
