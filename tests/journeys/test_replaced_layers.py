"""What hangs on a layer is still there after the conversion: it goes over to the new layer, or the layer is kept."""

import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from models import relative_error, seeded
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import mono_quant as mq

DTYPES = ("int8", "fp16")
BOTH = pytest.mark.parametrize("dtype", DTYPES)
OPTIONS = {"fidelity": False, "embeddings": True, "disable_defaults": ["small", "head"]}


def experts():
    layer = MixtralExperts(hf.MixtralConfig(hidden_size=64, intermediate_size=32, num_local_experts=2))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer


def routed():
    index = torch.tensor([[0, 1], [1, 0], [0, 1]])
    return torch.randn(3, 64), index, torch.rand(3, 2)


@dataclass(frozen=True)
class Kind:
    """A layer, and the arguments that it is called with."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]


KINDS = {
    "linear": Kind(lambda: nn.Linear(64, 32), lambda: (torch.randn(3, 64),)),
    "transposed_linear": Kind(lambda: Conv1D(32, 64), lambda: (torch.randn(3, 64),)),
    "conv1d": Kind(lambda: nn.Conv1d(16, 32, 3), lambda: (torch.randn(2, 16, 8),)),
    "conv2d": Kind(lambda: nn.Conv2d(16, 32, 3), lambda: (torch.randn(2, 16, 6, 6),)),
    "embedding": Kind(lambda: nn.Embedding(20, 64), lambda: (torch.tensor([[1, 2, 19]]),)),
    "experts": Kind(experts, routed),
    "attention": Kind(lambda: nn.MultiheadAttention(64, 4), lambda: (torch.randn(3, 64),) * 3),
    "lstm": Kind(lambda: nn.LSTM(32, 32, bidirectional=True), lambda: (torch.randn(3, 2, 32),)),
    "gru_cell": Kind(lambda: nn.GRUCell(32, 32), lambda: (torch.randn(3, 32),)),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


class Around(nn.Module):
    """Uses the layer, and what hangs on it where it does."""

    def __init__(self, kind, hang=None):
        super().__init__()
        self.layer = KINDS[kind].make()
        if hang is not None:
            hang(self.layer)

    def forward(self, *args):
        y = self.layer(*args)
        y = y[0] if isinstance(y, tuple) else y
        if hasattr(self.layer, "gain"):
            y = y * self.layer.gain
        return self.layer.extra(y) if hasattr(self.layer, "extra") else y


def doubled(self, *args, **kwargs):
    y = type(self).forward(self, *args, **kwargs)
    return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y


def own_forward(layer):
    layer.forward = types.MethodType(doubled, layer)


def parameter(layer):
    layer.gain = nn.Parameter(torch.tensor(3.0))


def buffer(layer):
    layer.register_buffer("gain", torch.tensor(3.0))


def submodule(layer):
    layer.extra = nn.Tanh()


def plain_bias(layer):
    if getattr(layer, "bias", None) is not None:
        bias = layer.bias.detach().clone()
        del layer.bias
        layer.bias = bias


def clash(layer):
    # int8 and float16 layers have methods of these names
    layer.scale, layer.stored, layer.gain = 0.5, [1, 2], 3.0


HANGING = {
    "forward": own_forward,
    "parameter": parameter,
    "buffer": buffer,
    "submodule": submodule,
    "clash": clash,
}


def build(kind, hang=None):
    return seeded(lambda: Around(kind, hang)).eval()


@BOTH
@pytest.mark.parametrize("hang", HANGING)
@EVERY
def test_what_a_new_layer_has_no_place_for_keeps_the_layer(kind, hang, dtype, tmp_path):
    model, inputs = build(kind, HANGING[hang]), seeded(KINDS[kind].inputs)
    expected, kind_before = model(*inputs), type(model.layer)
    names = set(model.state_dict())
    result = mq.quantize(model, dtype, **OPTIONS)
    assert type(result.model.layer) is kind_before
    # 2^-11 for each rounding of a weight, a bias and what hangs there
    bound = 0.0 if dtype == "int8" else 3 * 2.0**-11
    assert relative_error(expected, result.model(*inputs)) <= bound
    assert set(result.model.state_dict()) == names
    rows = {row.name: row for row in result.report.rows}
    if dtype == "int8":
        layer = next(row for row in rows.values() if row.is_layer)
        assert layer.action == "kept" and (
            " of its own" in layer.reason or (kind, hang) == ("experts", "parameter")
        )
        assert [(r.name, r.action, r.reason) for r in mq.plan(model, dtype, **OPTIONS).rows] == [
            (r.name, r.action, r.reason) for r in result.report.rows
        ]
    result.save(tmp_path / "model")
    loaded = mq.load(tmp_path / "model", model=lambda: Around(kind, HANGING[hang]))
    assert torch.equal(loaded(*inputs), result.model(*inputs))


@BOTH
@pytest.mark.parametrize("kind", ["linear", "transposed_linear", "conv1d", "conv2d"])
def test_a_bias_that_is_no_parameter_stays_what_it_is(kind, dtype):
    model, inputs = build(kind, plain_bias), seeded(KINDS[kind].inputs)
    result = mq.quantize(model, dtype, **OPTIONS).model
    assert set(result.state_dict()) == {"layer.weight"} and not isinstance(result.layer.bias, nn.Parameter)
    assert relative_error(model(*inputs), result(*inputs)) <= 2.0**-10


def tag(layer):
    layer.tag = {"stage": 1}
    for p in layer.parameters():
        p.no_decay = True


@BOTH
@EVERY
def test_plain_attributes_go_over(kind, dtype, tmp_path):
    model = build(kind, tag)
    standard = set(vars(KINDS[kind].make()))
    result = mq.quantize(model, dtype, **OPTIONS)
    assert result.report.quantized

    def check(layer):
        assert layer.tag == {"stage": 1}
        assert all(
            getattr(layer, n) == getattr(model.layer, n)
            for n in standard
            if not n.startswith("_")
            and n != "training"
            and isinstance(getattr(model.layer, n), (int, str, tuple, float))
        )
        assert all(p.no_decay for n, p in layer.named_parameters() if not n.endswith("_scale"))

    check(result.model.layer)
    assert result.model.layer.tag is not model.layer.tag
    result.save(tmp_path / "model")
    check(mq.load(tmp_path / "model", model=lambda: Around(kind, tag)).layer)


# --- hooks


REGISTER = {
    "forward_pre": lambda m, f: m.register_forward_pre_hook(f),
    "forward_pre_kwargs": lambda m, f: m.register_forward_pre_hook(f, with_kwargs=True),
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward_kwargs": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "forward_always": lambda m, f: m.register_forward_hook(f, always_call=True),
    "full_backward": lambda m, f: m.register_full_backward_hook(f),
    "full_backward_pre": lambda m, f: m.register_full_backward_pre_hook(f),
    "state_dict_pre": lambda m, f: m.register_state_dict_pre_hook(f),
    "state_dict_post": lambda m, f: m.register_state_dict_post_hook(f),
    "load_state_dict_pre": lambda m, f: m.register_load_state_dict_pre_hook(f),
    "load_state_dict_post": lambda m, f: m.register_load_state_dict_post_hook(f),
}


def watched(calls):
    def hang(layer):
        for name, register in REGISTER.items():
            register(layer, lambda module, *_, name=name, **__: calls.append((name, module)))

    return hang


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@BOTH
@EVERY
def test_every_kind_of_hook_is_called_with_the_new_layer(kind, dtype, inplace):
    calls = []
    model = build(kind, watched(calls))
    result = mq.quantize(model, dtype, inplace=inplace, **OPTIONS)
    assert result.report.quantized
    converted = result.model
    del model, result
    calls.clear()
    inputs = seeded(KINDS[kind].inputs)
    # indices have none, and int8 convolutions pass none on
    has_gradient = kind != "embedding" and (dtype == "fp16" or not kind.startswith("conv"))
    if not has_gradient:
        converted(*inputs)
    else:
        args = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
        converted(*args).sum().backward()
    converted.load_state_dict(converted.state_dict())
    named = [name for name, _ in calls]
    expected = [n for n in REGISTER if has_gradient or "backward" not in n]
    assert sorted(set(named)) == sorted(expected)
    assert all(module is converted.layer for _, module in calls)


@BOTH
def test_a_hook_that_is_removed_afterwards_is_gone(dtype):
    model, calls = build("linear"), []
    handle = model.layer.register_forward_hook(lambda *_: calls.append(1))
    result = mq.quantize(model, dtype, inplace=True, **OPTIONS).model
    handle.remove()
    result(torch.randn(3, 64))
    assert calls == []


# --- the projection inside an attention


def larger_projection(layer):
    layer.out_proj.gain = nn.Parameter(torch.tensor(3.0))


class Low(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_projection(layer):
    layer.out_proj = Low(64, 64)


@BOTH
@pytest.mark.parametrize("hang", [larger_projection, other_projection])
def test_the_projection_inside_an_attention_counts_as_its_layer(hang, dtype):
    model, inputs = build("attention", hang), seeded(KINDS["attention"].inputs)
    expected, names = model(*inputs), set(model.state_dict())
    result = mq.quantize(model, dtype, **OPTIONS).model
    assert type(result.layer) is nn.MultiheadAttention and set(result.state_dict()) == names
    assert relative_error(expected, result(*inputs)) <= (0.0 if dtype == "int8" else 3 * 2.0**-11)


@BOTH
def test_a_hook_of_that_projection_is_never_called_as_in_torch(dtype):
    def hang(layer):
        layer.out_proj.register_forward_hook(lambda module, args, output: 2 * output)

    model, inputs = build("attention", hang), seeded(KINDS["attention"].inputs)
    result = mq.quantize(model, dtype, **OPTIONS).model
    assert type(result.layer) is not nn.MultiheadAttention and len(result.layer.out_proj._forward_hooks) == 1
    assert torch.equal(result(*inputs), mq.quantize(build("attention"), dtype, **OPTIONS).model(*inputs))


class Listed(nn.Module):
    """Layers that the forward reaches beside the module tree: through a list, a dict of tuples, an object and a bound method."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))
        self.order, self.named = [self.a], {"b": (self.b, 1.0)}
        self.plan, self.call = Plan(), self.d.forward
        self.plan.layer = self.c

    def forward(self, x):
        layer, scale = self.named["b"]
        return self.call(self.plan.layer(scale * layer(self.order[0](x))))


