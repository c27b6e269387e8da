"""Casting in place, and putting back what was cast."""

import pytest
import torch
from torch import nn

from mono_quant.convert.surgery import recast_, rollback


def test_tensors_are_cast_by_name_and_put_back_when_something_fails():
    model = nn.BatchNorm1d(3).half()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}

    def fail() -> None:
        with rollback(model):
            recast_(model, {"weight": torch.float32, "running_mean": torch.float64, "bias": torch.float16})
            assert (model.weight.dtype, model.running_mean.dtype) == (torch.float32, torch.float64)
            assert (model.bias.dtype, model.running_var.dtype) == (torch.float16, torch.float16)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    for name, tensor in model.state_dict(keep_vars=True).items():
        same, values = before[name]
        assert id(tensor) == same and tensor.dtype == values.dtype and torch.equal(tensor, values)
