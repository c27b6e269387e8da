"""A model runs with its weights elsewhere: the bits are those of the model in memory, and what was written is seen."""

import gc

import pytest
import torch
from models import seeded
from torch import nn
from torch.nn import functional as F

from mono_quant.convert.elsewhere import Elsewhere
from mono_quant.convert.fidelity import run
from mono_quant.convert.offloaded import offloaded
from mono_quant.convert.probes import ProbeError, given_probe
from mono_quant.convert.surgery import structural_copy


class Held(dict):
    """Tensors by name, each copied when it is asked for; notes which."""

    def __init__(self, tensors):
        super().__init__({name: tensor.detach().clone() for name, tensor in tensors.items()})
        self.read = []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name).clone()

    def part(self, name, start, stop):
        self.read.append((name, start, stop))
        return super().__getitem__(name)[start:stop].clone()

    def is_cheap_in_parts(self, name):
        return True

    def is_same(self, a, b):
        return a == b


def emptied(model):
    """The same model on meta, with its own buffers where no checkpoint has them."""
    bare, saved = structural_copy(model), model.state_dict()
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    bare.to("meta")
    for name, buffer in unsaved.items():
        owner, _, last = name.rpartition(".")
        setattr(bare.get_submodule(owner), last, buffer)
    return bare


def compared(model, x, bare=None, tensors=None):
    """Run a model in memory and from elsewhere; (output, the same, written, the same, tensors read, memory)."""
    model.eval()
    bare, held = bare or emptied(model), tensors or Held(model.state_dict())
    written, seen = set(), set()
    expected = run(model, given_probe(x), written).values
    with offloaded(bare, held) as reads:
        out = run(bare, given_probe(x), seen).values
        again = run(bare, given_probe(x)).values
    assert torch.equal(out, again)
    return out, expected, seen, written, held, reads


class Tied(nn.Module):
    """Uses its weights outside of the modules that hold them, and one of them under two names."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.emb.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("table", torch.randn(8), persistent=False)
        self.norm.running_mean.normal_()

    def forward(self, ids):
        assert next(self.parameters()).device.type == "cpu"
        x = self.emb(ids) * self.scale + self.table
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x)[0] + self.lstm(x)[0]
        x = F.linear(self.convolution(x.transpose(1, 2)).transpose(1, 2), self.attention.out_proj.weight)
        return self.head(x) + sum(p.sum() for p in self.norm.parameters())


def test_weights_that_are_used_anywhere_have_their_bits():
    model, ids = seeded(Tied), torch.randint(0, 20, (2, 5))
    bare = emptied(model)
    before = {name: id(tensor) for name, tensor in bare.named_parameters()}
    out, expected, seen, written, held, reads = compared(model, ids, bare)
    assert torch.equal(out, expected) and seen == written == set()
    # it is as it was, and nothing is left in memory
    assert {name: id(tensor) for name, tensor in bare.named_parameters()} == before
    assert type(bare.head._parameters) is dict and not any(
        isinstance(p, Elsewhere) for p in bare.lstm._flat_weights
    )
    gc.collect()
    assert reads.held == 0 and reads.peak > 0
    assert {"head.weight", "emb.weight"} & {name for name in held.read if isinstance(name, str)} != set()


def test_one_module_is_in_memory_at_a_time():
    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.ReLU())))
    out, expected, _, _, held, reads = compared(model, torch.randn(3, 64))
    assert torch.equal(out, expected)
    assert reads.peak == (64 * 64 + 64) * 4
    assert len(held.read) == 2 * 40


class Writes(nn.Module):
    """Divides weights when it first runs, as RWKV does, through whatever `how` does."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros(()))
        self.how, self.divided = how, False

    def forward(self, x):
        if not self.divided:
            self.how(self.second)
            self.steps += 1
            self.divided = True
        for _ in range(2):
            x = self.second(self.first(x))
        return x * self.steps


def by_method(layer):
    layer.weight.div_(2)


def by_data(layer):
    layer.weight.data.mul_(0.5)


def through_a_view(layer):
    layer.weight[1:3].zero_()


def through_all(layer):
    for parameter in layer.parameters():
        parameter.add_(1)


def by_another(layer):
    torch.mul(layer.bias, 3, out=layer.bias)


@pytest.mark.parametrize("how", [by_method, by_data, through_a_view, through_all, by_another])
def test_what_a_forward_writes_stays_for_the_run_and_is_told(how):
    out, expected, seen, written, _, _ = compared(seeded(lambda: Writes(how)), torch.randn(2, 8))
    assert torch.equal(out, expected) and seen == written and "steps" in seen and len(seen) > 1


def replaces(layer):
    layer.weight.data = layer.weight.data * 2


class WritesPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        self.stack[1].zero_()
        return x @ self.stack[1]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Writes(replaces), r"the forward replaces second\.weight, which is not in memory"),
        (WritesPart, r"the forward writes into a part of stack, which is not in memory"),
    ],
)
def test_what_cannot_be_followed_is_refused(make, why):
    model = seeded(make).eval()
    bare, held = emptied(model), Held(model.state_dict())
    x = torch.randn(2, 8 if isinstance(model, Writes) else 4)
    with pytest.raises(ProbeError, match=why), offloaded(bare, held):
        run(bare, given_probe(x))


def test_a_tie_is_one_where_the_checkpoint_has_it_twice_alike_and_two_where_it_differs():
    model, ids = seeded(Tied).eval(), torch.randint(0, 20, (2, 5))
    alike = Held(model.state_dict() | {"head.weight": model.emb.weight.detach().clone()})
    out, expected, *_ = compared(model, ids, tensors=alike)
    assert torch.equal(out, expected)
    bare = emptied(model)
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    out, expected, *_ = compared(model, ids, bare, Held(model.state_dict()))
    assert torch.equal(out, expected)


def test_values_take_the_dtype_and_the_strides_of_the_skeleton():
    model = nn.Linear(6, 4).eval()
    bare, held = emptied(model.double()), Held(nn.Linear(6, 4).state_dict())
    bare.weight = nn.Parameter(torch.empty_strided((4, 6), (1, 4), dtype=torch.float64, device="meta"))
    with offloaded(bare, held):
        assert bare.weight.stride() == (1, 4) and bare.weight.dtype == torch.float64
        assert torch.equal(bare.weight, held["weight"].double())


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"bias": torch.zeros(4)}, "weight is not in the checkpoint"),
        (
            {"weight": torch.zeros(4, 5), "bias": torch.zeros(4)},
            r"weight is \(4, 5\) in its file and \(4, 6\) in",
        ),
    ],
)
def test_what_does_not_fit_is_told(tensors, why):
    bare = emptied(nn.Linear(6, 4))
    with pytest.raises(ProbeError, match=why), offloaded(bare, Held(tensors)):
        bare(torch.ones(1, 6))
    assert bare.weight.is_meta
