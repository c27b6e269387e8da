"""A block may write where it likes: values are what they were afterwards, and only what is written is ever copied."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mono_quant.convert.untouched import untouched

WRITES = {
    "in place": lambda m: m.weight.mul_(2),
    "data": lambda m: m.weight.data.zero_(),
    "view": lambda m: m.weight[1:].t().fill_(3),
    "index": lambda m: m.weight.__setitem__((0, slice(None)), 7.0),
    "out": lambda m: torch.add(m.weight, 1, out=m.weight),
    "many": lambda m: torch._foreach_mul_([m.bias, m.weight], 2.0),
    "init": lambda m: nn.init.normal_(m.weight),
    "cast": lambda m: m.to(torch.float64),
    "moved": lambda m: setattr(m.weight, "data", torch.ones(5)),
    "replaced": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(4, 3))),
    "removed": lambda m: delattr(m, "weight"),
    "shape": lambda m: m.weight.t_(),
    "set": lambda m: m.weight.set_(torch.ones(2)),
}


def linear():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 4)


@pytest.mark.parametrize("kind", WRITES)
def test_every_way_to_write_is_seen_and_undone(kind):
    module = linear()
    weight, bias = module.weight, module.bias
    values, address = weight.detach().clone(), weight.data_ptr()
    written = set()
    with torch.no_grad(), untouched(module, written=written):
        WRITES[kind](module)
    assert module.weight is weight and module.bias is bias
    assert torch.equal(weight, values) and (weight.data_ptr(), weight.dtype) == (address, torch.float32)
    assert written == {"weight"} | ({"bias"} if kind in ("many", "cast") else set())


def test_names_are_those_of_the_first_thing_and_shared_tensors_have_all_of_theirs():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    other, written = linear(), set()
    with torch.no_grad(), untouched(model, other, written=written):
        model["b"].weight.zero_()
        other.bias.zero_()
    assert written == {"a.weight", "b.weight"}
    assert torch.equal(other.bias, linear().bias)


def test_reading_is_not_writing():
    model, written = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Embedding(4, 4)).eval(), set()
    with untouched(model, written=written), torch.no_grad():
        x = model[1](model[0](torch.ones(2, 4)))
        x += model[0].weight[0]
        model[2](torch.tensor([1])).add_(1)
        model[0].weight.clone().zero_()
    assert written == set()


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_norm_writes_its_statistics_in_training_only(training):
    norm, written = nn.BatchNorm1d(4), set()
    before = {name: t.clone() for name, t in norm.state_dict().items()}
    with untouched(norm, written=written):
        F.batch_norm(torch.randn(8, 4), norm.running_mean, norm.running_var, training=training)
    assert written == ({"running_mean", "running_var"} if training else set())
    assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())


def test_only_what_overlaps_a_write_is_saved():
    flat = torch.arange(12.0)
    model = nn.ParameterDict({"a": nn.Parameter(flat[:6]), "b": nn.Parameter(flat[6:].view(2, 3))})
    written = set()
    with torch.no_grad(), untouched(model, written=written):
        model["b"].data.zero_()
    assert written == {"b"} and flat.tolist() == list(range(12))


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.t(), lambda t: t[::2, 1:], lambda t: t.bfloat16()])
def test_values_come_back_bit_for_bit_with_any_strides(make):
    holder = nn.Module()
    holder.register_buffer("held", make(torch.randn(6, 5)))
    before = holder.held.clone()
    with untouched(holder):
        holder.held.fill_(float("nan"))
    assert torch.equal(holder.held, before)


def test_the_inputs_are_as_before_too():
    x, cache = torch.ones(2), [torch.ones(1)]
    with untouched(x, cache):
        x.zero_()
        cache[0].zero_()
        cache.append(x)
    assert x.tolist() == [1, 1] and len(cache) == 1 and cache[0].tolist() == [1]


def test_an_error_passes_through_and_changes_nothing():
    module = linear()
    before = module.weight.detach().clone()

    def fail():
        with torch.no_grad(), untouched(module):
            module.weight.zero_()
            module.new = 1
            raise KeyError("midway")

    with pytest.raises(KeyError, match="midway"):
        fail()
    assert torch.equal(module.weight, before) and not hasattr(module, "new")


def test_random_numbers_are_drawn_again():
    def draw():
        return torch.rand(1).item(), random.random(), numpy.random.rand()  # noqa: NPY002

    with untouched():
        inside = draw()
    assert draw() == inside


class Halving(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        self.inner.weight.mul_(0.5)
        return self.inner(x)


def test_what_a_compiled_part_writes_is_seen():
    model = nn.Sequential(Halving())
    model[0].compile(backend="eager")
    before, written, x = model[0].inner.weight.detach().clone(), set(), torch.ones(1, 3)
    with torch.no_grad(), untouched(model, written=written):
        model(x)
    assert written == {"0.inner.weight"} and torch.equal(model[0].inner.weight, before)
