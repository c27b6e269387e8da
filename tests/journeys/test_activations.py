"""The scheme of activations is a property of the model: asked for, carried by each layer, saved, loaded and told."""

import copy
import io
import json
import pickle
import shutil

import pytest
import torch
import transformers as hf
from models import FAMILIES, relative_error, run, seeded, snapshot, tiny_llama
from native import PATHS
from torch import nn

import mono_quant as mq
from mono_quant import kernels
from mono_quant.artifact.facts import Manifest, read_report
from mono_quant.convert.int8_layers import Int8Module, layers_with_schemes
from mono_quant.errors import ConfigError, CorruptCheckpointError, FormatVersionError, PatternError
from mono_quant.planning.schemes import BLOCKS

# Of each family, the layers that get 12 bits; the rest has groups of 64.
SOME = {
    "llama": "*.down_proj",
    "gpt2": "*.c_proj",
    "mixtral": "*.experts",
    "cnn": "fc",
    "lstm": "lstm",
    "encoder": "*.self_attn",
    "t5": "decoder",
}


def named(model):
    """The scheme of every int8 layer, those inside of others too."""
    return {n: m.activations for n, m in model.named_modules() if isinstance(m, Int8Module)}


def asked(family):
    return {"*": "int8-g64", SOME[family]: "int12"}


@pytest.fixture(scope="module", params=SOME)
def life(request, tmp_path_factory):
    """A family, its float model, its converted form and the folder of that."""
    family = FAMILIES[request.param]
    original = family.build()
    result = mq.quantize(
        original, activations=asked(request.param), disable_defaults=["small"], probe=family.inputs()
    )
    return request.param, original, result, result.save(tmp_path_factory.mktemp("life") / "saved")


def load(family, folder, **options):
    made = FAMILIES[family].build() if Manifest.read(folder).kind == "module" else None
    return mq.load(folder, made, **options)


def test_layers_come_back_with_their_schemes_and_give_the_same_bits_on_every_path(life):
    family, _, result, folder = life
    schemes = named(result.model)
    assert set(schemes.values()) == {"int8-g64", "int12"}
    back = load(family, folder)
    assert named(back) == schemes
    inputs, products = FAMILIES[family].inputs(), []
    for path in PATHS:
        with kernels.using(path):
            assert torch.equal(run(result.model, inputs), run(back, inputs))
            products.append([product(layer) for layer in layers_with_schemes(back).values()])
    # what is around the products may differ: attention is torch's on the reference
    for others in products[1:]:
        assert all(torch.equal(a, b) for a, b in zip(products[0], others, strict=True))


def product(layer):
    """The product of a layer with its first matrix."""
    name = layer.held[0]
    codes, scale = layer.codes(name).flatten(0, -2), layer.scale(name).view(-1, 1)
    x = seeded(lambda: torch.randn(7, codes.shape[1]))
    return layer.multiply(x, codes, scale, None)


def test_the_plan_says_the_same_as_the_report_and_both_say_it_to_people(life):
    family, original, result, folder = life
    plan = mq.plan(original, activations=asked(family), disable_defaults=["small"])
    assert plan.schemes() == result.report.schemes() == read_report(folder).schemes()
    told = {scheme: (why, len(layers)) for scheme, why, layers in plan.schemes()}
    layers = layers_with_schemes(result.model)
    wide = sum(layer.activations == "int12" for layer in layers.values())
    assert told == {
        "int12": (f"asked for: {SOME[family]}", wide),
        "int8-g64": ("asked for: *", len(layers) - wide),
    }
    assert f"int12 in {wide} layer" in plan.table()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| `int12` | {wide} | asked for: " in card and "| `int8-g64` | " in card
    assert f"activations={asked(family)!r}" in card
    errors = result.report.fidelity["relative_error_by_scheme"]
    assert list(errors) == ["int8", "int12"] and errors["int12"] < errors["int8"]


def test_copies_pickles_and_casts_keep_the_schemes(life):
    family, _, result, _ = life
    schemes, inputs = named(result.model), FAMILIES[family].inputs()
    expected = run(result.model, inputs)
    for twin in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert named(twin) == schemes and torch.equal(run(twin, inputs), expected)
    file = io.BytesIO()
    torch.save(result.model, file)
    file.seek(0)
    assert named(torch.load(file, weights_only=False)) == schemes
    assert named(copy.deepcopy(result.model).to(torch.bfloat16).double()) == schemes
    # encoding a weight anew changes the weight alone
    twin = copy.deepcopy(result.model)
    for module in twin.modules():
        if isinstance(module, Int8Module):
            for name in module.held:
                module.encode_(name, module.dequantize(name))
    assert named(twin) == schemes and torch.equal(run(twin, inputs), expected)


