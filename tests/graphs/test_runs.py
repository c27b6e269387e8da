"""Runs give the bits of the calls that they are made of, for weights, caches and settings as they are at each call."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers as hf
from beside import Beside, beside
from captured import CLASSIFIER, GRAPHS
from native import native_only
from torch import Tensor, nn

from mono_quant import dynamic_quantize, kernels
from mono_quant.kernels import choice

pytestmark = native_only


def int8(model: nn.Module) -> nn.Module:
    return dynamic_quantize(model, "int8")[0]


def run(model: nn.Module, inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def settled(model: nn.Module, backend: Beside, inputs) -> Tensor:
    """Call a model until it runs its programs."""
    for _ in range(4):
        out = run(model, inputs)
    assert backend.programs > 0
    return out


@pytest.mark.parametrize("name", ["bert", "qwen3", "gemma3", "modernbert"])
def test_families_have_the_bits_of_single_calls(name):
    family, _ = GRAPHS[name]
    model, backend = beside(int8(family.build()))
    settled(model, backend, family.inputs())
    assert backend.programs == len(backend.runs)


def test_the_convolutions_of_a_cnn_are_one_run():
    config = hf.ResNetConfig(
        embedding_size=64, hidden_sizes=[256, 512], depths=[2, 1], layer_type="bottleneck"
    )
    model, backend = beside(int8(hf.ResNetModel(config).eval()))
    settled(model, backend, {"pixel_values": torch.randn(2, 3, 33, 40)})
    # what is in front of the pool runs alone
    (only,) = backend.runs
    assert backend.programs == 1
    assert sum(node.target is kernels.conv for node in only._plain.graph.nodes) == 11


def test_images_that_are_given_away_leave_convolutions_a_program():
    layers = [nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.ReLU()]
    model = dynamic_quantize(nn.Sequential(*layers).eval(), "int8", disable_defaults=["head", "small"])[0]
    backend = Beside()
    call = torch.compile(model, backend=backend)
    x = torch.randn(2, 16, 7, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(4):
            assert call(x).is_contiguous()
    assert backend.programs == len(backend.runs) == 1


def decode(model, cache, ids, prompt=5):
    with torch.no_grad():
        outs = [model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)[0]]
        outs += [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)[0]
            for i in range(prompt, ids.shape[1])
        ]
    return torch.cat(outs, 1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_step_with_a_static_cache_is_one_run(name):
    model, backend = beside(int8(GRAPHS[name][0].build()))
    ids = torch.arange(24).view(2, 12) + 3
    cache = hf.StaticCache(config=model.config, max_cache_len=12)
    decode(model, cache, ids)
    assert [len(one._programs) for one in backend.runs][-1] == 1
    versions = [layer.keys._version for layer in cache.layers]
    for layer in cache.layers:
        layer.cumulative_length.fill_(11)
    with torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert all(layer.keys._version > before for layer, before in zip(cache.layers, versions, strict=True))


@pytest.fixture(scope="module")
def classifier():
    model, backend = beside(int8(CLASSIFIER.build()))
    inputs = {"input_ids": torch.arange(14).view(2, 7) + 3}
    settled(model, backend, inputs)
    return model, backend, inputs


def test_weights_that_are_written_to_are_read(classifier):
    model, backend, inputs = classifier
    before = run(model, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype is torch.int8:
                parameter.neg_()
    changed = settled(model, backend, inputs)
    assert not torch.equal(before, changed)


def test_weights_in_other_memory_are_read(classifier):
    model, backend, inputs = classifier
    before = settled(model, backend, inputs)
    for parameter in model.parameters():
        if parameter.dtype is torch.int8:
            parameter.data = -parameter.data
    assert not torch.equal(before, settled(model, backend, inputs))


def test_a_copy_shares_runs_and_no_weights(classifier):
    model, _, inputs = classifier
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dtype is torch.float32:
                parameter.mul_(0.5)
    for _ in range(4):
        assert not torch.equal(run(model, inputs), run(other, inputs))


def test_results_of_different_calls_have_memory_of_their_own(classifier):
    model, _, inputs = classifier
    first = run(model, inputs)
    kept = first.clone()
    run(model, {"input_ids": inputs["input_ids"].flip(1)})
    assert torch.equal(first, kept)


def test_other_lengths_paths_and_schemes_get_what_is_theirs(classifier):
    model, backend, inputs = classifier
    for length in (3, 7, 4):
        settled(model, backend, {"input_ids": torch.arange(2 * length).view(2, length) + 3})
    for path in choice.loaded.paths:
        with kernels.using(path):
            settled(model, backend, inputs)
    with kernels.using(activations="int12"):
        wide = settled(model, backend, inputs)
    with kernels.using(activations="int8"):
        assert not torch.equal(wide, settled(model, backend, inputs))


def test_sizes_that_no_node_names_are_told_apart():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 32)]
    model = dynamic_quantize(nn.Sequential(*layers).eval(), "int8", disable_defaults=["head", "small"])[0]
    torch.compiler.reset()
    backend = Beside()
    call = torch.compile(model, backend=backend)
    with torch.no_grad():
        for tokens in (5, 9, 5, 7):
            for _ in range(3):
                assert call(torch.randn(tokens, 64)).shape == (tokens, 32)
    # the second graph is for all lengths
    assert len(backend.runs) == 2 and len(backend.runs[1]._programs) >= 2


def test_gradients_go_the_way_of_torch(classifier):
    model, _, inputs = classifier
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    for _ in range(3):
        model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0


def test_threads_run_one_program_at_once(classifier):
    model, backend, inputs = classifier
    expected = settled(model, backend, inputs)
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(run(model, inputs), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_runs_keep_no_model_alive():
    model, backend = beside(int8(CLASSIFIER.build()))
    settled(model, backend, {"input_ids": torch.arange(14).view(2, 7) + 3})
    weights = [weakref.ref(p.untyped_storage()) for p in model.parameters() if p.dtype is torch.int8]
    torch.compiler.reset()
    del model
    gc.collect()
    assert backend.programs > 0
    assert all(weight() is None for weight in weights)
