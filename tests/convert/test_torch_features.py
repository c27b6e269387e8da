"""What torch does with modules, on every kind of converted layer: right, or refused in words; never another result."""

import copy
import pickle

import accelerate
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import mono_quant
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import FrozenWeightError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class One(nn.Module):
    """A model that is one layer of one input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Three(One):
    """A model that is one layer of three inputs."""

    def forward(self, x, y, z):
        out = self.layer(x, y, z)
        return out[0] if isinstance(out, tuple) else out


class Traceable(One):
    """The same without a look at what the layer gave."""

    def forward(self, x, y, z):
        return self.layer(x, y, z)


def experts():
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2}
    layer = MixtralExperts(MixtralConfig(**sizes))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    return Three(layer), (torch.randn(9, 24), index, torch.rand(9, 2))


KINDS = {
    "linear": lambda: (One(nn.Linear(24, 19)), (torch.randn(3, 5, 24),)),
    "transposed": lambda: (One(Conv1D(19, 24)), (torch.randn(3, 5, 24),)),
    "conv1d": lambda: (One(nn.Conv1d(6, 8, 3, padding=1)), (torch.randn(2, 6, 11),)),
    "conv2d": lambda: (One(nn.Conv2d(4, 6, 3, stride=2, groups=2)), (torch.randn(2, 4, 9, 8),)),
    "embedding": lambda: (One(nn.Embedding(13, 17)), (torch.randint(0, 13, (3, 4)),)),
    "attention": lambda: (
        Three(nn.MultiheadAttention(24, 3, batch_first=True)),
        tuple(torch.randn(2, 5, 24) for _ in range(3)),
    ),
    "experts": experts,
}
CASES = [f"int8 {kind}" for kind in KINDS] + [f"fp16 {kind}" for kind in KINDS if "conv" not in kind]
# which experts get tokens depends on the data, in the float model, too, and transforms do not take the op
STATIC = pytest.mark.parametrize("case", [case for case in CASES if "experts" not in case])
EVERY = pytest.mark.parametrize("case", CASES)
FLOATS = pytest.mark.parametrize("case", [case for case in CASES if "embedding" not in case])


def make(case):
    """Return a model of one converted layer, inputs, and the float model with the weights that it stands for."""
    dtype, kind = case.split()
    torch.manual_seed(0)
    model, args = KINDS[kind]()
    lifted = ["small", "head", "embedding"] if dtype == "int8" else []
    converted, _ = mono_quant.dynamic_quantize(model.eval(), dtype, disable_defaults=lifted, fidelity=False)
    assert isinstance(converted.layer, StoredModule)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for path, layer in converted.named_modules():
            for held in getattr(layer, "held", ()):
                twin.get_submodule(path).get_parameter(held).copy_(getattr(layer, held))
    return converted, args, twin


def run(model, args):
    with torch.no_grad():
        return model(*args)


def loss(model, args):
    return lambda x: model(x, *args[1:]).square().sum()


def backward(model, args):
    x = args[0].clone().requires_grad_()
    loss(model, args)(x).backward()
    return x.grad


def close(a, b, tolerance=1e-5):
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))


# Gradients and transforms


@FLOATS
def test_gradients_in_every_way_that_torch_takes_them_are_one(case):
    model, args, twin = make(case)
    x, *rest = args
    expected = backward(model, args)
    # straight-through: of the float layer, at the values that this one gives
    y = args[0].clone().requires_grad_()
    out = twin(y, *rest)
    out.backward(2 * run(model, args))
    assert close(expected, y.grad, 0.05 if case.split()[1] in ("attention", "experts") else 1e-4)
    assert close(grad(loss(model, args))(x), expected)
    again = x.clone().requires_grad_()
    checkpoint(loss(model, args), again, use_reentrant=False).backward()
    assert close(again.grad, expected)
    tangent = torch.randn_like(x)
    assert close(jvp(loss(model, args), (x,), (tangent,))[1], (expected * tangent).sum(), 1e-4)
    with forward_ad.dual_level():
        dual = loss(model, args)(forward_ad.make_dual(x, tangent))
        assert close(forward_ad.unpack_dual(dual).tangent, (expected * tangent).sum(), 1e-4)
    assert close(vmap(grad(loss(model, args)))(torch.stack([x, 2 * x]))[0], expected)
    assert jacrev(lambda x: model(x, *rest).sum(-1).flatten()[:3])(x).shape == (3, *x.shape)


@pytest.mark.parametrize("case", ["int8 linear", "int8 conv2d", "fp16 linear"])
def test_a_bias_has_its_gradient_and_a_second_derivative_its_way(case):
    model, args, twin = make(case)
    parameters = dict(model.named_parameters())
    bias = grad(lambda b: functional_call(model, {**parameters, "layer.bias": b}, args).square().sum())(
        model.layer.bias.detach()
    )
    loss(model, args)(args[0]).backward()
    assert close(bias, model.layer.bias.grad)
    _, change = jvp(
        lambda b: functional_call(model, {**parameters, "layer.bias": b}, args).sum(),
        (model.layer.bias.detach(),),
        (torch.ones_like(bias),),
    )
    assert change == run(model, args).numel()
    twice = grad(lambda x: grad(loss(model, args))(x).square().sum())(args[0])
    assert close(twice, grad(lambda x: grad(loss(twin, args))(x).square().sum())(args[0]), 0.1)


@STATIC
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batches_of_inputs_and_of_models_give_what_each_alone_gives(case):
    model, args, _ = make(case)
    expected = run(model, args)
    twice = tuple(torch.stack([a, a]) for a in args)
    assert close(vmap(lambda *a: run(model, a))(*twice)[1], expected, 1e-6)
    parameters, buffers = stack_module_state([model, model])
    both = vmap(lambda p, b: functional_call(model, (p, b), args))(parameters, buffers)
    assert close(both[1], expected, 1e-6)


@EVERY
def test_a_forward_with_other_parameters_of_the_same_form(case):
    model, args, _ = make(case)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(functional_call(model, state, args), run(model, args))


@EVERY
def test_weights_that_are_asked_for_gradients_refuse(case):
    model, args, _ = make(case)
    with pytest.raises(FrozenWeightError, match=r"cannot be trained.*LoRA.*skip="):
        model.layer.requires_grad_()
    model.requires_grad_(False)
    if case.startswith("int8"):
        with pytest.raises(RuntimeError, match="floating point"):
            model.requires_grad_()
    elif "embedding" not in case:
        with pytest.raises(FrozenWeightError, match="float16 layer requires gradients"):
            model.requires_grad_()(*args).sum().backward()


# Tracers and compilers


@EVERY
def test_layers_are_leaves_to_tracers(case):
    model, args, _ = make(case)
    # what of an attention's answer is used cannot be asked of a tracer's stand-in
    whole = Traceable(model.layer) if len(args) == 3 else model
    expected = whole(*args)[0] if "attention" in case else whole(*args)
    traced = torch.fx.symbolic_trace(whole)
    assert [n.op for n in traced.graph.nodes if n.op not in ("placeholder", "output")] == ["call_module"]
    found = traced(*args)
    assert torch.equal(found[0] if "attention" in case else found, expected)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin.layer) is type(model.layer) and type(twin.layer).__module__.startswith("mono_quant.")


@pytest.mark.parametrize("case", ["int8 linear", "int8 conv2d", "int8 embedding"])
def test_a_tracer_that_opens_a_layer_all_the_same_fails(case):
    model, args, _ = make(case)

    class Opening(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return False

    # floats in the place of codes, or a decision that it cannot trace
    with pytest.raises((FrozenWeightError, torch.fx.proxy.TraceError)):
        torch.fx.GraphModule(model, Opening().trace(model))(*args)


# int8: see test_int8_layers
@pytest.mark.parametrize("case", [case for case in CASES if "fp16" in case and "experts" not in case])
def test_whole_graphs_are_compiled_and_exported_with_the_same_bits(case):
    model, args, _ = make(case)
    expected = run(model, args)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(run(compiled, args), expected, 1e-6 if "attention" in case else 0)
    exported = torch.export.export(model, args).module()
    assert close(run(exported, args), expected, 1e-6 if "attention" in case else 0)


@FLOATS
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # dynamo looks after a graph break
def test_a_compiled_training_step_has_the_same_gradients(case):
    model, args, _ = make(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph="experts" not in case, backend="aot_eager")
    assert close(backward(compiled, args), backward(model, args))


@EVERY
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_jit_trace_gives_the_same_bits(case):
    model, args, _ = make(case)
    traced = torch.jit.trace(model, args, check_trace=False)
    assert torch.equal(run(traced, args), run(model, args))


# Copies and places


@EVERY
def test_replicas_copies_and_shared_memory_give_the_same_bits(case):
    model, args, _ = make(case)
    expected = run(model, args)
    replica = model._replicate_for_data_parallel()
    replica.layer = model.layer._replicate_for_data_parallel()
    replica.layer._parameters = dict(model.layer._parameters)
    for twin in (nn.DataParallel(model), replica, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, args), expected)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert torch.equal(run(last, args), expected)
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters()) and torch.equal(run(model, args), expected)


# int8: see test_int8_layers
@pytest.mark.parametrize("case", [case for case in CASES if "fp16" in case])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_give_the_same_bits(case, where, tmp_path):
    model, args, _ = make(case)
    expected, device = run(model, args), torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=device)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=device)
    assert all(p.is_meta for p in model.parameters())
    # accelerate widens what reads as float32, and torch sums in another order
    assert close(run(model, args), expected, 1e-6)


@EVERY
def test_a_model_on_meta_says_what_shape_comes_out(case):
    model, args, _ = make(case)
    if case == "fp16 experts":
        pytest.skip("depends on the data")
    expected = run(model, args)
    out = run(copy.deepcopy(model).to("meta"), tuple(a.to("meta") for a in args))
    assert out.is_meta and (out.shape, out.dtype) == (expected.shape, expected.dtype)


@EVERY
def test_a_parametrization_is_refused(case):
    model, args, _ = make(case)
    expected = run(model, args)
    for held in model.layer.held:
        with pytest.raises(FrozenWeightError, match=f"{held} is to be removed"):
            parametrize.register_parametrization(model.layer, held, nn.Identity())
    assert torch.equal(run(model, args), expected)


@EVERY
def test_hooks_of_state_dicts_see_codes_and_scales(case):
    model, _, _ = make(case)
    seen = []
    model.layer.register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.append(set(state)))
    model.layer.register_load_state_dict_post_hook(lambda module, keys: seen.append(keys.missing_keys))
    model.load_state_dict(model.state_dict())
    assert {f"layer.{held}" for held in model.layer.held} <= seen[0] and seen[1] == []
