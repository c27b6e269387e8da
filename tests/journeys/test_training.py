"""Training of a converted model: refused at the start where it would train next to nothing, open to adapters."""

import copy
import gc
import pickle
import weakref

import peft
import pytest
import torch
from models import FAMILIES, run
from torch import nn
from transformers import Trainer, TrainingArguments

import mono_quant
from mono_quant.errors import FrozenWeightError

# A model, and the layers that get adapters; the kinds of layers differ, and what stays float.
MODELS = {
    "llama": ["q_proj", "v_proj"],
    "llama_bf16": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
}
BOTH = pytest.mark.parametrize("dtype", ["int8", "fp16"])
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Rows(torch.utils.data.Dataset):
    """The rows of a family's inputs, with labels."""

    def __init__(self, name):
        inputs = FAMILIES[name].inputs()
        labels = torch.tensor([0, 2]) if name == "bert" else inputs["input_ids"]
        self.columns = {**inputs, "labels": labels}

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


def trainer(model, name, folder, **more):
    args = TrainingArguments(
        str(folder), max_steps=2, save_steps=2, learning_rate=0.1, logging_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip
    return Trainer(model, args, train_dataset=Rows(name))


def converted(name, dtype, **options):
    return mono_quant.quantize(FAMILIES[name].build(), dtype, fidelity=False, **options)


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "int8"), ("bert", "fp16"), ("gpt2", "int8"), ("llama_bf16", "fp16")]
)
def test_trainer_refuses_a_converted_model_at_the_start(name, dtype, tmp_path):
    result = converted(name, dtype)
    made = {
        "in memory": result.model,
        "loaded": mono_quant.load(result.save(tmp_path / "model")),
        "copied": copy.deepcopy(result.model),
        "pickled": pickle.loads(pickle.dumps(result.model)),
    }
    for how, model in made.items():
        counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
        free, whole = sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
        assert 0 < free < whole, how
        with pytest.raises(FrozenWeightError, match=f"only {free:,} of its {whole:,} parameters.*LoRA"):
            trainer(model, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "dtype", "keep"),
    [
        ("bert", "int8", True),
        ("llama", "int8", False),
        ("llama_bf16", "fp16", False),
        ("gpt2", "int8", False),
    ],
)
def test_adapters_are_trained_saved_and_come_back(name, dtype, keep, tmp_path):
    names = MODELS[name]
    result = converted(name, dtype, skip=names if keep else ())
    folder = result.save(tmp_path / "model")
    model, before = result.model, {k: v.clone() for k, v in result.model.state_dict().items()}
    model.add_adapter(peft.LoraConfig(target_modules=names, r=2))
    trainer(model, name, tmp_path / "out").train()
    after = model.state_dict()
    adapters = {k: v for k, v in after.items() if "lora_" in k}
    assert adapters and any((v != 0).any() for k, v in adapters.items() if "lora_B" in k)
    held = {k.replace(".base_layer", ""): v for k, v in after.items() if k not in adapters}
    assert held.keys() == before.keys() and all(torch.equal(held[k], v) for k, v in before.items())
    files = {p.name for p in (tmp_path / "out" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    again = mono_quant.load(folder)
    again.load_adapter(str(tmp_path / "out" / "checkpoint-2"))
    inputs = FAMILIES[name].inputs()
    model.eval()
    assert torch.equal(run(again.eval(), inputs), run(model, inputs))


@pytest.mark.parametrize(("kind", "dtype"), [("lora", "fp16"), ("lora", "int8"), ("prompt", "int8")])
def test_a_peft_model_around_a_converted_one_is_trained(kind, dtype, tmp_path):
    if kind == "lora":
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    else:
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(converted("llama", dtype).model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer(model, "llama", tmp_path).train()
    now = dict(model.named_parameters())
    assert any(not torch.equal(now[n], p) for n, p in before.items())


@BOTH
def test_a_frozen_model_is_evaluated_by_trainer(dtype, tmp_path):
    model = converted("bert", dtype).model
    model.requires_grad_(False)
    with torch.no_grad():
        expected = model(**Rows("bert").columns).loss
    metrics = trainer(model, "bert", tmp_path).evaluate(Rows("bert"))
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


@BOTH
def test_trainer_refuses_a_converted_sentence_transformer(minilm, dtype, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    result = mono_quant.quantize(model, dtype, fidelity=False)
    made = result.model if dtype == "fp16" else mono_quant.load(result.save(tmp_path / "model"))
    with pytest.raises(FrozenWeightError, match=r"SentenceTransformer holds .*LoRA"):
        trainer(made, "bert", tmp_path / "out")
    made.add_adapter(peft.LoraConfig(target_modules=["query", "value"], r=2))
    assert any(p.requires_grad for p in trainer(made, "bert", tmp_path / "out").model.parameters())


@BOTH
def test_the_mark_does_not_keep_a_model_alive(dtype):
    model = converted("llama", dtype).model
    found = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert found() is None
    finally:
        gc.enable()


def test_a_float16_weight_that_is_to_be_trained_says_so_at_the_first_step():
    model, _ = mono_quant.dynamic_quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "fp16")
    model.requires_grad_(True)
    with pytest.raises(FrozenWeightError, match="float16 layer requires gradients"):
        model(torch.randn(2, 64)).sum().backward()
    model.requires_grad_(False)
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(("name", "dtype"), [("qwen3_moe", "int8"), ("llama", "fp16")])
def test_nothing_of_a_stored_weight_asks_for_gradients_after_loading(name, dtype, tmp_path):
    model = mono_quant.load(converted(name, dtype).save(tmp_path / "model"))
    free = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.endswith("_scale") for n in free)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in free)