class Plan:
    layer: nn.Module


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_layers_that_a_forward_reaches_beside_the_module_tree_are_the_new_ones(dtype, inplace, tmp_path):
    model, x = Listed().eval(), torch.randn(4, 64)
    with torch.no_grad():
        before = model(x)
        result = mq.quantize(model, dtype, probe=x, inplace=inplace)
        after = result.model(x)
    assert 0 < relative_error(before, after) < (0.05 if dtype == "int8" else 0.002)
    assert result.report.fidelity["relative_error"] > 0
    made = result.model
    assert made.order[0] is made.a and made.named["b"] == (made.b, 1.0) and made.plan.layer is made.c
    assert made.call.__self__ is made.d and type(made.d) is not nn.Linear
    if not inplace:
        assert model.order[0] is model.a and type(model.a) is nn.Linear and model.call.__self__ is model.d
        assert torch.equal(model(x), before)
    result.save(tmp_path / "out")
    assert torch.equal(mq.load(tmp_path / "out", model=Listed)(x), after)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_failure_puts_references_beside_the_module_tree_back(dtype):
    model = Listed().eval()
    model.named["e"] = (model.b, 2.0)
    model.bad = nn.Linear(64, 64)
    model.bad.weight.data[0, 0] = float("nan")
    with pytest.raises(mq.errors.NonFiniteWeightError):
        mq.quantize(model, dtype, inplace=True, fidelity=False)
    assert model.order == [model.a] and model.named["b"][0] is model.b and type(model.b) is nn.Linear


GLOBAL = {}
exec("def doubled(x): return original(x) * 2", GLOBAL)


def through_a_global(function):
    # as in a script
    GLOBAL["original"] = function
    return GLOBAL["doubled"]


WRAPS = [lambda f: lambda x: f(x) * 2, lambda f: torch.compile(f, backend="eager"), through_a_global]


@pytest.mark.parametrize("wrap", WRAPS, ids=["closure", "compiled", "global"])
@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_forward_that_closes_over_the_original_is_refused_in_a_copy_and_works_in_place(dtype, wrap):
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval(), torch.randn(4, 64)
    model.forward = wrap(model.forward)
    with torch.no_grad():
        before = model(x)
        with pytest.raises(mq.errors.UnsupportedModelError, match=r"runs the original.*inplace=True"):
            mq.quantize(model, dtype, probe=x)
        result = mq.quantize(model, dtype, probe=x, inplace=True)
        assert 0 < relative_error(before, result.model(x)) < 0.05
    assert type(model[0]) is not nn.Linear
