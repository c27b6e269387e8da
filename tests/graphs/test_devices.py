"""Whole models where kernels for a device are, in Triton's interpreter: what torch's compiler gets, and what comes out of it."""

import copy
from collections import Counter

import pytest
import torch
from captured import GENERATOR, GRAPHS, ON_DEVICE, is_ours, of, spelled
from functorch.compile import make_boxed_func
from models import relative_error, seeded, text, transformer
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from transformers import CompileConfig

pytest.importorskip("triton")

from mono_quant import dynamic_quantize, kernels
from mono_quant.graphs import backend
from mono_quant.graphs.matching import is_call
from mono_quant.kernels.gpu.features import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled, for another device")

MIXTRAL = of(
    "MixtralModel",
    **transformer | {"intermediate_size": 96, "num_hidden_layers": 1},
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
)


@pytest.fixture(autouse=True)
def _interpreted():
    torch.compiler.reset()
    with kernels.using(path="triton"):
        yield


class Functional:
    """Our backend with what comes before torch's code generation in the place of all of it: no writes, fakes, opaque ops."""

    def __init__(self):
        self.calls, self.ops = Counter(), Counter()

    def __call__(self, graph, inputs, **_):
        rewritten = backend.rewrite_(graph)
        self.calls += Counter(spelled(node) for node in graph.graph.nodes if is_ours(node.target))

        def remember(inner, _inputs):
            self.ops += Counter(str(n.target) for n in inner.graph.nodes if "mono_quant" in str(n.target))
            return make_boxed_func(inner.forward)

        return aot_autograd(fw_compiler=remember)(rewritten, inputs)


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("qwen3", torch.float32),
        ("bert", torch.float16),
        ("gpt2", torch.bfloat16),
        ("mixtral", torch.bfloat16),
    ],
)
def test_a_whole_model_goes_on_to_the_compiler_as_opaque_calls(name, dtype):
    family = MIXTRAL if name == "mixtral" else GRAPHS[name][0]
    model = family.build().to(dtype)
    quantized = dynamic_quantize(model, "int8", embeddings=False)[0].eval()
    inputs, functional = family.inputs(), Functional()
    with torch.inference_mode():
        exact, eager = first(model(**inputs)), first(quantized(**inputs))
        found = first(torch.compile(quantized, backend=functional, fullgraph=True)(**inputs))
    assert functional.calls == ON_DEVICE[name]
    assert {"mono_quant.chain.default", "mono_quant.int8_linear.default"} <= functional.ops.keys()
    # a sum of squares, and GPT-2's activation, round in another order: a unit of the dtype, and the codes that it moves
    noise = relative_error(exact, eager)
    assert relative_error(eager, found) <= 2 * torch.finfo(dtype).eps + 0.5 * noise


def block():
    """A block with a norm, a residual and a gate."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.opened, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
            self.norm = nn.LayerNorm(64)

        def forward(self, x, y):
            total = x + y
            normed = self.norm(total)
            return total + self.down(F.silu(self.opened(normed)) * self.up(normed))

    return dynamic_quantize(seeded(Block).eval(), "int8", disable_defaults=["head"])[0]


# of torch, while it imports its compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_the_compiler_generates_code_around_calls_for_every_batch():
    model = block().bfloat16()
    graphs, counts = [], []

    def compiled(graph, inputs):
        graphs.append(backend.rewrite_(graph))
        return backend.compiled(graph, inputs, "max-autotune-no-cudagraphs")

    fast = torch.compile(model, backend=compiled, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for rows in (3, 5, 2):
            x, y = torch.randn(2, rows, 64).bfloat16()
            torch.testing.assert_close(fast(x, y), model(x, y), rtol=2**-7, atol=2**-7)
            counts.append(len(graphs))
    # torch begins anew where it finds that a float is constant
    assert counts == counts[:1] * 3
    assert any(is_call(node, kernels.chain_kept) for node in graphs[-1].graph.nodes)


def test_a_preset_that_is_none_is_refused_by_the_compiler():
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(RuntimeError, match="Unrecognized mode=fastest"):
        backend.compiled(graph, [torch.ones(2)], "fastest")


def test_gradients_flow_through_what_would_be_one_call():
    model = block()
    other = copy.deepcopy(model)
    x, y = torch.randn(2, 3, 64)

    def trained(model, run):
        a = x.clone().requires_grad_()
        run(a, y).square().sum().backward()
        return [a.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    functional = Functional()
    found = trained(model, torch.compile(model, backend=functional, fullgraph=True))
    expected = trained(other, other)
    assert functional.calls["chain_kept added pre gate act second and sum"] == 1
    assert "mono_quant.chain.default" not in functional.ops and len(found) == len(expected) > 1
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-3, atol=1e-4)


def test_generate_compiles_by_itself_where_its_cache_is_static():
    model = dynamic_quantize(GENERATOR.build().bfloat16(), "int8")[0]
    model.generation_config.eos_token_id = None
    assert model.hf_quantizer.is_compileable
    config, functional = CompileConfig(fullgraph=True), Functional()
    # what it does by itself on a GPU
    config._compile_all_devices = True
    # it copies what is no function
    config.backend = lambda graph, inputs, **_: functional(graph, inputs)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static",
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    ids = text()["input_ids"]
    eager = model.generate(ids, **options, disable_compile=True)
    found = model.generate(ids, **options, compile_config=config)
    assert functional.ops["mono_quant.chain.default"] == 2
    for one, other in zip(found.logits, eager.logits, strict=True):
        assert relative_error(other, one) <= 2 * torch.finfo(torch.bfloat16).eps
    again = model.generate(ids, **options, compile_config=config)
    assert torch.equal(again.sequences, found.sequences) and functional.ops["mono_quant.chain.default"] == 2
