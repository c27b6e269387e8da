"""Models of diffusers: in as objects and folders, saved with their config, loaded as their class, run in their pipelines."""

import json

import diffusers
import diffusion
import pytest
import torch
from models import relative_error, snapshot
from safetensors.torch import load_file

import mono_quant as mq
from mono_quant.artifact.inspection import verify
from mono_quant.convert.diffusion_probes import make_diffusion_probe
from mono_quant.convert.int8_layers import Int8Module, tensors_of
from mono_quant.errors import CorruptCheckpointError, LimitExceededError, UnsupportedModelError

SOME = pytest.mark.parametrize("name", ["dit", "wan", "vae"])


def answer(model):
    with torch.no_grad():
        return model(**make_diffusion_probe(model).kwargs).sample


def same(a, b):
    a, b = ({**dict(m.named_buffers()), **tensors_of(m)} for m in (a, b))
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "int8") for name in diffusion.MODELS), ("flux", "fp16"), ("unet", "fp16"), ("wan", "fp16")],
)
def test_a_model_comes_back_as_its_class_bit_for_bit(name, dtype, tmp_path):
    model = diffusion.build(name)
    result = mq.quantize(model, dtype)
    assert type(result.model) is type(model) and result.report.fidelity is not None
    assert (
        set(result.report.fidelity) >= {"relative_error", "output"}
        and result.report.fidelity["output"] == "sample"
    )
    folder = result.save(tmp_path / "a")
    assert snapshot(result.save(tmp_path / "b")) == snapshot(folder)
    loaded = mq.load(folder)
    assert type(loaded) is type(model) and same(loaded, result.model) and not loaded.training
    written = json.loads((folder / "config.json").read_text())
    assert (written.pop("quantization_config", None) is None) == (dtype == "fp16")
    assert written == json.loads(model.to_json_string())
    inputs = make_diffusion_probe(model).kwargs
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, result.model(**inputs).sample)
    assert verify(folder)[-1] == f"loads as {type(model).__name__}"
    again = mq.QuantizedModel.from_folder(folder).save(tmp_path / "c")
    assert snapshot(again) == snapshot(folder)


@SOME
def test_a_folder_gives_what_the_object_gives(name, tmp_path):
    model = diffusion.build(name)
    model.save_pretrained(tmp_path / "source", max_shard_size="300kB")
    planned, result = mq.plan(tmp_path / "source"), mq.quantize(tmp_path / "source")
    expected = mq.quantize(model)
    assert same(result.model, expected.model)
    assert [(r.name, r.action, r.reason, r.bytes_after) for r in planned.rows] == [
        (r.name, r.action, r.reason, r.bytes_after) for r in expected.report.rows
    ]
    assert result.report.fidelity == expected.report.fidelity
    assert same(mq.load(result.save(tmp_path / "out")), expected.model)


@SOME
def test_a_float16_folder_is_one_of_diffusers(name, tmp_path):
    model = diffusion.build(name)
    folder = mq.quantize(model, "fp16").save(tmp_path / "fp16")
    theirs = type(model).from_pretrained(folder, torch_dtype=torch.float32)
    values = load_file(folder / "diffusion_pytorch_model.safetensors")
    state = theirs.state_dict()
    assert state.keys() == values.keys() and all(torch.equal(t, values[n].float()) for n, t in state.items())
    assert {n for n, t in values.items() if t.dtype == torch.float32} == {
        n for n in state if not set(type(model)._keep_in_fp32_modules or ()).isdisjoint(n.split("."))
    }
    expected = {
        n: t.half().float() for n, t in model.state_dict().items() if values[n].dtype == torch.float16
    }
    assert all(torch.equal(state[n], t) for n, t in expected.items())


def test_older_names_of_an_attention_are_read(tmp_path):
    model = diffusion.build("vae")
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {n.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for n, t in tensors.items()}
    assert any(".query." in n for n in tensors)
    diffusion.save(tensors, file)
    assert same(mq.quantize(tmp_path).model, mq.quantize(model).model)


