"""Which modules of a float16 model stay in float32: what transformers declares, what the user names, and all that shares with them."""

import pytest
import torch
import transformers as hf
from models import FAMILIES, seeded
from safetensors.torch import load_file
from torch import nn

import mono_quant as mq
from mono_quant.errors import FrozenWeightError

QUIET = {"fidelity": False}
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 200}


def umt5():
    return hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5))


def mt5_encoder():
    return hf.MT5EncoderModel(hf.MT5Config(**T5))


def stored(report):
    return {row.name: row.dtype_after for row in report.rows if row.action != "shared"}


@pytest.mark.parametrize("make", [FAMILIES["t5"].make, umt5, mt5_encoder])
def test_what_transformers_declares_is_float32_until_that_default_is_disabled(make, tmp_path):
    model = seeded(make)
    declared = {name for name in model.state_dict() if name.endswith(".wo.weight")}
    assert declared
    for disabled, expected in (([], declared), (["keep_in_fp32"], set())):
        options = {"disable_defaults": disabled}
        result = mq.quantize(model, "fp16", **options, **QUIET)
        tables = [stored(mq.plan(model, "fp16", **options)), stored(result.report)]
        folder = result.save(tmp_path / str(len(disabled)))
        for table in tables:
            assert {name for name, dtype in table.items() if dtype == "float32"} == expected
            assert set(table.values()) <= {"float16", "float32"}
        file = load_file(folder / "model.safetensors")
        assert {name for name, tensor in file.items() if tensor.dtype == torch.float32} == expected


class Chain(nn.Module):
    """Three layers of which the middle one shares its weight with the first and its bias with the last."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last, self.alone = (nn.Linear(8, 8) for _ in range(4))
        self.middle.weight, self.last.bias = self.first.weight, self.middle.bias


@pytest.mark.parametrize("skipped", ["first", "middle", "last"])
def test_all_that_shares_tensors_with_a_kept_module_is_kept_from_one_to_the_next(skipped):
    for report in (
        mq.plan(seeded(Chain), "fp16", skip=[skipped]),
        mq.quantize(seeded(Chain), "fp16", skip=[skipped], **QUIET).report,
    ):
        kept = {row.module: row.reason for row in report.rows if row.action == "kept"}
        assert kept.keys() == {"first", "middle", "last"}
        assert kept[skipped] == f"skipped by the user: {skipped}"
        partner = {"first": "middle", "middle": skipped, "last": "middle"}
        others = {name: f"tied to {partner[name]}, which is kept" for name in kept if name != skipped}
        assert {name: kept[name] for name in others} == others


@pytest.mark.parametrize("spoilt", ["first", "middle", "last"])
def test_a_value_that_does_not_fit_keeps_its_partners_as_well(spoilt):
    model = seeded(Chain)
    model.get_submodule(spoilt).weight.data[0, 0] = 1e5
    result = mq.quantize(model, "fp16", **QUIET)
    kept = {row.module for row in result.report.rows if row.action == "kept"}
    assert kept == {"first", "middle", "last"}
    for name, tensor in result.model.state_dict().items():
        assert tensor.dtype == (torch.float16 if name == "alone.weight" else torch.float32), name
        own = model.state_dict()[name]
        assert torch.equal(tensor.float(), own.half().float() if name.startswith("alone") else own), name


class Owner(nn.Module):
    """A model with a parameter and a buffer of its own, beside a layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x):
        return self.layer(x) * self.scale + self.shift


@pytest.mark.parametrize("options", [{}, {"skip": ["layer"]}, {"skip_types": ["Owner"]}], ids=str)
def test_a_plan_tells_what_becomes_of_every_tensor(options):
    planned = mq.plan(Owner(), "fp16", **options).rows
    assert planned == mq.quantize(Owner(), "fp16", **options, **QUIET).report.rows
    assert {row.name for row in planned} == {"scale", "shift", "layer.weight", "layer.bias"}
    halved = {row.name for row in planned if row.action == "quantized"}
    assert (
        halved
        == {
            str({}): {"scale", "shift", "layer.weight", "layer.bias"},
            str({"skip": ["layer"]}): {"scale", "shift"},
            str({"skip_types": ["Owner"]}): set(),
        }[str(options)]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_skipped_layer_keeps_its_dtype_whatever_that_is(dtype):
    model = seeded(Owner).to(dtype)
    result = mq.quantize(model, "fp16", skip=["layer"], **QUIET)
    rows = {row.name: row for row in result.report.rows}
    name, size = str(dtype).removeprefix("torch."), dtype.itemsize
    assert (rows["layer.weight"].dtype_after, rows["layer.weight"].bytes_after) == (name, 64 * size)
    assert rows["layer.weight"].action == "kept" and rows["scale"].dtype_after == "float16"
    assert torch.equal(result.model.layer.weight.to(dtype), model.layer.weight)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_what_hangs_on_a_converted_layer_can_be_taken_away_and_its_weight_cannot(dtype):
    layer = mq.quantize(nn.Sequential(nn.Linear(64, 64)), dtype, **QUIET).model[0]
    layer.note = "mine"
    del layer.note
    assert not hasattr(layer, "note")
    with pytest.raises(FrozenWeightError, match=r"is to be removed"):
        del layer.weight
