"""A model is converted while transformers loads it, and is one of its own there: saved, pushed, made float again."""

import copy
import hashlib
import pickle
import shutil
import weakref

import pytest
import torch
import transformers as hf
from models import FAMILIES, relative_error, run, snapshot

import mono_quant as mq
from mono_quant.errors import ConfigError, FrozenWeightError, NonFiniteWeightError, OutputError, PatternError

NAMES = [name for name in FAMILIES if name not in ("cnn", "lstm", "encoder", "attention")]
pytestmark = pytest.mark.filterwarnings("ignore:.*use_return_dict.*:FutureWarning")


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """Folders that transformers wrote, by name of the family."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("float") / name
            FAMILIES[name].build().save_pretrained(made[name])
        return made[name]

    return folder


def on_load(folder, dtype="int8", **options):
    config = hf.AutoConfig.from_pretrained(folder)
    cls = getattr(hf, config.architectures[0])
    return cls.from_pretrained(folder, quantization_config=mq.MonoQuantConfig(dtype, **options))


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_converted_on_load_is_the_one_converted_in_memory(name, dtype, floats, tmp_path):
    original = getattr(hf, hf.AutoConfig.from_pretrained(floats(name)).architectures[0])
    in_memory = mq.quantize(original.from_pretrained(floats(name)), dtype, fidelity=False)
    loaded = on_load(floats(name), dtype)
    expected, found = in_memory.model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    assert loaded.mono_quant_report.rows == in_memory.report.rows
    inputs = FAMILIES[name].inputs()
    torch.testing.assert_close(run(loaded, inputs), run(in_memory.model, inputs), rtol=0, atol=1e-6)
    # the folder road, saved by its own method and by transformers'
    saved = mq.quantize(floats(name), dtype, fidelity=False).save(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(saved)
    mq.verify(tmp_path / "again")


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_gives_the_float_classes_with_the_weights_that_were_computed_with(name, floats):
    loaded = on_load(floats(name))
    original = type(loaded).from_pretrained(floats(name))
    weights = {n: p.detach().clone() for n, p in loaded.named_parameters() if p.is_floating_point()}
    stood_for = {
        f"{n}.{held}": getattr(m, held).detach().clone()
        for n, m in loaded.named_modules()
        for held in getattr(m, "held", ())
    }
    back = loaded.dequantize()
    assert back is loaded
    assert {n: type(m) for n, m in back.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    state = back.state_dict()
    assert state.keys() == original.state_dict().keys()
    for name_, tensor in stood_for.items():
        assert torch.equal(state[name_], tensor.to(state[name_].dtype)), name_
    assert all(torch.equal(state[n], weights[n]) for n in state.keys() & weights.keys())
    assert not hasattr(back, "hf_quantizer")
    # one step of the scale at most, of a row's largest
    for name_ in stood_for:
        gap = (state[name_].float() - original.state_dict()[name_].float()).abs().max()
        assert gap <= original.state_dict()[name_].float().abs().max() / 127


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float32], ids=str)
def test_dequantize_takes_a_dtype_and_the_words_of_a_config(dtype):
    model = mq.quantize(FAMILIES["llama"].build(), fidelity=False).model
    model.config.dtype = "float32"
    back = model.dequantize(dtype) if dtype is not None else model.dequantize()
    weight = back.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    run(back.float(), FAMILIES["llama"].inputs())


def test_options_rules_and_reasons_are_those_of_quantize(floats):
    loaded = on_load(floats("llama"), skip=["down_proj"], embeddings=True, min_params=3000)
    other = mq.quantize(
        hf.AutoModelForCausalLM.from_pretrained(floats("llama")),
        skip=["down_proj"],
        embeddings=True,
        min_params=3000,
        fidelity=False,
    )
    assert loaded.mono_quant_report.rows == other.report.rows
    assert "user" in " ".join(row.reason for row in loaded.mono_quant_report.rows)


def test_a_request_of_ours_a_dict_and_a_pipeline_are_understood(floats):
    wanted = on_load(floats("llama")).mono_quant_report.rows
    for asked in (mq.QuantizationConfig(), {"quant_method": "mono_quant", "dtype": "int8"}):
        model = hf.AutoModelForCausalLM.from_pretrained(floats("llama"), quantization_config=asked)
        assert model.mono_quant_report.rows == wanted
    given = {"quantization_config": mq.MonoQuantConfig()}
    features = hf.pipeline(
        "image-feature-extraction",
        str(floats("vit")),
        model_kwargs=given,
        image_processor=hf.ViTImageProcessor() if hasattr(hf, "ViTImageProcessor") else None,
    )
    assert any(row.action == "quantized" for row in features.model.mono_quant_report.rows)


@pytest.mark.parametrize(
    ("place", "problem"),
    [({"model": "cpu", "lm_head": "disk"}, "on the disk"), ("cpu", ""), ("auto", ""), ({"": "cpu"}, "")],
    ids=["disk", "cpu", "auto", "dict"],
)
def test_device_maps(place, problem, floats, tmp_path):
    def load():
        return hf.AutoModelForCausalLM.from_pretrained(
            floats("llama"),
            quantization_config=mq.MonoQuantConfig(),
            device_map=place,
            offload_folder=tmp_path,
        )

    if problem:
        with pytest.raises(ConfigError, match=problem):
            load()
        assert not list(tmp_path.iterdir())
        return
    inputs = FAMILIES["llama"].inputs()
    assert torch.equal(run(load(), inputs), run(on_load(floats("llama")), inputs))


def test_what_cannot_be_asked_for_is_refused_before_anything_is_read(floats):
    with pytest.raises(ConfigError, match="fidelity=True"):
        mq.MonoQuantConfig(fidelity=True)
    with pytest.raises(ConfigError, match="fidelity=True"):
        hf.AutoModelForCausalLM.from_pretrained(
            floats("llama"), quantization_config=mq.QuantizationConfig(fidelity=True)
        )
    with pytest.raises(ConfigError, match="unknown option 'bits'"):
        mq.MonoQuantConfig(bits=4)
    with pytest.raises(PatternError, match="nowhere"):
        on_load(floats("llama"), skip=["nowhere"])


def test_weights_that_are_not_finite_are_refused_by_name_or_kept_with_their_partners(floats, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(floats("llama"))
    broken = "model.layers.0.self_attn.k_proj.weight"
    model.get_parameter(broken).data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteWeightError, match="k_proj"):
        on_load(tmp_path)
    for report in (
        on_load(tmp_path, on_nonfinite="keep").mono_quant_report,
        mq.quantize(tmp_path, on_nonfinite="keep", fidelity=False).report,
    ):
        kept = {row.name: row.reason for row in report.rows if row.is_layer and row.action == "kept"}
        assert "NaN" in kept[broken]
        assert "k_proj" in kept[broken.replace("k_proj", "q_proj")]


def test_a_layer_that_no_checkpoint_has_is_initialised_and_then_converted(floats, tmp_path):
    bare = hf.AutoModelForCausalLM.from_pretrained(floats("gpt2")).transformer
    bare.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = hf.AutoConfig.from_pretrained(tmp_path, add_cross_attention=True)
    model = hf.GPT2LMHeadModel.from_pretrained(
        tmp_path, config=config, quantization_config=mq.MonoQuantConfig()
    )
    fresh = model.get_submodule("transformer.h.0.crossattention.c_attn")
    assert fresh.codes().dtype == torch.int8
    # as the class draws them
    assert float(fresh.weight.std()) == pytest.approx(config.initializer_range, rel=0.1)
    assert model.mono_quant_report.quantized


def test_two_tensors_where_the_config_ties_are_counted_as_two(floats, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(floats("llama"))
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    loaded = on_load(tmp_path)
    rows = {row.name: row for row in loaded.mono_quant_report.rows}
    assert rows["lm_head.weight"].action == "kept"
    assert rows["lm_head.weight"].bytes_after == loaded.lm_head.weight.numel() * 4
    assert mq.quantize(tmp_path, fidelity=False).report.rows == loaded.mono_quant_report.rows


@pytest.mark.parametrize("way", ["the model", "a copy", "a pickle", "as a temporary"])
def test_every_copy_of_a_converted_model_saves_itself(way, floats, tmp_path):
    saved = mq.quantize(floats("bert"), fidelity=False).save(tmp_path / "saved")
    if way == "as a temporary":
        mq.load(saved).save_pretrained(tmp_path / "again")
    else:
        model = mq.load(saved)
        model = copy.deepcopy(model) if way == "a copy" else model
        model = pickle.loads(pickle.dumps(model)) if way == "a pickle" else model
        model.save_pretrained(str(tmp_path / "again"))
    assert snapshot(tmp_path / "again") == snapshot(saved)


def test_saving_goes_beside_the_files_of_others_and_over_older_weights(floats, tmp_path):
    saved = mq.quantize(floats("bert"), fidelity=False).save(tmp_path / "saved")
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    others = {"training_args.bin": b"1", "checkpoint-1/optimizer.pt": b"2"}
    stale = {
        "model-00001-of-00002.safetensors": b"3",
        "model.safetensors.index.json": b"4",
        "config.json": b"5",
    }
    for name, data in {**others, **stale}.items():
        (tmp_path / "run" / name).write_bytes(data)
    for _ in range(2):
        mq.load(saved).save_pretrained(tmp_path / "run")
        assert snapshot(tmp_path / "run") == snapshot(saved) | others
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "saved"]


def test_a_refusal_comes_before_anything_is_made(floats, tmp_path):
    model = on_load(floats("bert"))
    refused = {
        "variant": "fp16",
        "safe_serialization": False,
        "nonsense": 1,
        "state_dict": {"a": torch.ones(1)},
    }
    for option, value in refused.items():
        with pytest.raises(ConfigError, match=option):
            model.save_pretrained(tmp_path / "new", **{option: value})
    model.config.hidden_size = 128
    with pytest.raises(mq.MonoQuantError, match="another model"):
        model.save_pretrained(tmp_path / "new")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        on_load(floats("bert")).save_pretrained(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_process_that_is_not_the_main_one_writes_nothing(floats, tmp_path):
    on_load(floats("bert")).save_pretrained(tmp_path / "new", False)
    assert not (tmp_path / "new").exists()


def test_trainer_saves_the_same_files_and_does_not_train(floats, tmp_path):
    model = on_load(floats("bert"))
    arguments = hf.TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    with pytest.raises(FrozenWeightError):
        hf.Trainer(model, arguments, train_dataset=[{"input_ids": [1], "labels": 0}])
    model.requires_grad_(False)
    hf.Trainer(model, arguments).save_model(tmp_path / "saved")
    found = snapshot(tmp_path / "saved")
    expected = snapshot(mq.quantize(floats("bert"), fidelity=False).save(tmp_path / "expected"))
    assert found.keys() == expected.keys() | {"training_args.bin"}
    # Trainer has switched the cache off, and the manifest has the hash of config.json
    changed = {name for name, data in expected.items() if found[name] != data}
    assert changed == {"config.json", "mono_quant.json"}
    mq.load(tmp_path / "saved")


def test_a_card_names_the_source_by_its_hash_while_the_source_is_what_was_read(floats, tmp_path):
    folder = tmp_path / "float"
    shutil.copytree(floats("bert"), folder)
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    model = on_load(folder)
    model.save_pretrained(tmp_path / "first")
    assert digest in (tmp_path / "first" / "README.md").read_text()
    weights.write_bytes(weights.read_bytes())
    model.save_pretrained(tmp_path / "second")
    assert "sha256 `" not in (tmp_path / "second" / "README.md").read_text().partition("## How")[0]
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "third")
    mq.verify(tmp_path / "third")


def test_a_converted_model_is_freed_as_soon_as_nobody_holds_it(floats):
    model = on_load(floats("bert"))
    seen = weakref.ref(model)
    del model
    assert seen() is None


def test_it_is_as_close_to_the_float_model_as_its_weights_and_activations_allow(floats):
    inputs = FAMILIES["llama"].inputs()
    original = hf.AutoModelForCausalLM.from_pretrained(floats("llama"))
    assert relative_error(run(original, inputs), run(on_load(floats("llama")), inputs)) < 0.03
