"""What a forward writes into the weights of its module is read from its code, and nothing else is."""

import inspect

import pytest
import torch
import transformers as hf
from models import FAMILIES
from torch import nn
from torch.nn import functional as F
from torch.nn.init import normal_

from mono_quant.planning.writes import written_by_code


class Block(nn.Module):
    """The module that forwards are tried on."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2)])
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.mask, self.count, self.table = torch.ones(4), 0, {}


def helper(x, weight):
    weight.clamp_(-1, 1)
    return x


def second(x, *, weight=None):
    return helper(x, weight)


class Writes:
    """Forwards, each with what it writes into."""

    def in_place(self, x):  # fc.weight
        self.fc.weight.clamp_(-1, 1)

    def data(self, x):  # fc.weight
        self.fc.weight.data.mul_(2)

    def rows(self, x):  # fc.weight
        with torch.no_grad():
            self.fc.weight[0].view(2, 2).fill_(0)

    def index(self, x):  # fc.weight gain
        self.fc.weight[0] = 0
        self.gain.data[:2] = x

    def assigned(self, x):  # fc.weight out.bias
        self.fc.weight.data = F.normalize(self.fc.weight.data)
        self.out.bias = nn.Parameter(x)

    def augmented(self, x):  # gain fc.weight
        self.gain *= 2
        self.fc.weight.data *= self.mask

    def alias(self, x):  # fc.weight out.weight
        w, (v, _) = self.fc.weight, (self.out.weight.t(), x)
        w.detach().sub_(1)
        v += 1

    def walrus(self, x):  # gain
        if (g := self.gain) is not None:
            g.zero_()

    def chosen(self, x):  # fc.bias out.bias
        (self.fc.bias if x is None else self.out.bias).zero_()

    def out_argument(self, x):  # gain
        torch.add(self.gain, x, out=self.gain)

    def functions(self, x):  # fc.weight fc.bias out.weight
        nn.init.normal_(self.fc.weight)
        normal_(self.fc.bias)
        torch.clamp_(self.out.weight, 0)

    def helpers(self, x):  # fc.weight out.weight gain
        helper(x, self.fc.weight)
        second(x, weight=self.out.weight)
        return self.constrain(self.gain)

    def constrain(self, tensor):
        return tensor.abs_()

    @staticmethod
    def shrink(tensor):
        tensor.mul_(0.5)

    def static(self, x):  # fc.weight
        self.shrink(self.fc.weight)

    def loop(self, x):  # blocks.0.up.weight blocks.1.up.weight
        for i, block in enumerate(self.blocks):
            block.up.weight.div_(i + 1)

    def several(self, x):  # blocks.0.up.weight blocks.1.up.weight fc.weight out.weight
        for block, _ in zip(self.blocks, "ab", strict=True):
            block["up"].weight.zero_()
        for layer in (self.fc, self.out):
            layer.weight.zero_()

    def comprehension(self, x):  # blocks.0.up.bias blocks.1.up.bias
        return [b.up.bias.zero_() for b in self.blocks]

    def everything(self, x):  # *
        for p in self.parameters():
            p.data.clamp_(-1, 1)
        self.mean += x

    def below(self, x):  # blocks.0.up.weight blocks.0.up.bias blocks.1.up.weight blocks.1.up.bias
        for p in self.blocks.parameters():
            p.copy_(x)

    def cast(self, x):  # fc.weight fc.bias
        self.fc = self.fc.to(x.dtype)

    def cast_where_it_is(self, x):  # fc.weight fc.bias
        self.fc.double()

    def replaced(self, x):  # fc.weight fc.bias
        self.fc = nn.Linear(4, 4)

    def by_name(self, x):  # fc.weight out.bias
        getattr(self, "fc").weight.zero_()  # noqa: B009
        setattr(self.out, "bias", None)  # noqa: B010

    def buffer(self, x):  # mean
        self.mean.mul_(0.9).add_(x)

    def not_in_training(self, x):  # out.weight
        if self.training:
            self.fc.weight.zero_()
        else:
            self.out.weight.zero_()
        if not self.training:
            pass
        else:
            self.fc.weight.zero_()
        if x is not None and self.training:
            self.fc.weight.zero_()


class Reads:
    """Forwards that write into no weight."""

    def another(self, x):
        w = self.fc.weight * 2
        w.clamp_(0)
        return x.add_(self.gain)

    def rebound(self, x):
        w = self.fc.weight
        w = w + 1
        w += 1

    def copies(self, x):
        self.fc.weight.clone().zero_()
        self.gain.to(x.dtype) @ x.mul_(self.gain)
        x.float().masked_fill_(x > 0, 0)

    def flags(self, x):
        self.fc.weight.requires_grad_(False)
        self.requires_grad_(False)

    def plain(self, x):
        self.count += 1
        self.table["w"] = self.fc.weight
        self.mask.zero_()

    def functional(self, x):
        return F.embedding(x, self.fc.weight), F.linear(x, self.fc.weight), torch.relu_(x)

    def nothing(self, x):
        return self.fc(x)


def block(forward):
    methods = {n: m for n, m in vars(Writes).items() if n in ("constrain", "shrink")}
    return type("Tried", (Block,), {**methods, "forward": forward})()


@pytest.mark.parametrize(
    "name", [n for n, f in vars(Writes).items() if inspect.isfunction(f) and n != "constrain"]
)
def test_what_is_written_is_found(name):
    forward = vars(Writes)[name]
    module = block(forward)
    expected = set(inspect.getsource(forward).splitlines()[0].partition("#")[2].split())
    if expected == {"*"}:
        expected = {n for n, _ in module.named_parameters()} | {"mean"}
    assert written_by_code(module) == expected
    # below another module the names are longer
    assert written_by_code(nn.Sequential(module)) == {f"0.{n}" for n in expected}


@pytest.mark.parametrize("name", [n for n, f in vars(Reads).items() if inspect.isfunction(f)])
def test_what_is_only_read_is_not(name):
    assert written_by_code(block(vars(Reads)[name])) == set()


class Base(Block):
    def forward(self, x):
        self.fc.weight.zero_()
        return x


class Calls(Base):
    def forward(self, x):
        return super().forward(x)


class Endless(Block):
    def forward(self, x, w=None):
        self.forward(x, self.fc if w is None else w.inner)
        self.fc.bias.zero_()


def decorated(function):
    @torch.no_grad()
    def inner(self, x):
        return function(self, x)

    inner.__wrapped__ = function
    return inner


class Wrapped(Block):
    @decorated
    def forward(self, x):
        self.out.weight.zero_()


@pytest.mark.parametrize(
    ("cls", "expected"), [(Calls, {"fc.weight"}), (Endless, {"fc.bias"}), (Wrapped, {"out.weight"})]
)
def test_inherited_recursive_and_decorated_forwards_are_read(cls, expected):
    assert written_by_code(cls()) == expected


def test_a_forward_and_hooks_of_one_object_count_for_it_alone():
    def clamp(module, *_):
        module.weight.data.clamp_(-1, 1)

    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), block(Reads.nothing)])
    model[0].register_forward_pre_hook(clamp)
    model[1].register_forward_hook(clamp)
    model[3].forward = Writes.in_place.__get__(model[3])
    assert written_by_code(model) == {"0.weight", "1.weight", "3.fc.weight"}


def test_code_without_source_says_nothing():
    space = {}
    exec("def forward(self, x):\n    self.fc.weight.zero_()", space)
    assert written_by_code(block(space["forward"])) == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_models_write_into_no_weight(name):
    assert written_by_code(FAMILIES[name].build()) == set()


def test_models_of_transformers_that_do():
    sizes = {"vocab_size": 20, "d_model": 8, "num_heads": 2, "d_kv": 4}
    with torch.device("meta"):
        rwkv = hf.RwkvModel(hf.RwkvConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2))
        udop = hf.UdopEncoderModel(hf.UdopConfig(**sizes, d_ff=8, num_layers=1))
    assert written_by_code(rwkv) == {
        f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention.output", "feed_forward.value")
    }
    assert written_by_code(udop) == {
        f"encoder.relative_bias.biases.{i}.relative_attention_bias.weight" for i in range(3)
    }
