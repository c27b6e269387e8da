"""Which attention a model of transformers runs: ours in converted layers, whatever becomes of the model; torch's elsewhere."""

import copy
import io
import json
import pickle
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from models import FAMILIES, relative_error, run, seeded, tiny_llama, transformer
from native import native_only
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import mono_quant
from mono_quant import kernels
from mono_quant.convert.forwards import AttentionForward
from mono_quant.hf import attention

pytestmark = native_only
# Layers that attend by the interface.
LAYERS = {"bert": 2, "llama": 2, "llama_bf16": 2, "gpt2": 2, "t5": 6, "vit": 2, "whisper": 6, "qwen3_moe": 2}


@pytest.fixture(autouse=True)
def _native():
    with kernels.using():
        yield


@contextmanager
def counted(monkeypatch):
    """Count the calls that our kernel answers."""
    answers = []

    def attend(*args, **options):
        out = ask(*args, **options)
        answers.append(out is not None)
        return out

    ask = kernels.try_attention
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "try_attention", attend)
        yield answers


@contextmanager
def torchs():
    """Let transformers have its own function back."""
    ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", ours.__wrapped__)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", ours)


def int8(model, **options):
    return mono_quant.dynamic_quantize(model, fidelity=False, **options)[0]


def gemma3():
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "max_position_embeddings": 64}
    kinds = ["sliding_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**transformer, **sizes, layer_types=kinds))


def qwen2():
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**transformer, num_key_value_heads=2))


def clip():
    sizes = {k: v for k, v in transformer.items() if k != "vocab_size"}
    text = {**sizes, "vocab_size": 200, "max_position_embeddings": 16, "eos_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


@pytest.mark.parametrize("family", LAYERS)
def test_converted_models_attend_by_our_kernel(family, monkeypatch):
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    converted = int8(model)
    with counted(monkeypatch) as answers:
        found = run(converted, inputs)
        assert answers == [True] * LAYERS[family]
        run(model, inputs)
        # the float one is not ours to change
        assert len(answers) == LAYERS[family]
    # by a last bit another code may be the nearest
    with torchs():
        assert relative_error(run(converted, inputs), found) < 0.01


@pytest.mark.parametrize("family", ["llama", "whisper"])
def test_float16_models_do_too(family, monkeypatch):
    model = mono_quant.dynamic_quantize(FAMILIES[family].build(), "fp16", fidelity=False)[0]
    with counted(monkeypatch) as answers:
        run(model, FAMILIES[family].inputs())
    assert answers == [True] * LAYERS[family]


def test_every_part_of_a_model_of_several(monkeypatch):
    model = int8(seeded(clip).eval())
    inputs = {"input_ids": torch.randint(3, 200, (2, 7)), "pixel_values": torch.randn(2, 3, 32, 32)}
    with counted(monkeypatch) as answers, torch.inference_mode():
        found = model(**inputs).logits_per_image
    assert answers == [True] * 4
    with torchs(), torch.inference_mode():
        torch.testing.assert_close(found, model(**inputs).logits_per_image, rtol=1e-2, atol=1e-2)


def test_who_chose_another_implementation_keeps_it(monkeypatch):
    inputs = FAMILIES["bert"].inputs()
    model = int8(FAMILIES["bert"].build())
    expected = run(model, inputs)
    model.set_attn_implementation("eager")
    with counted(monkeypatch) as answers, torch.inference_mode():
        out = model(**inputs, output_attentions=True)
        assert answers == []
        assert [a.shape for a in out.attentions] == [(2, 4, 7, 7)] * 2
        torch.testing.assert_close(out.logits, expected, rtol=2e-2, atol=2e-2)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(**inputs).logits, expected)
    chosen = int8(hf.BertModel._from_config(hf.BertConfig(**transformer), attn_implementation="eager").eval())
    with counted(monkeypatch) as answers, torch.inference_mode():
        chosen(input_ids=inputs["input_ids"])
    assert answers == []


