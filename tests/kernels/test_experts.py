"""The experts of a layer as one op: the bits of products one by one, in one graph."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mono_quant import kernels
from mono_quant.convert.forwards import activation_of
from mono_quant.convert.int8_layers import Int8Experts
from mono_quant.errors import FrozenWeightError, InputError
from mono_quant.kernels import AUTO

E, H, I = 5, 24, 20
ACTS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def weights(experts=E, hidden=H, inner=I):
    return (
        torch.randint(-128, 128, (experts, 2 * inner, hidden), dtype=torch.int8),
        torch.rand(experts, 2 * inner, 1) * 0.02,
        torch.randint(-128, 128, (experts, hidden, inner), dtype=torch.int8),
        torch.rand(experts, hidden, 1) * 0.02,
    )


def routed(tokens, k=2, experts=E):
    index = torch.rand(tokens, experts).argsort(1)[:, :k]
    return index, torch.rand(tokens, k)


def token_by_token(x, index, weight, gate_up, gate_up_scale, down, down_scale, act, activations):
    """Each token alone through each of its experts, in their order; rounded after each operation."""
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        order = sorted((e, slot) for slot, e in enumerate(index[t].tolist()) if 0 <= e < len(down))
        for e, slot in order:
            both = kernels.int8_linear(x[t : t + 1], gate_up[e], gate_up_scale[e], None, activations)
            gate, up = both.chunk(2, dim=1)
            y = kernels.int8_linear(ACTS[act](gate) * up, down[e], down_scale[e], None, activations)
            out[t] += (y[0] * weight[t, slot : slot + 1]).to(x.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activations", [AUTO, "int12"])
def test_experts_add_in_the_order_of_their_numbers(dtype, activations):
    # relu has the same bits for one row and for many
    x, (index, weight) = torch.randn(7, H, dtype=dtype), routed(7, k=3)
    if dtype == torch.float32:
        # in half precision torch rounds what one expert adds twice to a token together
        index[2] = torch.tensor([4, 1, 4])
    index[3] = torch.tensor([0, E, -1])
    parts = weights()
    out = kernels.int8_experts(x, index, weight, *parts, "relu", activations)
    assert out.dtype == dtype
    assert torch.equal(out, token_by_token(x, index, weight, *parts, "relu", activations))


def layer(act="silu"):
    source = MixtralExperts(MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E))
    source.act_fn = ACT2FN[act]
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(0, 0.3)
    module = Int8Experts(source, None)
    for name in module.held:
        module.encode_(name, source.get_parameter(name))
    return module


# under a mode that looks, and under a compiler, a whole graph; the names of transformers
@pytest.mark.parametrize("act", ["silu", "swish", "relu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("tokens", [1, 9, 0])
def test_one_op_has_the_bits_of_the_products(act, tokens):
    module, args = layer(act), (torch.randn(tokens, H), *routed(tokens))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = module(*args)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*args), expected)


@pytest.mark.parametrize("act", ["gelu_new", "gelu_python", "gelu_python_tanh", "gelu_10", "tanh"])
def test_other_activations_go_product_by_product(act):
    assert activation_of(ACT2FN[act]) == ""
    module, args = layer(act), (torch.randn(4, H), *routed(4))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = module(*args)
        assert torch.equal(torch.compile(module, backend="eager")(*args), expected)


def test_an_activation_with_a_hook_is_called():
    module, args = layer(), (torch.randn(4, H), *routed(4))
    calls = []
    module.act_fn.register_forward_hook(lambda *_: calls.append(1))
    assert activation_of(module.act_fn) == "" and activation_of(nn.SiLU()) == "silu"
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend="eager")(*args)
    assert calls


def test_what_others_add_to_a_product_is_in_a_compiled_graph_too():
    module, args = layer(), (torch.randn(4, H), *routed(4))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad(), module.adding("down_proj", lambda x, _: x.new_ones(len(x), H)):
        expected = module(*args)
        found = compiled(*args)
        assert torch.equal(found, expected)
    with torch.no_grad():
        assert not torch.equal(module(*args), expected)
        assert torch.equal(compiled(*args), module(*args))


def test_the_op_keeps_the_contract_of_torch_library():
    args = (torch.randn(6, H), *routed(6), *weights(), "silu", "int8-g64")
    torch.library.opcheck(torch.ops.mono_quant.int8_experts.default, args)


def test_experts_on_meta_have_the_shape_of_their_tokens():
    args = tuple(t.to("meta") for t in (torch.randn(6, H), *routed(6), *weights()))
    assert kernels.has_experts(args[0], args[2])
    assert kernels.int8_experts(*args, "silu").shape == (6, H)


def test_wrong_calls_are_refused():
    x, (index, weight), parts = torch.randn(6, H), routed(6), weights()
    with pytest.raises(InputError, match=r"not \(6, 24\), \(6, 2\), \(6, 3\), .*route each token"):
        kernels.int8_experts(x, index, torch.rand(6, 3), *parts, "silu")
    with pytest.raises(InputError, match=r"codes \[E, 2I, H\].* not \(6, 23\)"):
        kernels.int8_experts(x[:, :23], index, weight, *parts, "silu")
    with pytest.raises(FrozenWeightError, match=r"found torch\.float32 weights"):
        kernels.int8_experts(x, index, weight, parts[0].float(), *parts[1:], "silu")
    with pytest.raises(ValueError, match="unknown activation 'mish'; choose from 'gelu'"):
        kernels.int8_experts(x, index, weight, *parts, "mish")
    with pytest.raises(ValueError, match="unknown activation scheme"):
        kernels.int8_experts(x, index, weight, *parts, "silu", "int9")
