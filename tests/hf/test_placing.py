"""Where a loaded model lies, and in which dtype its floats are."""

import pytest
import torch
from models import FAMILIES, run

import mono_quant as mq
from mono_quant.errors import ConfigError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name in ("llama", "gpt2", "qwen3_moe"):
        mq.quantize(FAMILIES[name].build(), fidelity=False).save(folder / name)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.float16", "auto", None], ids=str)
def test_dtype_is_that_of_the_floats_and_leaves_codes_and_scales(dtype, saved):
    plain, model = mq.load(saved / "llama"), mq.load(saved / "llama", dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."), torch.float32)
    expected = plain.state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith("_scale") or expected[name].dtype == torch.int8:
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name])
        else:
            assert torch.equal(tensor, expected[name].to(wanted)), name
    assert model.dtype == wanted
    assert model.model.layers[0].mlp.up_proj.weight.dtype == wanted


@pytest.mark.parametrize(
    "place",
    [
        {"device": "cpu"},
        {"device": torch.device("cpu")},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
    ],
    ids=str,
)
def test_every_way_to_say_cpu_gives_the_same_bits(place, saved):
    inputs = FAMILIES["llama"].inputs()
    assert torch.equal(run(mq.load(saved / "llama", **place), inputs), run(mq.load(saved / "llama"), inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_layers_on_the_disk_give_the_same_bits(name, saved, tmp_path):
    plain = mq.load(saved / name)
    inputs = FAMILIES[name].inputs()
    parts = [child for child, _ in plain.named_children()]
    place = {part: "disk" if part != "lm_head" else "cpu" for part in parts}
    model = mq.load(saved / name, device_map=place, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(run(model, inputs), run(plain, inputs))


def test_what_cannot_be_is_refused_before_anything_is_read(saved):
    nowhere = saved / "nothing here"
    for options, problem in (
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"dtype": torch.int8}, "torch.int8"),
        ({"device": "cpu", "device_map": "auto"}, "both given"),
        ({"device": "nowhere"}, "device='nowhere'"),
        ({"device_map": "everywhere"}, "device_map='everywhere'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            mq.load(nowhere, **options)
    with pytest.raises(ConfigError, match="offload_folder"):
        mq.load(saved / "llama", device_map={"model": "disk", "lm_head": "cpu"})


def test_a_map_for_a_plain_module_is_refused(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(64, 64))
    folder = mq.quantize(module, fidelity=False).save(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"Sequential; use device="):
        mq.load(folder, module, device_map="auto")
    assert torch.equal(
        mq.load(folder, module, dtype=torch.bfloat16)[0].bias, module[0].bias.detach().bfloat16()
    )