def test_the_same_request_gives_the_same_bytes(life, tmp_path):
    family, original, _, folder = life
    again = mq.quantize(
        original,
        activations=asked(family),
        disable_defaults=["small"],
        probe=FAMILIES[family].inputs(),
    ).save(tmp_path / "again")
    assert snapshot(again) == snapshot(folder)


def test_other_schemes_on_load_are_saved_and_told_as_they_are(life, tmp_path):
    family, _, _, folder = life
    wide = load(family, folder, activations="int12")
    assert set(named(wide).values()) == {"int12"}
    report = read_report(folder)
    if not hasattr(wide, "save_pretrained"):
        return
    wide.save_pretrained(tmp_path / "again")
    manifest = Manifest.read(tmp_path / "again")
    assert manifest.activations == manifest.settings["activations"] == "int12"
    now = read_report(tmp_path / "again")
    ours = {r.module for r in report.quantized if r.activations != "int12"}
    assert (
        now.activations == "int12" and now.fidelity is None and "schemes of activations" in now.fidelity_note
    )
    assert {r.module for r in now.quantized if r.why == "changed after the conversion"} == ours
    assert named(load(family, tmp_path / "again")) == named(wide)
    assert mq.verify(tmp_path / "again")
    # a part of it: what no pattern matches is left open
    mixed = load(family, folder, activations={SOME[family]: "int8"})
    mixed.save_pretrained(tmp_path / "mixed")
    assert named(load(family, tmp_path / "mixed")) == named(mixed)
    assert set(named(mixed).values()) == {"auto", "int8"}
    settings = mq.QuantizationConfig.from_dict(Manifest.read(tmp_path / "mixed").settings)
    assert set(dict(settings.activations).values()) == {"auto", "int8"}


@pytest.mark.parametrize("scheme", [*kernels.SCHEMES, "auto"])
def test_one_scheme_for_all_is_written_once(tmp_path, scheme):
    result = mq.quantize(tiny_llama(), activations=scheme, fidelity=False)
    folder = result.save(tmp_path / scheme)
    assert set(named(result.model).values()) == {scheme}
    assert (
        Manifest.read(folder).activations
        == json.loads((folder / "mono_quant.json").read_text())["activations"]
        == scheme
    )
    shown = repr(result.model.model.layers[0].mlp.down_proj)
    assert shown == "Int8Linear(in_features=128, out_features=64, bias=False" + (
        ")" if scheme == "auto" else f", activations={scheme!r})"
    )
    x = {"input_ids": torch.arange(20).view(2, 10)}
    with kernels.using(activations="int8-g64" if scheme == "auto" else "int8"):
        fixed = run(result.model, x)
    assert torch.equal(run(mq.load(folder, activations="int8-g64" if scheme == "auto" else None), x), fixed)


def test_what_transformers_loads_has_the_schemes_and_may_be_given_others(tmp_path):
    floats, folder = tmp_path / "floats", tmp_path / "int8"
    tiny_llama().save_pretrained(floats)
    schemes = {"*": "int8-g64", "*.down_proj": "int12"}
    result = mq.quantize(floats, activations=schemes, fidelity=False)
    result.save(folder)
    x = {"input_ids": torch.arange(20).view(2, 10)}
    expected = run(result.model, x)
    config = mq.MonoQuantConfig(activations=schemes)
    made = hf.AutoModelForCausalLM.from_pretrained(floats, quantization_config=config)
    assert named(made) == named(result.model) and torch.equal(run(made, x), expected)
    assert made.mono_quant_report.schemes() == result.report.schemes()
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))).request == config.request
    with mq.enable():
        back = hf.AutoModelForCausalLM.from_pretrained(folder)
        assert named(back) == named(result.model) and torch.equal(run(back, x), expected)
        # without its head the names lack a prefix
        bare = hf.AutoModel.from_pretrained(folder)
        assert {f"model.{n}": s for n, s in named(bare).items()} == named(back)
        with pytest.warns(UserWarning, match="loading attributes"):
            other = hf.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=mq.MonoQuantConfig(activations="int8")
            )
        assert set(named(other).values()) == {"int8"}
    back.save_pretrained(tmp_path / "again")
    assert Manifest.read(tmp_path / "again").activations == Manifest.read(folder).activations
    # what others read of the folder is what it was without schemes
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    plain = mq.quantize(floats, fidelity=False).save(tmp_path / "plain")
    assert config == json.loads((plain / "config.json").read_text())["quantization_config"]