def test_what_the_class_keeps_in_float32_is_kept():
    model = diffusion.build("wan")
    reasons = {r.name.removesuffix(".weight"): r.reason for r in mq.plan(model).rows}
    assert reasons["condition_embedder.time_embedder.linear_2"].startswith("the model declares")
    assert reasons["condition_embedder.text_embedder.linear_2"] == ""
    # a part of the dotted name, as diffusers compares it, and not a part of a word
    assert reasons["blocks.0.attn1.to_q"] == ""


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "ModelMixin",
        "_private",
        "",
        "DiffusionPipeline",
        "DDIMScheduler",
        "unets",
        "torch",
        "UNet99",
        5,
        None,
        ["UNet2DModel"],
    ],
)
def test_a_class_name_that_is_no_model_of_diffusers_is_one_error(name, tmp_path):
    diffusion.build("dit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": name}))
    for verb in (mq.quantize, mq.plan):
        with pytest.raises(UnsupportedModelError, match=r"has no model class .*Update diffusers"):
            verb(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_layers": 10**9}, LimitExceededError, "num_layers is 1000000000"),
        ({"attention_head_dim": 10**9}, LimitExceededError, "attention_head_dim is 1000000000"),
        ({"sample_size": 10**9}, LimitExceededError, "sample_size is 1000000000"),
        ({"num_layers": 3}, CorruptCheckpointError, r"are missing: transformer_blocks\.2"),
        ({"in_channels": 8}, CorruptCheckpointError, r"pos_embed\.proj\.weight have another shape"),
        ({"num_layers": "two"}, CorruptCheckpointError, "describes no DiTTransformer2DModel"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(changes, error, message, tmp_path):
    diffusion.build("dit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(error, match=message):
        mq.quantize(tmp_path)


def test_lists_of_sizes_are_judged_too(tmp_path):
    diffusion.build("unet").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"block_out_channels": [10**9, 64]}))
    with pytest.raises(LimitExceededError, match="block_out_channels is 1000000000"):
        mq.plan(tmp_path)


def test_tensors_that_no_layer_uses_are_left_out_and_said(tmp_path):
    model = diffusion.build("dit")
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    diffusion.save(load_file(file) | {"extra.weight": torch.ones(3)}, file)
    result = mq.quantize(tmp_path)
    assert result.report.notes == (
        "left out, because no layer of DiTTransformer2DModel uses them: extra.weight",
    )
    assert same(result.model, mq.quantize(model).model)


def pipeline():
    # the pipeline's own number of classes
    dit = diffusion.build("dit", num_embeds_ada_norm=1000)
    return diffusers.DiTPipeline(dit, diffusion.build("vae"), diffusers.DDIMScheduler())


def test_a_pipeline_runs_with_a_converted_part_and_says_how_to_make_one(tmp_path):
    pipe = pipeline()
    with pytest.raises(
        UnsupportedModelError, match=r"several models \(.*transformer.*quantize\(pipe\.transformer\)"
    ):
        mq.quantize(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(
        UnsupportedModelError, match=r"several models \(transformer, vae\).*pipe\.transformer"
    ):
        mq.quantize(tmp_path / "pipe")

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe([3], generator=generator, num_inference_steps=2, output_type="np").images)

    expected = images(pipe)
    result = mq.quantize(pipe.transformer)
    pipe.transformer = result.model
    found = images(pipe)
    assert 0 < relative_error(expected, found) < 0.05
    pipe.transformer = mq.load(result.save(tmp_path / "int8"))
    assert torch.equal(images(pipe), found)
    # the folder of one part is a source
    assert same(mq.quantize(tmp_path / "pipe" / "transformer").model, result.model)


def test_a_model_that_its_config_does_not_describe_is_refused_before_anything_is_written(tmp_path):
    model = diffusion.build("unet")
    model.fuse_qkv_projections()
    with pytest.raises(
        UnsupportedModelError, match=r"UNet2DConditionModel cannot be saved.*would be left out"
    ):
        mq.quantize(model, fidelity=False).save(tmp_path / "fused")
    smaller = diffusion.build("dit")
    smaller.transformer_blocks = smaller.transformer_blocks[:1]
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.1\..* would be missing"):
        mq.quantize(smaller, fidelity=False).save(tmp_path / "smaller")
    assert list(tmp_path.iterdir()) == []


class Own(diffusers.DiTTransformer2DModel):
    """A class that diffusers does not have."""


def test_a_class_of_somebodys_own_is_loaded_into_what_its_owner_builds(tmp_path):
    sizes = dict(diffusion.build("dit").config)
    model = Own.from_config({n: v for n, v in sizes.items() if not n.startswith("_")}).eval()
    result = mq.quantize(model)
    folder = result.save(tmp_path / "own")
    assert same(mq.load(folder, model=lambda: Own.from_config(model.config)), result.model)


def test_the_card_names_the_place_in_a_pipeline_and_the_library_that_reads_the_file(tmp_path):
    model = diffusion.build("unet")
    card = mq.quantize(model, fidelity=False).card()
    assert "unet=model)" in card and "library_name: mono_quant" in card and "refuse the file" in card
    assert "library_name: diffusers" in mq.quantize(model, "fp16", fidelity=False).card()
    folder = mq.quantize(model).save(tmp_path / "unet")
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    scope = {}
    exec(code, scope)
    assert isinstance(scope["model"], diffusers.UNet2DConditionModel)
    assert any(isinstance(m, Int8Module) for m in scope["model"].modules())
    seen = mq.inspect(folder)
    assert seen.facts["class"] == "UNet2DConditionModel" and seen.facts["kind"] == "diffusers"
