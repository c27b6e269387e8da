"""New layers and what hangs on old ones: names that both could use, memory, rollback."""

import pytest
import torch
from torch import nn

from mono_quant.convert.half_layers import HALF_LAYERS
from mono_quant.convert.int8_layers import Int8Linear, Int8MultiheadAttention
from mono_quant.convert.surgery import clash, own_memory_, recast_, rollback, structural_copy


@pytest.mark.parametrize(
    "name", ["codes", "scale", "dequantize", "float_dtype", "_float", "weight_scale", "settle_"]
)
def test_an_attribute_that_would_hide_a_part_of_the_new_layer_is_a_clash(name):
    layer = nn.Linear(4, 4)
    layer.tag = 1
    assert clash(layer, Int8Linear) == ""
    setattr(layer, name, 1)
    assert f"({name})" in clash(layer, Int8Linear)


def test_what_half_layers_call_their_own_is_not_what_int8_layers_do():
    layer = nn.Linear(4, 4)
    layer.codes = 1
    assert clash(layer, HALF_LAYERS["linear"]) == ""
    layer.stored = 1
    assert "(stored)" in clash(layer, HALF_LAYERS["linear"])


def test_the_projection_of_an_attention_can_clash_too():
    layer = nn.MultiheadAttention(4, 2)
    assert clash(layer, Int8MultiheadAttention) == ""
    layer.out_proj.scale = 1.0
    assert "(scale)" in clash(layer, Int8MultiheadAttention)


def test_no_parameter_of_a_copy_shares_memory_in_the_end():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.wave = nn.Parameter(torch.ones(4, dtype=torch.complex64))
            self.index = nn.Parameter(torch.arange(4), requires_grad=False)
            self.fc = nn.Linear(4, 4)

    model = Mixed()
    copy = structural_copy(model)
    own_memory_(copy, model)
    addresses = {p.data_ptr() for p in model.parameters()}
    assert addresses.isdisjoint(p.data_ptr() for p in copy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_rollback_covers_buffers_and_whatever_else_a_model_holds():
    model = nn.BatchNorm1d(4)
    model.notes, address = {"a": [1]}, model.running_mean.data_ptr()

    def change():
        with rollback(model):
            model.running_mean.data = model.running_mean.half()
            model.notes["a"].append(2)
            model.register_forward_hook(print)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change()
    assert (model.running_mean.dtype, model.running_mean.data_ptr()) == (torch.float32, address)
    assert model.notes == {"a": [1]} and not model._forward_hooks


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
