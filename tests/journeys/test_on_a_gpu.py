"""The same lives on a GPU, where there is one: codes made there are the CPU's, and every way to get a model there works."""

import copy

import pytest
import torch
from models import FAMILIES, relative_error, snapshot

import mono_quant as mq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
NAMES = ["bert", "gpt2", "llama", "llama_bf16", "mixtral"]


@pytest.fixture(params=NAMES)
def life(request, tmp_path):
    """Class, folder of the float model, the converted one on the CPU, and inputs."""
    model = FAMILIES[request.param].build()
    model.save_pretrained(tmp_path / "float")
    cpu = type(model).from_pretrained(tmp_path / "float", quantization_config=mq.MonoQuantConfig())
    cpu.save_pretrained(tmp_path / "int8")
    return type(model), tmp_path, cpu, FAMILIES[request.param].inputs()


def logits(model, inputs):
    place = next(p.device for p in model.parameters() if not p.is_meta)
    with torch.inference_mode():
        return model(**{k: v.to(place) for k, v in inputs.items()}).logits.float().cpu()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].cpu(), b[n].cpu()) for n in a
    )


def test_codes_and_scales_made_on_a_gpu_are_the_cpus(life):
    cls, folder, cpu, inputs = life
    config = {"quantization_config": mq.MonoQuantConfig()}
    gpu = cls.from_pretrained(folder / "float", **config, device_map="cuda")
    assert {p.device.type for p in gpu.parameters()} == {"cuda"}
    assert same(cpu, gpu)
    assert relative_error(logits(cpu, inputs), logits(gpu, inputs)) < 1e-2
    gpu.save_pretrained(folder / "again")
    assert snapshot(folder / "again") == snapshot(folder / "int8")
    assert {p.device.type for p in copy.deepcopy(gpu).dequantize().parameters()} == {"cuda"}


@pytest.mark.parametrize(
    "place", [{"device": "cuda"}, {"device_map": "cuda"}, {"device_map": "auto"}], ids=str
)
def test_every_way_onto_a_gpu(place, life):
    _, folder, cpu, inputs = life
    model = mq.load(folder / "int8", **place)
    assert {p.device.type for p in model.parameters()} == {"cuda"} and same(cpu, model)
    assert relative_error(logits(cpu, inputs), logits(model, inputs)) < 1e-2


def test_a_checkpoint_that_stays_int8_goes_onto_a_gpu(life):
    cls, folder, cpu, _ = life
    with mq.enable():
        assert same(cpu, cls.from_pretrained(folder / "int8", device_map="cuda"))


def test_a_model_may_lie_on_both(life):
    cls, folder, cpu, inputs = life
    place = {name: "cpu" if i else 0 for i, (name, _) in enumerate(cpu.named_children())}
    model = cls.from_pretrained(folder / "float", quantization_config=mq.MonoQuantConfig(), device_map=place)
    assert relative_error(logits(cpu, inputs), logits(model, inputs)) < 1e-2


def test_greedy_tokens_are_the_cpus(tmp_path):
    model = FAMILIES["llama"].build()
    folder = mq.quantize(model, fidelity=False).save(tmp_path / "int8")
    ids = torch.arange(1, 8)[None]
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    here = mq.load(folder).generate(ids, **asked)
    assert torch.equal(mq.load(folder, device="cuda").generate(ids.cuda(), **asked).cpu(), here)
