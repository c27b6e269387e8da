"""What a converted layer refuses, instead of computing nonsense or losing a write without a word."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import mono_quant
from mono_quant.errors import FrozenWeightError, InputError


def experts():
    config = MixtralConfig(hidden_size=64, intermediate_size=64, num_local_experts=3, num_experts_per_tok=2)
    layer = MixtralExperts(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def routing(tokens=5):
    return torch.arange(2 * tokens).view(tokens, 2) % 3, torch.full((tokens, 2), 0.5)


# A float layer of each kind, its weight, arguments for it, and what an error calls it.
LAYERS = {
    "linear": (lambda: nn.Linear(128, 64), "weight", lambda: (torch.randn(3, 128),), "Linear"),
    "transposed": (lambda: Conv1D(64, 128), "weight", lambda: (torch.randn(3, 128),), "Linear"),
    "conv1d": (lambda: nn.Conv1d(64, 32, 3), "weight", lambda: (torch.randn(2, 64, 9),), "Conv1d"),
    "conv2d": (lambda: nn.Conv2d(32, 16, 3), "weight", lambda: (torch.randn(2, 32, 5, 5),), "Conv2d"),
    "embedding": (
        lambda: nn.Embedding(100, 64),
        "weight",
        lambda: (torch.arange(12).view(3, 4),),
        "Embedding",
    ),
    "attention": (
        lambda: nn.MultiheadAttention(64, 4, batch_first=True),
        "in_proj_weight",
        lambda: tuple(torch.randn(2, 5, 64) for _ in range(3)),
        "Attention",
    ),
    "experts": (experts, "gate_up_proj", lambda: (torch.randn(5, 64), *routing()), "Experts"),
}
INT8 = [("int8", kind) for kind in LAYERS]
# convolutions of a float16 model are torch's own float32 ones
FP16 = [("fp16", kind) for kind in LAYERS if "conv" not in kind]
EVERY = pytest.mark.parametrize(("dtype", "kind"), INT8 + FP16)


def convert(layer, dtype):
    options = {"embeddings": True, "disable_defaults": ["head"]} if dtype == "int8" else {}
    model, _ = mono_quant.dynamic_quantize(nn.Sequential(layer).eval(), dtype, **options)
    return model


def make(dtype, kind):
    """The float layer, the model around its converted twin, and arguments."""
    torch.manual_seed(0)
    build, _, arguments, _ = LAYERS[kind]
    layer = build().eval()
    return layer, convert(layer, dtype), arguments()


def run(layer, args):
    with torch.no_grad():
        out = layer(*args)
    return out[0] if isinstance(out, tuple) else out


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# Inputs


@pytest.mark.parametrize(
    "wrong", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str
)
@EVERY
def test_inputs_that_a_float_layer_refuses_are_refused_by_name(dtype, kind, wrong):
    layer, model, args = make(dtype, kind)
    if kind == "embedding":
        wrong = {torch.int32: torch.float32, torch.int64: torch.float16}.get(wrong, wrong)
    last = 3 if kind == "attention" else 1
    bad = (*(a.to(wrong) for a in args[:last]), *args[last:])
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(layer, bad)
    with pytest.raises(InputError, match=rf"(?i){LAYERS[kind][3]}.*{wrong}"):
        run(model[0], bad)


@pytest.mark.parametrize("width", [1, 63, 129])
@EVERY
def test_inputs_of_another_width_are_refused_by_name(dtype, kind, width):
    layer, model, args = make(dtype, kind)
    if kind == "embedding":
        pytest.skip("indices have no width")
    axis = {"conv1d": 1, "conv2d": 1}.get(kind, -1)
    last = 3 if kind == "attention" else 1
    bad = tuple(a.new_zeros([*a.shape[:axis], width, *a.shape[axis:][1:]]) for a in args[:last]) + args[last:]
    with pytest.raises((RuntimeError, AssertionError)):
        run(layer, bad)
    takes = args[0].shape[axis]
    with pytest.raises(InputError, match=rf"(?i){LAYERS[kind][3]}.*\b{takes}\b.*\b{width}\b"):
        run(model[0], bad)


@pytest.mark.parametrize("kind", ["linear", "transposed"])
@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_single_number_is_no_input(dtype, kind):
    _, model, _ = make(dtype, kind)
    with pytest.raises(InputError, match="128"):
        run(model[0], (torch.tensor(1.0),))


@pytest.mark.parametrize(("dtype", "kind"), [("int8", "linear"), ("int8", "conv2d"), ("fp16", "linear")])
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch imports its own old code
def test_a_compiled_layer_refuses_the_same(dtype, kind):
    _, model, args = make(dtype, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model[0], backend="eager", fullgraph=True)
    assert torch.equal(run(compiled, args), run(model[0], args))
    for bad in (args[0].int(), args[0].new_zeros([5] * args[0].dim())):
        with pytest.raises(Exception, match=f"(?i){LAYERS[kind][3]}"):
            run(compiled, (bad,))
    with pytest.raises(Exception, match=f"(?i){LAYERS[kind][3]}"):
        torch.export.export(model[0], (bad,))


# State dicts


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_float_weights_do_not_become_codes(kind, strict, assign):
    layer, model, _ = make("int8", kind)
    for state in (layer.state_dict(), {k: v.half() for k, v in layer.state_dict().items()}):
        before = state_of(model[0])
        with pytest.raises(RuntimeError, match=rf"(?s){LAYERS[kind][1]} is torch.float(32|16).*[Qq]uantize"):
            model[0].load_state_dict(state, strict=strict, assign=assign)
        held = {k: v for k, v in state_of(model[0]).items() if "bias" not in k}
        assert same(held, {k: v for k, v in before.items() if "bias" not in k})


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("lost", ["weight", "weight_scale"])
def test_codes_and_scales_are_loaded_together_or_not_at_all(lost, assign):
    _, model, _ = make("int8", "linear")
    other = convert(nn.Linear(128, 64), "int8")
    state = {k: v for k, v in other[0].state_dict().items() if k != lost}
    before = state_of(model[0])
    with pytest.raises(RuntimeError, match=f"without.*{lost}"):
        model[0].load_state_dict(state, strict=False, assign=assign)
    assert same(state_of(model[0]), before | {"bias": state["bias"]}) or same(state_of(model[0]), before)
    found = model[0].load_state_dict({"bias": state["bias"]}, strict=False, assign=assign)
    assert sorted(found.missing_keys) == ["weight", "weight_scale"]
    assert same(state_of(model[0]), before | {"bias": state["bias"]})


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scales_in_another_float_dtype_are_held_in_float32(scale, assign):
    _, model, args = make("int8", "linear")
    state = state_of(model[0])
    state["weight_scale"] = state["weight_scale"].to(scale)
    model[0].load_state_dict(state, assign=assign)
    held = model[0].state_dict()["weight_scale"]
    assert held.dtype == torch.float32 and torch.equal(held, state["weight_scale"].float())
    assert run(model[0], args).dtype == torch.float32


@pytest.mark.parametrize("assign", [True, False])
@EVERY
def test_a_state_of_its_own_kind_is_taken(dtype, kind, assign):
    _, model, args = make(dtype, kind)
    other = convert(LAYERS[kind][0](), dtype)
    expected = run(other[0], args)
    assert not torch.equal(run(model[0], args), expected)
    model.load_state_dict(state_of(other), strict=True, assign=assign)
    assert torch.equal(run(model[0], args), expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "bias" not in n)


@pytest.mark.parametrize("kind", [kind for _, kind in FP16])
def test_a_float_state_is_rounded_into_a_float16_layer_as_converting_does(kind):
    _, model, args = make("fp16", kind)
    other = LAYERS[kind][0]().eval()
    with torch.no_grad():  # a bias is held in float32, so it is not rounded when it is loaded
        for n, parameter in other.named_parameters():
            parameter.copy_(parameter.half() if "bias" in n else parameter)
    model[0].load_state_dict(other.state_dict())
    assert torch.equal(run(model[0], args), run(convert(other, "fp16")[0], args))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [kind for _, kind in FP16])
def test_what_float16_cannot_hold_is_not_loaded(kind, strict):
    layer, model, _ = make("fp16", kind)
    name = LAYERS[kind][1]
    state, before = state_of(layer), state_of(model[0])
    state[name].view(-1)[3] = 1e6
    with pytest.raises(RuntimeError, match=rf"(?s){name}.*float16"):
        model[0].load_state_dict(state, strict=strict)
    assert torch.equal(model[0].state_dict()[name], before[name])
    # assigned, the tensor itself would be the weight
    with pytest.raises(RuntimeError, match=rf"(?s){name} is torch.float32.*assign=False"):
        model[0].load_state_dict(layer.state_dict(), strict=strict, assign=True)
    assert torch.equal(model[0].state_dict()[name], before[name])


# Writing into a weight

WRITES = {
    "copy_": lambda m, n, w: getattr(m, n).copy_(w),
    "arithmetic": lambda m, n, w: getattr(m, n).mul_(2).add_(w),
    "data": lambda m, n, w: setattr(getattr(m, n), "data", w),
    "data.copy_": lambda m, n, w: getattr(m, n).data.copy_(w),
    "index": lambda m, n, w: getattr(m, n).__setitem__(0, 0.0),
    "view": lambda m, n, w: getattr(m, n)[0].view(-1).zero_(),
    "detached": lambda m, n, w: getattr(m, n).detach().zero_(),
    "halves": lambda m, n, w: getattr(m, n).chunk(2)[1].zero_(),
    "augmented": lambda m, n, w: getattr(m, n).__iadd__(w),
    "out=": lambda m, n, w: torch.add(w, w, out=getattr(m, n)),
    "foreach": lambda m, n, w: torch._foreach_copy_([getattr(m, n)], [w]),
    "normal_": lambda m, n, w: nn.init.normal_(getattr(m, n)),
    "xavier_uniform_": lambda m, n, w: nn.init.xavier_uniform_(getattr(m, n)),
    "zeros_": lambda m, n, w: nn.init.zeros_(getattr(m, n)),
    "requires_grad_": lambda m, n, w: getattr(m, n).requires_grad_(),
    "requires_grad": lambda m, n, w: setattr(getattr(m, n), "requires_grad", True),
    "del": lambda m, n, w: delattr(m, n),
    "None": lambda m, n, w: setattr(m, n, None),
    "prune": lambda m, n, w: prune.l1_unstructured(m, n, amount=0.5),
    "weight_norm": lambda m, n, w: parametrizations.weight_norm(m, n),
    "spectral_norm": lambda m, n, w: parametrizations.spectral_norm(m, n),
}


@EVERY
def test_a_write_that_would_be_lost_is_refused(dtype, kind):
    layer, model, args = make(dtype, kind)
    _, name, _, called = LAYERS[kind]
    weight = getattr(layer, name).detach()
    expected, before = run(model[0], args), state_of(model)
    passed = []
    for how, write in WRITES.items():
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            try:
                with mode():
                    write(model[0], name, weight)
                passed.append((how, mode.__name__))
            except FrozenWeightError as error:
                assert f"{called}.{name}" in str(error) and "quantize" in str(error), how
    assert passed == []
    assert same(state_of(model), before) and torch.equal(run(model[0], args), expected)
    assert not model[0]._forward_pre_hooks


@EVERY
def test_a_new_parameter_is_refused_unless_it_is_of_the_kind_that_the_layer_holds(dtype, kind):
    layer, model, args = make(dtype, kind)
    _, name, _, called = LAYERS[kind]
    expected, before = run(model[0], args), state_of(model)
    weight = getattr(layer, name).detach()
    for wrong in (weight, weight.bfloat16(), weight[..., 1:], weight.half()[..., 1:]):
        with pytest.raises(FrozenWeightError, match=rf"{called}\.{name}"):
            setattr(model[0], name, nn.Parameter(wrong))
        with pytest.raises(FrozenWeightError, match=rf"{called}\.{name}"):
            model[0].register_parameter(name, nn.Parameter(wrong))
    assert same(state_of(model), before) and torch.equal(run(model[0], args), expected)
    stored = dict(model[0].named_parameters())[name]
    setattr(model[0], name, nn.Parameter(stored.clone(), requires_grad=stored.is_floating_point()))
    assert torch.equal(run(model[0], args), expected)
    assert not dict(model[0].named_parameters())[name].requires_grad


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_old_weight_norm_is_refused_too(dtype):
    _, model, args = make(dtype, "linear")
    with pytest.raises(FrozenWeightError, match=r"Linear.*weight"):
        torch.nn.utils.weight_norm(model[0])
    # it takes the weight away before it asks; what is left says so
    with pytest.raises(FrozenWeightError, match=r"Linear.*weight.*gone"):
        run(model[0], args)


def test_weights_put_in_for_one_call_do_not_become_codes():
    layer, model, args = make("int8", "linear")
    weight = {"0.weight": layer.weight.detach()}
    with pytest.raises(FrozenWeightError, match="int8 layer found torch\\.float32 weights"):
        torch.func.functional_call(model, weight, args)
    codes = {"0.weight": model.state_dict()["0.weight"].float()}
    assert torch.equal(torch.func.functional_call(model, codes, args), run(model[0], args))


# Reading a weight


@EVERY
def test_a_weight_that_is_read_is_a_tensor_like_any_other(dtype, kind):
    layer, model, _ = make(dtype, kind)
    name = LAYERS[kind][1]
    source, weight = getattr(layer, name).detach(), getattr(model[0], name)
    assert (weight.dtype, weight.shape, weight.device) == (source.dtype, source.shape, source.device)
    step = source.abs().amax() / 127 if dtype == "int8" else source.abs().amax() * 2.0**-11
    assert ((weight - source).abs() <= step).all()
    for made in (weight + 0, weight.clone(), weight.to(torch.float16), copy.deepcopy(weight), F.relu(weight)):
        assert type(made) is torch.Tensor
        made.zero_()
    assert torch.equal(getattr(model[0], name), weight)
    assert weight.float() is weight and torch.equal(torch.stack(list(weight)), weight)
    target = torch.empty_like(source)
    assert torch.equal(target.copy_(weight), weight)
    own = nn.Parameter(weight.clone())
    assert type(own) is nn.Parameter and own.requires_grad
    assert repr(weight.clone()).startswith("tensor(")


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_weight_that_is_read_takes_part_in_gradients(dtype):
    _, model, (x,) = make(dtype, "linear")
    x.requires_grad_()
    F.linear(x, model[0].weight).sum().backward()
    assert torch.allclose(x.grad, model[0].weight.sum(0).expand_as(x))


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch imports its own old code
def test_code_that_reads_a_weight_compiles(dtype):
    class Tied(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            weight = self.head.weight
            return F.linear(x.to(weight.dtype), weight * 2)

    _, model, (x,) = make(dtype, "linear")
    tied = Tied(model[0])
    torch._dynamo.reset()
    compiled = torch.compile(tied, backend="aot_eager", fullgraph=True)
    assert torch.equal(run(compiled, (x,)), run(tied, (x,)))
    assert torch.equal(torch.export.export(tied, (x,)).module()(x), run(tied, (x,)))


def test_after_half_a_float16_weight_is_the_parameter_itself():
    _, model, args = make("fp16", "linear")
    model.half()
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter) and weight.dtype == torch.float16
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(run(model[0], (args[0].half(),)), model[0].bias.detach().expand(3, 64))
