"""Whatever an object holds is put back, by identity and in order; what did not change is left alone."""

import collections
import logging
import random
import types
from dataclasses import dataclass, field

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from mono_quant.convert.snapshot import Snapshot


class Thing:
    """An object with attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_attributes_and_containers_get_their_contents_back_in_place():
    inner, table, row = [1, 2], {"b": 1, "a": [3]}, collections.deque([1], maxlen=3)
    thing = Thing(inner=inner, table=table, row=row, chosen={1}, deep=(Thing(x=1), [table]), name="n")
    snapshot = Snapshot(thing)
    inner.append(3)
    table["a"].clear()
    table.update(c=1, b=2)
    del table["a"]
    row.extend([5, 6])
    thing.chosen.add(2)
    thing.deep[0].x = 2
    thing.name, thing.new = "other", 1
    del thing.row
    snapshot.restore()
    assert thing.inner is inner and inner == [1, 2]
    assert thing.table is table and list(table.items()) == [("b", 1), ("a", [3])]
    assert thing.row is row and list(row) == [1] and row.maxlen == 3
    assert thing.chosen == {1} and thing.deep[0].x == 1 and thing.name == "n"
    assert list(vars(thing)) == ["inner", "table", "row", "chosen", "deep", "name"]


def test_an_ordered_dict_keeps_its_order_and_a_model_output_its_fields():
    ordered = collections.OrderedDict(a=1, b=2)
    output = BaseModelOutput(last_hidden_state=torch.ones(2))
    snapshot = Snapshot(ordered, output)
    ordered.move_to_end("a")
    output["last_hidden_state"] = torch.zeros(2)
    snapshot.restore()
    assert list(ordered) == ["a", "b"]
    assert list(output) == ["last_hidden_state"] and output.last_hidden_state is output[0]
    assert torch.equal(output[0], torch.ones(2))


def test_what_did_not_change_is_not_touched():
    class Stubborn(dict):
        def clear(self):
            raise AssertionError("touched")

        __setitem__ = __delitem__ = pop = clear

    held = Stubborn(a=1)
    snapshot = Snapshot(held)
    snapshot.restore()
    assert dict(held) == {"a": 1}


def test_circles_and_shared_objects_are_visited_once():
    thing = Thing()
    thing.me, thing.twice = thing, [[1], [1]]
    thing.twice[1] = thing.twice[0]
    snapshot = Snapshot(thing)
    thing.twice[0].append(2)
    snapshot.restore()
    assert thing.twice == [[1], [1]] and thing.twice[0] is thing.twice[1]


def test_a_tensor_gets_its_memory_its_gradient_and_its_tags_back():
    parameter = nn.Parameter(torch.ones(2, 3))
    parameter.tag, address = "a", parameter.data_ptr()
    snapshot = Snapshot(parameter)
    parameter.data = torch.zeros(4, dtype=torch.float64)
    parameter.requires_grad_(False)
    parameter.tag = "b"
    snapshot.restore()
    assert (parameter.data_ptr(), parameter.dtype, parameter.shape) == (address, torch.float32, (2, 3))
    assert parameter.requires_grad and parameter.tag == "a" and parameter.grad is None
    parameter.grad = torch.ones(2, 3)
    snapshot = Snapshot(parameter)
    before, parameter.grad = parameter.grad, None
    snapshot.restore()
    assert parameter.grad is before


def test_every_tensor_that_can_be_written_into_is_found():
    module = nn.Linear(3, 3)
    module.register_buffer("b", torch.zeros(1))
    module.plain, module.listed, module.nested = torch.zeros(1), [torch.zeros(1)], Thing(t=torch.zeros(1))
    module.weight.grad = torch.zeros(3, 3)
    module.sparse = torch.eye(2).to_sparse()
    found = {id(t) for t in Snapshot(module).tensors}
    expected = [module.weight, module.bias, module.b, module.plain, module.listed[0], module.nested.t]
    assert found == {id(t) for t in [*expected, module.weight.grad]}


GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(2, generator=g).tolist()),
    "python": (lambda: random.Random(3), lambda g: g.random()),
    "numpy": (lambda: numpy.random.default_rng(3), lambda g: g.random()),
    "numpy before": (lambda: numpy.random.RandomState(3), lambda g: g.rand()),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_gives_the_same_numbers_again(kind):
    make, draw = GENERATORS[kind]
    thing = Thing(generator=make())
    snapshot = Snapshot(thing)
    first = draw(thing.generator)
    snapshot.restore()
    assert draw(thing.generator) == first


def test_arrays_get_their_values_back_where_they_may_be_written():
    free, fixed = numpy.arange(3), numpy.arange(3)
    fixed.flags.writeable = False
    snapshot = Snapshot([free, fixed])
    free += 1
    snapshot.restore()
    assert free.tolist() == [0, 1, 2]


@pytest.mark.parametrize("set_up", [False, True])
def test_a_tokenizer_gets_padding_and_truncation_back(set_up):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if set_up:
        tokenizer.enable_padding(length=7, pad_id=0, pad_token="a", direction="left")
        tokenizer.enable_truncation(5, stride=1, strategy="only_first")
    before = tokenizer.to_str()
    snapshot = Snapshot(Thing(tokenizer=tokenizer))
    tokenizer.enable_padding(length=2)
    tokenizer.enable_truncation(3)
    snapshot.restore()
    assert tokenizer.to_str() == before


def test_data_of_the_standard_library_counts_and_its_machinery_does_not():
    settings, logger = types.SimpleNamespace(a=1), logging.getLogger("mono_quant.test")
    snapshot = Snapshot(Thing(settings=settings, logger=logger))
    settings.a, logger.level = 2, logging.CRITICAL
    snapshot.restore()
    assert settings.a == 1 and logger.level == logging.CRITICAL
    logger.setLevel(logging.NOTSET)


def test_slots_and_byte_arrays_are_put_back():
    @dataclass(slots=True)
    class State:
        count: int
        sums: torch.Tensor
        late: int = field(init=False)

    class Deeper(State):
        __slots__ = ("inner",)

    held = Deeper(0, torch.zeros(2))
    held.inner, sums = [State(1, torch.ones(2))], held.sums
    text = bytearray(b"abc")
    before = Snapshot([held, text])
    assert {id(t) for t in before.tensors} == {id(sums), id(held.inner[0].sums)}
    held.count, held.sums, held.late, held.inner[0].count = 5, torch.ones(1), 3, 7
    held.inner.append(1)
    text[0] = 0
    text.append(1)
    before.restore()
    assert (held.count, held.inner[0].count, len(held.inner)) == (0, 1, 1) and held.sums is sums
    assert not hasattr(held, "late") and text == b"abc"
    del held.count
    before.restore()
    assert held.count == 0
