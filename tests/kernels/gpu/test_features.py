"""What a device can do follows from its compute capability, and is asked once."""

import pytest
import torch

pytest.importorskip("triton")

from mono_quant.kernels.gpu import features
from mono_quant.kernels.gpu.features import features_of, of_nvidia, of_others, refusal


@pytest.mark.parametrize(
    ("capability", "able"),
    [
        ((6, 0), ""),
        ((6, 1), "dp4a"),
        ((7, 0), "dp4a"),
        ((7, 5), "dp4a"),
        ((8, 0), "dp4a int8_dot bf16"),
        ((8, 9), "dp4a int8_dot bf16"),
        ((9, 0), "dp4a int8_dot bf16 tma overlap"),
        ((12, 0), "dp4a int8_dot bf16 tma overlap"),
    ],
    ids=str,
)
def test_what_a_capability_brings(capability, able):
    found = of_nvidia(capability, 99, 7, overlap=True)
    names = ("dp4a", "int8_dot", "bf16", "tma", "overlap")
    assert [name for name in names if getattr(found, name)] == able.split()
    assert (found.backend, found.capability, found.shared, found.processors) == ("nvidia", capability, 99, 7)
    # a Triton that knows of no dependent launches has none anywhere
    assert not of_nvidia(capability, 99, 7, overlap=False).overlap


def test_devices_below_the_oldest_are_refused_and_others_are_not():
    assert refusal(of_nvidia((7, 0), 1, 1, True)) == "compute capability 7.0 is below 7.5"
    assert refusal(of_nvidia((7, 5), 1, 1, True)) is None
    assert refusal(of_nvidia((12, 1), 1, 1, True)) is None
    assert refusal(of_others("amd", 1, 1)) is None
    assert refusal(features.INTERPRETER) is None


def test_this_triton_knows_of_dependent_launches():
    assert features._launches_overlap()


@pytest.mark.skipif(not features.INTERPRETED, reason="kernels are compiled here")
def test_the_interpreter_answers_for_every_device():
    for name in ("cpu", "cuda:0", "cuda:1"):
        assert features_of(torch.device(name)) is features.INTERPRETER


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_the_device_that_is_here():
    device = torch.device("cuda", torch.cuda.current_device())
    found = features_of(device)
    assert found is features_of(device)
    assert found.shared >= 48 << 10 and found.processors > 0
    if torch.version.hip is None:
        assert found.capability == torch.cuda.get_device_capability()