def test_older_folders_are_open_and_unknown_schemes_are_refused(tmp_path):
    folder = mq.quantize(tiny_llama(), activations="int12", fidelity=False).save(tmp_path / "int8")
    path = folder / "mono_quant.json"
    data = json.loads(path.read_text())

    def write(**changes):
        path.write_text(json.dumps({k: v for k, v in (data | changes).items() if v is not None}))
        return folder

    assert set(named(mq.load(write(activations=None))).values()) == {"auto"}
    for odd in ("int9", {"model.layers.0.mlp.down_proj": "int16"}):
        with pytest.raises(
            FormatVersionError, match=r"activation scheme 'int\d+', which this version .*update"
        ):
            mq.load(write(activations=odd))
    with pytest.raises(CorruptCheckpointError, match=r"activations of mono_quant\.json is 3"):
        mq.load(write(activations=3))
    with pytest.raises(CorruptCheckpointError, match=r"gives model\.nowhere a scheme"):
        mq.load(write(activations={"model.nowhere": "int8"}))


def test_verify_finds_a_report_that_says_something_else(tmp_path):
    folder = mq.quantize(tiny_llama(), activations="int12", fidelity=False).save(tmp_path / "int8")
    assert "inputs    int12" in mq.inspect(folder).table()
    data = json.loads((folder / "mono_quant.json").read_text())
    (folder / "mono_quant.json").write_text(json.dumps(data | {"activations": "int8"}))
    with pytest.raises(
        CorruptCheckpointError, match=r"the report gives model\..* int12 activations, and .* int8"
    ):
        mq.verify(folder)


def test_a_report_of_an_older_version_is_read_and_its_card_stays_true(tmp_path):
    folder = mq.quantize(tiny_llama(), fidelity=False).save(tmp_path / "int8")
    path = folder / "mono_quant_report.json"
    data = json.loads(path.read_text())
    del data["activations"], data["auto_activations"]
    path.write_text(json.dumps(data | {"activation_bits": 12}))
    report = read_report(folder)
    assert report.activations == "" and report.schemes() == [] and "inputs" not in report.table()


def test_wishes_that_cannot_be_fulfilled_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="activations is 'int8', but fp16 leaves activations in float"):
        mq.quantize(tiny_llama(), "fp16", activations="int8")
    with pytest.raises(PatternError, match=r"'\*\.dwn_proj' matches no layer; near names: .*down_proj"):
        mq.plan(tiny_llama(), activations={"*.dwn_proj": "int12"})
    with pytest.raises(PatternError, match="'embed_tokens' matches no layer"):
        mq.quantize(tiny_llama(), activations={"embed_tokens": "int12"}, embeddings=True)
    with pytest.raises(ConfigError, match="needs a run of the model"):
        mq.MonoQuantConfig(activations="measured")
    with pytest.raises(ConfigError, match=r"layers cannot be measured: .*pass other inputs as probe="):
        mq.quantize(nn.Sequential(nn.Linear(64, 64)), activations="measured")
    half = mq.quantize(tiny_llama(), "fp16", fidelity=False).save(tmp_path / "half")
    with pytest.raises(ConfigError, match="activations is 'int12', but LlamaForCausalLM has no int8 layers"):
        mq.load(half, activations="int12")
    folder = mq.quantize(tiny_llama(), fidelity=False).save(tmp_path / "int8")
    with pytest.raises(PatternError, match="'lm_head' matches no layer"):
        mq.load(folder, activations={"lm_head": "int12"})
    with pytest.raises(ConfigError, match=r"a loaded model cannot be given; ask mono_quant\.suggest"):
        mq.load(folder, activations="measured")
    # a head that stays in float is more accurate than was asked for
    report = mq.quantize(tiny_llama(), activations={"lm_head": "int12"}, fidelity=False).report
    assert "no layer that lm_head of activations names became int8" in report.notes