def test_asking_for_attentions_is_answered_as_before():
    inputs = FAMILIES["bert"].inputs()
    model = FAMILIES["bert"].build()
    converted = int8(model)
    with torch.inference_mode():
        before, after = (m(**inputs, output_attentions=True) for m in (model, converted))
    assert type(before.attentions) is type(after.attentions)
    assert len(before.attentions) == len(after.attentions)
    assert [None if a is None else a.shape for a in before.attentions] == [
        None if a is None else a.shape for a in after.attentions
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_of_it_is_in_files_configs_or_states(family, tmp_path):
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    before = model.config.to_json_string()
    result = mono_quant.quantize(model, fidelity=False)
    assert result.model.config.to_json_string() == before
    assert result.model.config._attn_implementation == "sdpa"
    result.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not [key for key in saved if "attn_implementation" in key]
    assert not [key for key in result.model.state_dict() if "attn_impl" in key]
    loaded = mono_quant.load(tmp_path / "saved")
    assert torch.equal(run(loaded, inputs), run(result.model, inputs))


def test_it_goes_with_the_layers(monkeypatch):
    inputs = FAMILIES["llama"].inputs()
    model = int8(FAMILIES["llama"].build())
    expected = run(model, inputs)
    stream = io.BytesIO()
    torch.save(model, stream)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(stream.getvalue()), weights_only=False),
    ]
    for twin in copies:
        with counted(monkeypatch) as answers:
            assert torch.equal(run(twin, inputs), expected)
        assert answers == [True, True]
    floats = model.dequantize()
    with counted(monkeypatch) as answers:
        run(floats, inputs)
    assert answers == []


def test_training_is_torchs(monkeypatch):
    model = int8(tiny_llama(attention_dropout=0.5))
    ids = torch.randint(3, 200, (2, 7))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with counted(monkeypatch) as answers:
        model.train()
        model(inputs_embeds=embedded).logits.sum().backward()
        assert answers == []
        dropped, again = (model(input_ids=ids).logits for _ in range(2))
        assert not torch.equal(dropped, again)
        model.eval()
        model(inputs_embeds=embedded).logits.sum().backward()
    # in evaluation it was asked, and left gradients to torch
    assert answers == [False] * 2
    assert embedded.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_no_hindrance(monkeypatch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        int8(tiny_llama()), peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    inputs = FAMILIES["llama"].inputs()
    with counted(monkeypatch) as answers, torch.no_grad():
        model(**inputs)
    assert answers == [True, True]
    with counted(monkeypatch) as answers:
        model(**inputs).logits.sum().backward()
    assert answers == [False, False]


@pytest.mark.parametrize("make", [tiny_llama, gemma3, qwen2])
def test_any_cache_gives_the_same_tokens(make, monkeypatch):
    # "auto" gives the tokens of a step more bits
    model = int8(seeded(make).eval(), activations="int8-g128")
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    inputs = {"input_ids": torch.randint(3, 200, (2, 11)), "attention_mask": mask}
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with counted(monkeypatch) as answers:
        dynamic = model.generate(**inputs, **how)
    assert answers == [True] * 24
    with torchs():
        assert torch.equal(model.generate(**inputs, **how), dynamic)
    static = model.generate(**inputs, **how, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, dynamic)
    assert torch.equal(model.generate(**inputs, **how, use_cache=False), dynamic)


def test_a_token_has_the_same_bits_in_a_prefill_and_in_a_step():
    # "auto" gives the tokens of a step more bits
    model = int8(tiny_llama(), activations="int8-g128").model
    ids = torch.randint(3, 200, (1, 300))
    with torch.inference_mode():
        whole = model(ids).last_hidden_state
        first = model(ids[:, :297], use_cache=True)
        assert torch.equal(first.last_hidden_state, whole[:, :297])
        cache = first.past_key_values
        for at in range(297, 300):
            step = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            assert torch.equal(step.last_hidden_state, whole[:, at : at + 1]), at


def test_a_compiler_makes_one_graph_of_it():
    model, inputs = int8(FAMILIES["bert"].build()), FAMILIES["bert"].inputs()
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    expected = run(model, inputs)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(run(compiled, inputs), expected)
    assert seen.count("mono_quant.attention") == 2


def test_somebody_elses_attention_stays():
    def theirs(*_, **__):
        raise AssertionError

    with torchs():
        AttentionInterface.register("sdpa", theirs)
        attention.wrap_()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    attention.wrap_()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrapped


def test_multi_head_attention_of_torch_uses_it(monkeypatch):
    family = FAMILIES["encoder"]
    model = family.build()
    converted = int8(model)
    assert any(isinstance(m, AttentionForward) for m in converted.modules())
    calls = []
    attend = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    found = run(converted, family.inputs())
    assert len(calls) == 2
    assert relative_error(run(model, family.inputs()), found) < 0.05
