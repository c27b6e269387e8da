"""Features that were made apart, used together; the oracle is the float model of the same weights, or the same thing done apart."""

import copy

import diffusers
import diffusion
import peft
import pytest
import sentence_transformers as st
import torch
from encoders import ENCODERS, answers
from models import FAMILIES, relative_error, run, seeded
from torch import nn

import mono_quant as mq
from mono_quant.errors import AdapterAttachedError, FrozenWeightError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
HALVES = [{"kept": "fp16"}, {"kept": "bf16"}, {"dtype": "fp16"}]
OPTIONS = [{"embeddings": True}, {"embeddings": True, "kept": "fp16"}, *HALVES]


def converted(name, dtype="int8", **options):
    return mq.quantize(FAMILIES[name].build(), dtype, fidelity=False, **options).model


def label(options):
    return ", ".join(map(str, options.values()))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of an encoder with modules behind its transformer that have weights: no dtype but theirs will do."""
    folder = tmp_path_factory.mktemp("encoder") / "float"
    seeded(ENCODERS["dense"]).save_pretrained(str(folder))
    return folder


@pytest.mark.filterwarnings("ignore:.*loaded in torch.float16:UserWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_modules_behind_a_converted_transformer_keep_the_dtype_that_it_computes_in(
    encoder, tmp_path, options
):
    """sentence-transformers takes the dtype of the first parameter, which may be that of codes, for all of them."""
    result = mq.quantize(encoder, fidelity=False, **options)
    expected = answers(result.model)
    config = mq.MonoQuantConfig(**options)
    on_load = st.SentenceTransformer(str(encoder), device="cpu", model_kwargs={"quantization_config": config})
    around = st.SentenceTransformer(modules=list(copy.deepcopy(result.model)), device="cpu")
    found = [on_load, around]
    if "dtype" not in options:
        result.save(tmp_path / "saved")
        with mq.enable():
            found.append(st.SentenceTransformer(str(tmp_path / "saved"), device="cpu"))
    for model in found:
        assert {p.dtype for module in list(model)[1:] for p in module.parameters()} == {torch.float32}
        assert torch.equal(answers(model), expected)


def test_placing_an_encoder_does_not_cast_its_modules_to_the_dtype_of_codes(encoder):
    options = {"quantization_config": mq.MonoQuantConfig(embeddings=True), "device_map": "cpu"}
    model = st.SentenceTransformer(str(encoder), model_kwargs=options)
    assert {p.dtype for module in list(model)[1:] for p in module.parameters()} == {torch.float32}
    expected = answers(mq.quantize(encoder, embeddings=True, fidelity=False).model)
    assert torch.equal(answers(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"dtype": "fp16"}], ids=label)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral"])
def test_a_model_that_becomes_float_in_another_dtype_is_that_of_transformers_in_it(name, options, dtype):
    model = converted(name, **options)
    wide = copy.deepcopy(model).dequantize().state_dict()
    back = model.dequantize(dtype)
    run(back, FAMILIES[name].inputs())
    # of T5, one of the matrices has to stay in float32 beside float16
    stays = {n for n in wide if name == "t5" and n.endswith("wo.weight") and dtype == torch.float16}
    for key, tensor in back.state_dict().items():
        assert torch.equal(tensor, wide[key] if key in stays else wide[key].to(dtype)), key


def test_a_float16_model_of_a_bfloat16_one_becomes_one_float_model():
    model = converted("llama_bf16", "fp16")
    expected = run(model, FAMILIES["llama_bf16"].inputs())
    back = model.dequantize()
    # in the one that a float16 model computes in, so that nothing is rounded a second time
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert relative_error(expected, run(back, FAMILIES["llama_bf16"].inputs())) < 1e-5


@pytest.mark.parametrize("options", HALVES, ids=label)
def test_a_table_in_half_precision_is_not_trained(options):
    """Steps of its own precision are NaN in float16, and none at all in bfloat16."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = peft.get_peft_model(converted("llama", **options), config)
    inputs = FAMILIES["llama"].inputs()
    with pytest.raises(FrozenWeightError, match="layer requires gradients"):
        model(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize("options", [{"embeddings": True}, *HALVES], ids=label)
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5"])
def test_weights_that_are_tied_stay_so(name, options):
    model = converted(name, **options)
    before = run(model, FAMILIES[name].inputs())
    model.tie_weights()
    assert torch.equal(run(model, FAMILIES[name].inputs()), before)


def test_a_converted_layer_is_tied_to_nothing_else():
    model = converted("llama", embeddings=True)
    model.config.tie_word_embeddings = True
    with pytest.raises(FrozenWeightError, match=r"lm_head\.weight cannot be tied to model\.embed"):
        model.tie_weights()


@pytest.mark.parametrize("way", ["on load", "afterwards"])
def test_a_diffusion_model_with_adapters_is_not_saved_as_codes_that_load_as_weights(tmp_path, way):
    unet = diffusion.build("unet")
    unet.save_pretrained(tmp_path / "float")
    if way == "on load":
        config = mq.MonoQuantConfig()
        model = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "float", quantization_config=config)
    else:
        model = mq.quantize(unet, fidelity=False).model
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for save in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(AdapterAttachedError, match="save_lora_adapter"):
            save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    model.save_lora_adapter(tmp_path / "adapter")
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["pytorch_lora_weights.safetensors"]


class Spoken(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.lstm, self.out = nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 100)

    def forward(self, x):
        return self.out(self.lstm(self.conv(x.mT).mT)[0])


def test_adapters_around_an_int8_lstm_train_and_merge_and_leave_it_alone():
    model, x = mq.quantize(seeded(Spoken), fidelity=False).model, seeded(lambda: torch.randn(3, 6, 64))
    before = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("lstm.")}
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["conv", "out"], init_lora_weights=False)
    )
    adapted(x).square().mean().backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert gradients
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())
    adapted.eval()
    expected = adapted(x)
    merged = adapted.merge_and_unload()
    assert relative_error(expected, merged(x)) < 0.02
    after = merged.state_dict()
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items())
    with pytest.raises(RuntimeError, match=r"size mismatch for lstm\.weight_hh_l0"):
        Spoken().load_state_dict(after, strict=False)
