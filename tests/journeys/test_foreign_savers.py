"""Converted weights in the hands of other libraries: whoever would fill a float model with codes stops with an error."""

import copy
import pickle

import accelerate
import diffusers
import diffusion
import pytest
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from models import FAMILIES, Cnn, gpt2, seeded, snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import mono_quant as mq
from mono_quant.convert.int8_layers import Int8Module, tensors_of
from mono_quant.errors import UnsupportedModelError


class Published(nn.Module, PyTorchModelHubMixin):
    """As huggingface_hub's guide tells people to write their models."""

    def __init__(self, size=64):
        super().__init__()
        self.a, self.conv, self.b = nn.Linear(size, 128), nn.Conv1d(16, 64, 8), nn.Linear(128, 100)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


MODELS = {
    "linear": lambda: seeded(Published),
    "convolutions": lambda: seeded(Cnn),
    "conv1d of gpt2": lambda: seeded(gpt2),
    "experts": FAMILIES["mixtral"].build,
    "attention": FAMILIES["encoder"].build,
    "recurrent": FAMILIES["lstm"].build,
    "diffusion": lambda: diffusion.build("dit"),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def converted(name):
    model = MODELS[name]().eval()
    return model, mq.dynamic_quantize(model)[0]


def load(model, state, **how):
    model.load_state_dict(state, strict=False, **how)


def through_a_pickle(model, state, folder):
    torch.save(state, folder / "model.pt")
    load(model, torch.load(folder / "model.pt", weights_only=True))


def write(state, folder):
    # tied tensors one by one
    save_file(
        {n: t.clone(memory_format=torch.contiguous_format) for n, t in state.items()},
        folder / "model.safetensors",
    )


def through_safetensors(model, state, folder):
    write(state, folder)
    safetensors.torch.load_model(model, folder / "model.safetensors", strict=False)


def through_accelerate(model, state, folder):
    write(state, folder)
    accelerate.load_checkpoint_in_model(model, folder)


ROADS = {
    "state dict": lambda model, state, folder: load(model, state),
    "assigned": lambda model, state, folder: load(model, state, assign=True),
    "assigned without gradients": lambda model, state, folder: load(
        model.requires_grad_(False), state, assign=True
    ),
    "torch.save": through_a_pickle,
    "safetensors": through_safetensors,
    "accelerate": through_accelerate,
}


@EVERY
@pytest.mark.parametrize("road", ROADS)
def test_a_float_model_is_never_filled_with_codes(name, road, tmp_path):
    model, result = converted(name)
    codes = {n for n, t in tensors_of(result).items() if t.dtype == torch.int8}
    assert codes
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|Trying to set a tensor of shape"):
        ROADS[road](model, result.state_dict(), tmp_path)
    assert all(t.is_floating_point() for n, t in model.state_dict().items() if n in codes)


@EVERY
def test_the_state_of_a_converted_model_fills_another_one_in_either_form(name):
    _, result = converted(name)
    expected = {n: t.clone() for n, t in tensors_of(result).items()}
    flat = {n: t.clone() for n, t in result.state_dict().items()}
    for assign, state in ((False, flat), (True, flat), (False, expected), (True, expected)):
        other = mq.dynamic_quantize(MODELS[name]())[0]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(state, assign=assign)
        assert all(torch.equal(t, expected[n]) for n, t in tensors_of(other).items())
    rows = {n: t for n, t in flat.items() if t.dtype == torch.int8}
    assert rows and all(t.dim() == 1 and t.numel() == expected[n].numel() for n, t in rows.items())


def test_flat_codes_lie_as_in_the_file_of_a_saved_model(tmp_path):
    result = mq.quantize(seeded(Cnn), fidelity=False)
    stored = load_file(result.save(tmp_path / "cnn") / "model.safetensors")
    state = result.model.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_a_model_runs_on_the_tensors_of_its_state_dict():
    for name, x in (("linear", torch.randn(3, 64)), ("convolutions", torch.randn(2, 3, 16, 16))):
        _, result = converted(name)
        assert torch.equal(functional_call(result, result.state_dict(), (x,)), result(x))


def test_the_form_of_a_state_dict_costs_no_copy_of_linear_codes():
    _, result = converted("experts")
    held = tensors_of(result)
    assert all(t.data_ptr() == held[n].data_ptr() for n, t in result.state_dict().items())


@pytest.mark.parametrize("save", ["save_pretrained", "push_to_hub"])
def test_a_class_that_publishes_itself_is_refused_before_anything_is_written(save, tmp_path):
    result = mq.quantize(MODELS["linear"]())
    holder = nn.ModuleDict({"inner": MODELS["linear"]()})
    for model in (
        result.model,
        copy.deepcopy(result.model),
        pickle.loads(pickle.dumps(result.model)),
        mq.load(result.save(tmp_path / "kept"), model=Published()),
        mq.dynamic_quantize(holder)[0]["inner"],
    ):
        with pytest.raises(
            UnsupportedModelError, match=rf"{save} of Published would write int8 codes.*load\(folder, model="
        ):
            getattr(model, save)(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]
    # float16 values are weights
    mq.dynamic_quantize(MODELS["linear"](), "fp16")[0].save_pretrained(tmp_path / "half")
    assert Published.from_pretrained(tmp_path / "half").a.weight.dtype == torch.float32


def test_a_diffusers_model_and_its_pipeline_save_what_save_writes(tmp_path):
    result = mq.quantize(diffusion.build("dit"))
    folder = result.save(tmp_path / "a")
    result.model.save_pretrained(tmp_path / "b")
    assert snapshot(tmp_path / "b") == snapshot(folder)
    loaded = mq.load(folder)
    loaded.save_pretrained(tmp_path / "c")
    assert snapshot(tmp_path / "c") == snapshot(folder)
    pipe = diffusers.DiTPipeline(result.model, diffusion.build("vae"), diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path / "pipe")
    assert snapshot(tmp_path / "pipe" / "transformer") == snapshot(folder)
    floats = loaded.dequantize()
    assert not any(isinstance(m, Int8Module) for m in floats.modules())
    assert type(floats.proj_out_1) is nn.Linear
    assert torch.equal(
        floats.transformer_blocks[0].attn1.to_q.weight, result.model.transformer_blocks[0].attn1.to_q.weight
    )
