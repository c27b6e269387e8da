"""The backend by its name, what it refuses, and what compiled models live through."""

import copy
import threading
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from captured import CLASSIFIER, GENERATOR, Captured
from models import relative_error, run, seeded, text
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import mono_quant as mq
from mono_quant import dynamic_quantize
from mono_quant.errors import ConfigError
from mono_quant.graphs import backend

ROOT = Path(mq.__file__).parents[1]


class Counted:
    """The backend, counting what it compiled."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return backend.mono_quant(graph, inputs)


def compiled(model):
    torch.compiler.reset()
    counted = Counted()
    model.compile(backend=counted)
    return model, counted


def int8(model):
    return dynamic_quantize(model, "int8")[0]


def batch(rows, length, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = torch.randint(3, 200, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def near(one, other):
    """The noise of the codes is a hundredth of the values in these models; a wrong tensor is as far as the values."""
    assert relative_error(other, one) < 0.02


def test_torch_finds_it_by_its_name_here_and_where_it_is_installed():
    assert torch.equal(
        torch.compile(lambda x: x + 1, backend="mono_quant")(torch.ones(2)), torch.full((2,), 2.0)
    )
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    ((name, value),) = declared["torch_dynamo_backends"].items()
    assert name == backend.NAME
    assert EntryPoint(name, value, "torch_dynamo_backends").load() is backend.mono_quant


def test_options_are_refused_and_modes_are_not():
    with pytest.raises(
        Exception, match=r"'max_autotune': True.*are for another backend.*leave them out"
    ) as error:
        torch.compile(lambda x: x + 1, backend=backend.mono_quant, options={"max_autotune": True})(
            torch.ones(2)
        )
    assert isinstance(error.value.inner_exception, ConfigError)
    doubled = torch.compile(lambda x: x * 2, backend=backend.mono_quant, mode="reduce-overhead")
    assert torch.equal(doubled(torch.ones(2)), torch.full((2,), 2.0))


def test_three_shapes_are_compiled_and_no_more():
    eager = int8(CLASSIFIER.build())
    model, counted = compiled(copy.deepcopy(eager))
    for rows, length in [(2, 7), (2, 12), (3, 9)]:
        near(run(model, batch(rows, length)), run(eager, batch(rows, length)))
    before = counted.graphs
    for rows, length in [(5, 20), (2, 7), (9, 8), (4, 31)]:
        near(run(model, batch(rows, length)), run(eager, batch(rows, length)))
    assert counted.graphs == before <= 3


def test_the_compiler_of_torch_takes_layers_as_they_are_for_three_shapes_and_no_more():
    model = int8(CLASSIFIER.build())
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    fast = torch.compile(model, backend=counter, fullgraph=True)
    for rows, length in [(2, 7), (2, 12), (3, 9), (5, 20), (4, 31)]:
        near(run(fast, batch(rows, length)), run(model, batch(rows, length)))
    assert counter.frame_count <= 3


def test_a_graph_holds_no_weights():
    torch.compiler.reset()
    captured = Captured()
    model = int8(CLASSIFIER.build())
    model.compile(backend=captured)
    run(model, text())
    (graph,) = captured.graphs
    assert [node for node in graph.graph.nodes if node.op == "get_attr"] == []
    assert [*graph.parameters(), *graph.buffers()] == []
    shapes = {
        tuple(node.meta["example_value"].shape) for node in graph.graph.nodes if node.op == "placeholder"
    }
    assert {tuple(p.shape) for p in model.parameters()} <= shapes


def test_weights_that_are_loaded_later_are_used():
    model, _ = compiled(int8(CLASSIFIER.build()))
    before = run(model, batch(2, 7))
    torch.manual_seed(5)
    other = int8(CLASSIFIER.make().eval())
    model.load_state_dict(other.state_dict())
    assert relative_error(before, run(model, batch(2, 7))) > 0.1
    near(run(model, batch(2, 7)), run(other, batch(2, 7)))


def test_copies_are_models_like_before():
    model, counted = compiled(int8(CLASSIFIER.build()))
    out = run(model, batch(2, 7))
    again = copy.deepcopy(model)
    near(run(again, batch(2, 7)), out)
    assert counted.graphs == 1 and type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_hooks_see_what_they_saw():
    model, _ = compiled(int8(CLASSIFIER.build()))
    seen = []
    inner = model.bert.encoder.layer[0].intermediate
    inner.register_forward_hook(lambda module, args, out: seen.append(out))
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, out: out * 0)
    out = run(model, batch(2, 7))
    compiled_out, model._compiled_call_impl = seen.pop(), None
    expected = run(model, batch(2, 7))
    near(out, expected)
    near(compiled_out, seen.pop())


def test_training_has_its_dropout_and_its_gradients():
    def trained(model):
        model.train()
        torch.manual_seed(3)
        loss = model(**batch(2, 7), labels=torch.tensor([0, 1])).loss
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    eager = int8(CLASSIFIER.build())
    model, _ = compiled(copy.deepcopy(eager))
    (loss, gradients), (expected, wanted) = trained(model), trained(eager)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == wanted.keys() and "bert.encoder.layer.0.output.LayerNorm.weight" in gradients
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8 in bfloat16", "fp16", "float32"])
def test_other_models_run_as_they_are(dtype):
    model = CLASSIFIER.build()
    if dtype != "float32":
        model = dynamic_quantize(model.bfloat16() if "bfloat16" in dtype else model, dtype[:4].strip())[0]
    plain = copy.deepcopy(model)
    model, _ = compiled(model)
    tolerance = 0.05 if "bfloat16" in dtype else 1e-5
    assert relative_error(run(plain, batch(2, 7)), run(model, batch(2, 7))) <= tolerance


def test_autocasting_and_modes_of_gradients():
    eager = int8(CLASSIFIER.build())
    model, _ = compiled(copy.deepcopy(eager))
    with torch.autocast("cpu", torch.bfloat16):
        one, other = run(model, batch(2, 7)), run(eager, batch(2, 7))
    assert one.dtype == other.dtype and relative_error(other, one) < 0.05
    with torch.no_grad():
        near(model(**batch(2, 7)).logits, eager(**batch(2, 7)).logits)


def test_threads_share_a_compiled_model():
    eager = int8(CLASSIFIER.build())
    model, _ = compiled(copy.deepcopy(eager))
    batches = [batch(2, 7, seed) for seed in range(8)]
    expected = [run(model, one) for one in batches]
    results = {}

    def work(i):
        for _ in range(5):
            results[i] = run(model, batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, one in enumerate(expected):
        assert torch.equal(results[i], one)
        near(one, run(eager, batches[i]))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_writes_its_cache_in_order(cache):
    eager = int8(GENERATOR.build())
    eager.generation_config.eos_token_id = None
    model, counted = compiled(copy.deepcopy(eager))
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    options |= {"pad_token_id": 0} | ({"cache_implementation": "static"} if cache == "static" else {})
    ids = batch(2, 5)["input_ids"]
    one, other = model.generate(ids, **options), eager.generate(ids, **options)
    # the first tokens, before a flipped code may choose another word
    near(torch.stack(one.logits[:2]), torch.stack(other.logits[:2]))
    assert counted.graphs <= 3
    before = counted.graphs
    model.generate(ids, **options)
    assert counted.graphs == before


def test_a_part_that_breaks_the_graph_runs_between_the_others():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64)
            self.norm = nn.LayerNorm(64)

        def forward(self, x):
            y = torch.nn.functional.gelu(self.a(x))
            torch._dynamo.graph_break()
            return self.norm(x + self.b(y))

    eager = int8(seeded(Broken).eval())
    model, counted = compiled(copy.deepcopy(eager))
    x = torch.randn(3, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), eager(x), rtol=1e-2, atol=1e-2)
    assert counted.graphs == 2
