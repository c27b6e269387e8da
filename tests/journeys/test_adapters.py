"""PEFT's adapters on converted layers: found, trained with the right gradients, saved, loaded, merged; or refused."""

import copy

import peft
import pytest
import torch
from models import FAMILIES, Family, relative_error, run
from torch import nn

import mono_quant
from mono_quant.convert.int8_layers import Int8Module
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import AdapterAttachedError, Fp16RangeError, FrozenWeightError, NonFiniteWeightError
from mono_quant.hf import adapters
from mono_quant.kernels.weights import dequantize_rows
from mono_quant.planning.kinds import as_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
# PEFT names experts by the pattern of an older transformers
MOE = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)
ALL = {"target_modules": "all-linear"}
CONVS = {"target_modules": ["0", "2"]}
MODELS = {
    **FAMILIES,
    "conv2d": Family(
        lambda: nn.Sequential(nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(48, 32, 3)),
        lambda: {"input": torch.randn(2, 32, 9, 8)},
    ),
    "conv1d": Family(
        lambda: nn.Sequential(nn.Conv1d(64, 48, 3, padding=1), nn.ReLU(), nn.Conv1d(48, 64, 2)),
        lambda: {"input": torch.randn(2, 64, 9)},
    ),
}
BOTH = pytest.mark.parametrize("dtype", ["int8", "fp16"])


def converted(name, dtype="int8", **options):
    return mono_quant.quantize(MODELS[name].build(), dtype, fidelity=False, **options)