def with_outliers(factor):
    """A Llama with inputs of `down_proj` as trained ones have: one channel far above the others."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[7] *= factor
            layer.mlp.down_proj.weight[:, 7] /= factor
    return model


def test_measured_finds_the_layers_with_outliers_and_brings_what_theory_says(tmp_path):
    model = with_outliers(100.0)
    found = mq.suggest(model)
    assert found.activations == {"*.down_proj": "int12"} and found.removed > 0.9
    result = mq.quantize(model, activations="measured")
    assert {n for n, s in named(result.model).items() if s == "int12"} == set(found.chosen)
    assert any(found.verdict in note for note in result.report.notes)
    assert (
        "int12",
        "measured: much more noise than its share of the work",
        list(found.chosen),
    ) in result.report.schemes()
    # four more bits make the noise of the chosen layers 16 times smaller; that of the others is at most that of the same function
    # without outliers
    x = {"input_ids": seeded(lambda: torch.randint(0, 200, (4, 32)))}

    def noise(converted):
        floats = copy.deepcopy(converted).dequantize()
        with kernels.using(activations="int8"):
            return relative_error(run(floats, x), run(converted, x))

    before, even = (
        noise(mq.quantize(m, activations="int8", fidelity=False).model) for m in (model, tiny_llama())
    )
    assert before > 4 * even
    assert noise(result.model) < 1.1 * even + before * 127 / 2047
    assert named(mq.load(result.save(tmp_path / "int8"))) == named(result.model)
    assert Manifest.read(tmp_path / "int8").settings["activations"] == "measured"


def test_where_noise_is_spread_nothing_is_changed_and_it_is_said():
    result = mq.quantize(tiny_llama(), activations="measured")
    assert set(named(result.model).values()) == {"auto"}
    assert any("no few layers suffice" in note for note in result.report.notes)


def test_every_road_to_a_suggestion_says_the_same(tmp_path):
    model = with_outliers(100.0)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = mq.suggest(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    model.save_pretrained(tmp_path / "floats")
    result = mq.quantize(model, fidelity=False)
    result.save(tmp_path / "int8")
    for source in (tmp_path / "floats", result.model, tmp_path / "int8", str(tmp_path / "int8")):
        assert mq.suggest(source) == found
    assert result.suggest() == found and set(named(result.model).values()) == {"auto"}
    fewer = mq.suggest(model, skip=["layers.0"], probe={"input_ids": torch.arange(20).view(2, 10)})
    assert fewer.probe == "the given inputs"
    assert {layer.name for layer in fewer.layers} == {x.name for x in found.layers if "layers.1" in x.name}
    tuned = mq.quantize(model, activations=found.activations, fidelity=False)
    assert named(tuned.model) == named(mq.quantize(model, activations="measured", fidelity=False).model)


def jamba():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 200, "num_attention_heads": 4}
    config = hf.JambaConfig(
        **sizes, num_hidden_layers=2, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=16,
        use_mamba_kernels=False,
    )  # fmt: skip
    return hf.JambaForCausalLM(config)


def qwen3_next():
    config = hf.Qwen3NextConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=32, shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return hf.Qwen3NextForCausalLM(config)


def lively(make):
    """A model whose blocks matter: what they start with hardly adds to the residual stream."""
    model = seeded(make).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() > 1:
                noise = seeded(lambda p=parameter: torch.randn(p.shape), i)
                parameter += noise * 0.5 / parameter[0].numel() ** 0.5
    return model


MIXERS = {
    "mamba": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=64, state_size=16, num_hidden_layers=2, vocab_size=200)),
        "mixer", {"in_proj", "x_proj", "out_proj"},
    ),
    "jamba": (jamba, "mamba", {"in_proj", "x_proj", "out_proj"}),
    "qwen3_next": (qwen3_next, "linear_attn", {"in_proj_qkvz", "out_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXERS)
def test_blocks_with_a_recurrence_get_a_wide_scheme_unless_something_else_is_asked_for(name):
    make, block, projections = MIXERS[name]
    model = lively(make)
    result = mq.quantize(model, fidelity=False)
    wide = {n for n, s in named(result.model).items() if s == "int12"}
    assert wide == {n for n in named(result.model) if f".{block}." in n}
    assert {n.rpartition(".")[2] for n in wide} >= projections
    assert (
        "int12",
        BLOCKS["recurrence"],
        [n for n in named(result.model) if n in wide],
    ) in result.report.schemes()
    assert set(named(mq.quantize(model, fidelity=False, activations="int8").model).values()) == {"int8"}
    # with 8 bits in the other layers, so that the path has no say
    x = {"input_ids": seeded(lambda: torch.randint(0, 200, (2, 24))), "use_cache": False}
    floats = copy.deepcopy(result.model).dequantize()
    with torch.no_grad(), kernels.using(activations="int8"):
        exact, value = floats(**x).logits, result.model(**x).logits
        narrow = mq.quantize(model, fidelity=False, activations="int8").model(**x).logits
    assert relative_error(exact, value) < 0.75 * relative_error(exact, narrow)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_adapters_that_are_merged_leave_the_schemes(tmp_path):
    peft = pytest.importorskip("peft")
    model = mq.quantize(
        tiny_llama(), activations={"*.q_proj": "int12", "*.v_proj": "int8-g64"}, fidelity=False
    ).model
    before = named(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    merged = adapted.merge_and_unload()
    assert named(merged) == before
    merged.save_pretrained(tmp_path / "merged")
    assert named(mq.load(tmp_path / "merged")) == before
    shutil.rmtree(tmp_path / "merged")


def test_a_layer_whose_own_plain_attribute_has_that_name_stays_in_float():
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.activations = "mine"
    report = mq.quantize(model, fidelity=False).report
    (row,) = (r for r in report.rows if r.name == "model.layers.0.mlp.down_proj.weight")
    assert row.action == "kept" and "attributes of its own (activations)" in row.reason