def disturb(model):
    """Give the adapters values that matter, the same for every model that has the same ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def adapted(model, config=None, **options):
    config = config or peft.LoraConfig(r=4, **(options or ALL))
    model = peft.get_peft_model(model, copy.deepcopy(config)).eval()
    disturb(model)
    return model


def stored(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, StoredModule)}


def float_twin(name, model, *, exact=True):
    """The float model with the weights that the converted one stands for.

    With `exact` its layers also give the values that the converted ones give, so that all later activations are the same; their
    gradients stay their own.
    """
    twin = MODELS[name].build().float()
    for path, layer in stored(model).items():
        module = twin.get_submodule(path)
        with torch.no_grad():
            for held in layer.held:
                module.get_parameter(held).copy_(getattr(layer, held))
        if exact:
            module.register_forward_hook(
                lambda _, args, out, layer=layer: out + (layer(*args) - out).detach()
            )
    return twin


def gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs)
    (out if isinstance(out, torch.Tensor) else out.logits).float().square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def take_adapters(model, other):
    names = {n for n, p in other.named_parameters() if p.requires_grad}
    model.load_state_dict({n: v.float() for n, v in other.state_dict().items() if n in names}, strict=False)


# Found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "mixtral"])
@BOTH
@MOE
def test_all_linear_names_the_layers_that_it_names_in_the_float_model(name, dtype):
    options = {"task_type": "SEQ_CLS"} if name in ("bert", "vit") else {}
    found = [
        peft.get_peft_model(model, peft.LoraConfig(**ALL, **options))
        for model in (MODELS[name].build(), converted(name, dtype).model)
    ]
    modules, parameters = (
        [sorted(getattr(model, attribute)) for model in found]
        for attribute in ("targeted_module_names", "targeted_parameter_names")
    )
    assert modules[0] and modules[0] == modules[1] and parameters[0] == parameters[1]
    assert bool(parameters[0]) == (name == "mixtral")


def test_adapters_go_on_through_transformers_and_on_a_plain_module_too():
    model = converted("llama").model
    model.add_adapter(peft.LoraConfig(**ALL))
    assert sum(isinstance(m, peft.tuners.lora.Linear) for m in model.modules()) == 14
    plain, _ = mono_quant.dynamic_quantize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    model = adapted(plain, target_modules=["0", "2"])
    before = run(model.base_model.model, {"input": torch.ones(1, 64)})
    assert torch.isfinite(before).all()


def test_peft_is_taught_once():
    before = vars(peft.LoraModel)["_create_new_module"]
    adapters.register()
    assert vars(peft.LoraModel)["_create_new_module"] is before


def test_a_weight_is_made_few_times_while_adapters_are_attached(monkeypatch):
    made, dequantize = [], Int8Module.dequantize
    monkeypatch.setattr(
        Int8Module, "dequantize", lambda self, name="weight": made.append(name) or dequantize(self, name)
    )
    peft.get_peft_model(converted("llama").model, peft.LoraConfig(target_modules=["up_proj"]))
    assert len(made) <= 2 * 3


# Trained

GRADIENTS = {
    "llama": ("int8", ALL),
    "gpt2": ("int8", ALL),
    "bert": ("int8", {"target_modules": ["query", "dense"], "bias": "all"}),
    "vit": ("int8", {**ALL, "use_dora": True}),
    "conv2d": ("int8", CONVS),
    "conv1d": ("int8", CONVS),
    "t5": ("int8", ALL),
    "llama_tied": ("fp16", ALL),
    "mixtral": ("fp16", ALL),
}


@pytest.mark.parametrize("name", GRADIENTS)
@MOE
def test_gradients_are_those_of_the_dequantized_model(name):
    dtype, options = GRADIENTS[name]
    result, inputs = converted(name, dtype), MODELS[name].inputs()
    twin = float_twin(name, result.model, exact=dtype == "int8")
    model = adapted(result.model, **options)
    twin = adapted(twin, **options)
    take_adapters(twin, model)
    found, expected = gradients(model, inputs), gradients(twin, inputs)
    assert found.keys() == expected.keys() and found
    for key, gradient in expected.items():
        assert gradient.norm() > 0 and relative_error(gradient, found[key]) < 1e-3, key


def test_a_converted_llama_learns_with_lora_as_the_float_one_does():
    inputs, base = MODELS["llama"].inputs(), MODELS["llama"].build()
    with torch.no_grad():
        # the head stays as it is: one as small as at the start of training would bound what can be learnt
        base.lm_head.weight *= 10
    losses = []
    for model in (copy.deepcopy(base), mono_quant.quantize(base, fidelity=False).model):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, **ALL))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses.append([])
        for _ in range(30):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    floats, ours = losses
    fall = floats[0] - floats[-1]
    assert fall > 0.5 * floats[0]
    # at every step as far down as the float one, within a twentieth of the way
    assert max(abs(a - b) for a, b in zip(floats, ours, strict=True)) < 0.05 * fall


@pytest.mark.parametrize(("name", "dtype"), [("llama", "int8"), ("llama_bf16", "int8"), ("llama", "fp16")])
@pytest.mark.parametrize("reentrant", [True, False])
def test_it_trains_prepared_for_kbit_training_and_with_checkpointing(name, dtype, reentrant):
    base = peft.prepare_model_for_kbit_training(converted(name, dtype).model)
    assert not any(p.requires_grad for p in base.parameters())
    model, inputs = adapted(base, **ALL).train(), MODELS[name].inputs()
    plain = gradients(model, inputs)
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saved = gradients(model, inputs)
    assert all(torch.equal(plain[n], g) and g.norm() > 0 for n, g in saved.items())


# Saved and loaded


@pytest.mark.parametrize(("name", "dtype"), [("llama", "int8"), ("llama", "fp16"), ("gpt2", "int8")])
def test_an_adapter_goes_to_a_fresh_converted_model_and_to_the_float_one(name, dtype, tmp_path):
    result, inputs = converted(name, dtype), MODELS[name].inputs()
    folder, twin = result.save(tmp_path / "model"), float_twin(name, result.model)
    model = adapted(result.model)
    model.save_pretrained(tmp_path / "adapter")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    before = run(model, inputs)
    fresh = peft.PeftModel.from_pretrained(mono_quant.load(folder), tmp_path / "adapter")
    assert torch.equal(run(fresh, inputs), before)
    twin = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    # the hooks of the twin give the values that the converted layers give
    assert relative_error(run(twin, inputs), before) < 1e-5
    through_transformers = mono_quant.load(folder)
    through_transformers.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(run(through_transformers, inputs), before)


@BOTH
def test_a_model_with_adapters_is_not_saved_as_one_without(dtype, tmp_path):
    result = converted("llama", dtype)
    model = adapted(result.model)
    for refused in (lambda: result.save(tmp_path / "model"), result.model.dequantize):
        with pytest.raises(AdapterAttachedError, match=r"q_proj \(Linear\).*merge_and_unload"):
            refused()
    with pytest.raises(AdapterAttachedError):
        mono_quant.quantize(model)
    assert not (tmp_path / "model").exists()
    merged = model.merge_and_unload()
    again = mono_quant.load(result.save(tmp_path / "model"))
    assert torch.equal(run(again, MODELS["llama"].inputs()), run(merged, MODELS["llama"].inputs()))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "adapters were merged into 14 of its weights after the conversion" in card and "SQNR" not in card


# Merged

MERGED = {
    "linear": ("llama", "int8", ALL, {}),
    "linear fp16": ("llama", "fp16", ALL, {}),
    "bf16": ("llama_bf16", "int8", ALL, {}),
    "dora": ("llama", "int8", {"target_modules": ["q_proj"], "use_dora": True}, {}),
    "transposed": ("gpt2", "int8", ALL, {}),
    "transposed fp16": ("gpt2", "fp16", ALL, {}),
    "bias": ("bert", "int8", {"target_modules": ["query"], "lora_bias": True}, {}),
    "embedding": ("llama", "int8", {"target_modules": ["embed_tokens"]}, {"embeddings": True}),
    "conv2d": ("conv2d", "int8", CONVS, {}),
    "conv1d": ("conv1d", "int8", CONVS, {}),
    "experts": (
        "mixtral",
        "int8",
        {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
        {},
    ),
    "experts fp16": ("mixtral", "fp16", {"target_modules": [], "target_parameters": ["down_proj"]}, {}),
}


def deltas(model):
    """What the adapters add to each stored weight, as PEFT says, and the weight."""
    for layer in model.modules():
        base = layer.get_base_layer() if isinstance(layer, peft.tuners.lora.LoraLayer) else None
        if isinstance(base, StoredModule):
            name = getattr(layer, "parameter_name", "weight")
            yield base, name, base.read(name).float().clone(), layer.get_delta_weight("default").float()


@pytest.mark.parametrize("case", MERGED)
def test_a_merged_weight_is_the_sum_within_half_a_step_and_comes_apart_bit_for_bit(case):
    name, dtype, options, conversion = MERGED[case]
    inputs = MODELS[name].inputs()
    model = adapted(converted(name, dtype, **conversion).model, **options)
    sums = [] if "dora" in case else list(deltas(model))
    state, before = {n: t.clone() for n, t in model.state_dict().items()}, run(model, inputs)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        for base, held, weight, delta in sums:
            exact = (weight + delta).double()
            if dtype == "int8":
                rows = dequantize_rows(
                    base.codes(held).flatten(0, -2), base.scale(held).flatten(0, -2), torch.float64
                )
                step = as_rows(exact, base.kind).abs().amax(-1, keepdim=True) / 127
                assert ((rows - as_rows(exact, base.kind)).abs() <= step * 0.5001).all()
            else:
                assert ((base.stored(held).double() - exact).abs() <= exact.abs() * 2**-11 + 2**-25).all()
        assert relative_error(before, run(model, inputs)) < (0.03 if dtype == "int8" else 2e-3)
        model.unmerge_adapter()
        assert all(
            torch.equal(t, state[n])
            for n, t in model.state_dict().items()
            if "base_layer" in n or "lora" in n
        )
        assert torch.equal(run(model, inputs), before)
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():
        assert (
            relative_error(run(converted(name, dtype, **conversion).model, inputs), run(model, inputs)) < 1e-6
        )
    merged = model.merge_and_unload()
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in merged.modules())
    assert relative_error(before, run(merged, inputs)) < (0.03 if dtype == "int8" else 2e-3)
    assert len(stored(merged)) == len(stored(converted(name, dtype, **conversion).model))


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_adapters_that_are_merged_one_by_one_are_rounded_once():
    one, other = (peft.LoraConfig(r=4, init_lora_weights=False, **ALL) for _ in range(2))
    result = converted("llama")
    model = peft.get_peft_model(result.model, one).eval()
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["default", "other"])
    together = {n: t.clone() for n, t in model.state_dict().items()}
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert all(torch.equal(t, together[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "value", "error"), [
    ("int8", float("nan"), NonFiniteWeightError),
    ("fp16", float("nan"), NonFiniteWeightError),
    ("fp16", 1e6, Fp16RangeError),
])  # fmt: skip
def test_an_adapter_that_cannot_be_merged_changes_nothing(dtype, value, error):
    model = adapted(converted("llama", dtype).model, target_modules=["q_proj"])
    before = {n: t.clone() for n, t in model.state_dict().items() if "lora" not in n}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(value)
    with pytest.raises(error):
        model.merge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    assert not any(m.merged for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_embeddings_that_are_one_stay_one_when_adapters_are_merged(name, tmp_path):
    result = converted(name, "fp16")
    merged = adapted(result.model).merge_and_unload()
    assert merged.config.tie_word_embeddings
    again = mono_quant.load(result.save(tmp_path / "model"))
    assert torch.equal(run(again, MODELS[name].inputs()), run(merged, MODELS[name].inputs()))


def test_a_copy_of_a_merged_model_comes_apart_by_itself():
    model, inputs = adapted(converted("llama").model), MODELS["llama"].inputs()
    before = run(model, inputs)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(run(twin, inputs), before)
    assert not torch.equal(run(model, inputs), before)


# Other adapters


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig, peft.LoKrConfig, peft.VeraConfig, peft.HRAConfig, peft.AdaLoraConfig,
        lambda **names: peft.OFTConfig(oft_block_size=4, **names),
        lambda **names: peft.IA3Config(feedforward_modules=["down_proj"], **names),
    ],
    ids=["loha", "lokr", "vera", "hra", "adalora", "oft", "ia3"],
)  # fmt: skip
def test_other_adapters_train_and_are_merged_in_float_alone(config):
    config = config(
        target_modules=["q_proj", "down_proj"], **({"total_step": 9} if config is peft.AdaLoraConfig else {})
    )
    result, inputs = converted("llama"), MODELS["llama"].inputs()
    twin = float_twin("llama", result.model)
    torch.manual_seed(0)
    model = adapted(result.model, config)
    torch.manual_seed(0)
    twin = adapted(twin, config)
    take_adapters(twin, model)
    assert relative_error(run(twin, inputs), run(model, inputs)) < 1e-5
    found, expected = gradients(model, inputs), gradients(twin, inputs)
    assert all(relative_error(g, found[n]) < 1e-3 for n, g in expected.items() if g is not None)
    codes = {n: t.clone() for n, t in model.state_dict().items() if t.dtype == torch.int8}
    with pytest.raises(FrozenWeightError, match="int8 codes"):
        model.merge_and_unload()
    assert all(torch.equal(t, codes[n]) for n, t in model.state_dict().items() if n in codes)


@BOTH
def test_what_adapters_cannot_do_is_said(dtype):
    for options, match in (
        ({"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]}, "target_modules"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "would be lost"),
    ):
        with pytest.raises(FrozenWeightError, match=match):
            peft.get_peft_model(converted("llama", dtype).model, peft.LoraConfig(**options))
    with pytest.raises(ValueError, match=r"(?s)MultiheadAttention.* is not supported"):
        peft.get_peft_model(converted("attention", dtype).model, peft.LoraConfig(target_modules=["mha"]))
    with pytest.raises(FrozenWeightError, match=r"cannot be trained.*skip="):
        converted("llama", dtype).model.model.layers[0].mlp.up_proj.requires_grad_()
