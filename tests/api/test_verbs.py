"""The public verbs: what they promise, and every verified defect of the original mono-quant as a test that passes."""

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from models import (
    FAMILIES,
    Attention,
    Cnn,
    encoder,
    is_plain,
    relative_error,
    run,
    seeded,
    tiny_llama,
)
from safetensors.torch import load_file
from torch import nn
from verbs import QUIET, ROOT, Net, chosen, ids, kept, net

import mono_quant as mq
from mono_quant.convert import halves, int8
from mono_quant.convert.int8_layers import Int8Linear
from mono_quant.errors import ConfigError, Fp16RangeError, NonFiniteWeightError, PatternError


def test_dynamic_quantize_returns_a_model_and_the_skipped_names():
    model = net()
    converted, skipped = mq.dynamic_quantize(model)
    assert type(converted) is Net and converted is not model
    assert isinstance(converted.shared, Int8Linear) and type(model.shared) is nn.Linear
    assert sorted(skipped) == ["embed", "small"]
    with torch.no_grad():
        assert relative_error(model(ids()), converted(ids())) < 0.02


@pytest.mark.parametrize("dtype", ["int8", "INT8", "qint8", "torch.qint8", "torch.int8", torch.int8, "torch"])
def test_spellings_of_int8(dtype):
    dtype = torch.qint8 if dtype == "torch" else dtype
    assert mq.quantize(net(), dtype, **QUIET).config.dtype == "int8"
    assert mq.QuantizationConfig(dtype=dtype).dtype == "int8"


@pytest.mark.parametrize("dtype", ["fp16", "float16", "half", "torch.float16", torch.float16, torch.half])
def test_spellings_of_fp16(dtype):
    assert mq.quantize(net(), dtype, **QUIET).report.dtype == "fp16"


@pytest.mark.parametrize("dtype", ["int4", torch.bfloat16, torch.quint8, 8, None, "", []])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ConfigError, match=r"dtype is .*use 'int8' or 'fp16'"):
        mq.quantize(net(), dtype)


@pytest.mark.parametrize("form", [dict, mq.QuantizationConfig])
def test_arguments_win_over_config_and_config_over_defaults(form):
    config = form(dtype="fp16", skip=("small",), min_params=10, fidelity=False)
    result = mq.quantize(net(), config=config)
    assert (result.config.dtype, result.config.skip, result.config.min_params) == ("fp16", ("small",), 10)
    result = mq.quantize(net(), "int8", config=config, skip=["shared"], min_params=0)
    assert (result.config.dtype, result.config.skip, result.config.min_params) == ("int8", ("shared",), 0)
    # also an argument that equals the default
    assert mq.quantize(net(), "int8", config=config, skip=()).config.skip == ()


def test_unknown_options_and_values_are_refused():
    for options, text in (
        ({"skipp": "x"}, "unknown option 'skipp'.*skip"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'.*'keep'"),
        ({"min_params": 1.5}, "min_params is 1.5.*whole number"),
        ({"disable_defaults": ["heads"]}, "unknown rules.*head"),
        ({"skip": [""]}, "is empty"),
        ({"skip": ["re:("]}, "no valid regular expression"),
        ({"config": 3}, "config is a int"),
    ):
        with pytest.raises(ConfigError, match=text):
            mq.quantize(net(), **options)


def test_the_config_round_trips():
    config = mq.QuantizationConfig(
        "fp16", ("a", "re:b"), ("Linear",), 7, ("head",), True, "keep", "error", False
    )
    assert mq.QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_settings_of_the_process_are_untouched(monkeypatch):
    def settings():
        return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), Path.cwd()

    before = settings()
    mq.quantize(net(), probe=ids())
    assert settings() == before


def test_import_does_not_import_transformers():
    code = "import sys, mono_quant; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("shared", {"shared"}),
        ("deep", {"deep.inner.0", "deep.inner.2"}),
        ("inner", {"deep.inner.0", "deep.inner.2"}),
        ("deep.inner.0", {"deep.inner.0"}),
        ("deep.inner.*", {"deep.inner.0", "deep.inner.2"}),
        ("*.[02]", {"deep.inner.0", "deep.inner.2"}),
        (r"re:deep\.inner\.\d", {"deep.inner.0", "deep.inner.2"}),
        ("again", {"shared"}),
    ],
)
def test_skip_patterns(dtype, pattern, hit):
    result = mq.quantize(net(), dtype, skip=pattern, **QUIET)
    linears = {"deep.inner.0", "deep.inner.2", "shared"}
    for name in linears:
        weight = result.model.get_submodule(name)._parameters["weight"]
        assert (weight.dtype == torch.float32) == (name in hit), name
    by_user = {row.module for row in result.report.skipped if row.reason == f"skipped by the user: {pattern}"}
    assert by_user == hit


@pytest.mark.parametrize("pattern", ["har", "re:shar", "Shared", "shared.", "deep.inner.*.x", "re:.*nothing"])
def test_a_pattern_that_matches_nothing_names_near_ones(pattern):
    with pytest.raises(PatternError, match=re.escape(repr(pattern)) + ".*(near names:|are named) ") as caught:
        mq.quantize(net(), skip=["small", pattern])
    if "shar" in pattern.lower():
        assert "shared" in str(caught.value)
    for verb in (mq.dynamic_quantize, mq.plan):
        with pytest.raises(PatternError):
            verb(net(), skip=pattern)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_type_of_container_keeps_everything_inside_it(dtype):
    for report in (
        mq.plan(tiny_llama(), dtype, skip_types=["LlamaMLP"]),
        mq.quantize(tiny_llama(), dtype, skip_types=["LlamaMLP"], **QUIET).report,
    ):
        kept = {row.name: row.reason for row in report.rows if ".mlp." in row.name}
        assert len(kept) == 6 and set(kept.values()) == {"skipped by the user: type LlamaMLP"}


def test_a_conversion_that_changes_nothing_says_so():
    for report in (mq.plan(net(), skip=["*"]), mq.quantize(net(), skip=["*"], **QUIET).report):
        assert any(
            "NO LAYER BECAME INT8" in note and "skipped by the user: *" in note for note in report.notes
        )
    assert not any(
        "NO LAYER" in note for note in mq.quantize(net(), "fp16", skip=["*"], **QUIET).report.notes
    )


def test_values_that_are_not_finite_outside_of_int8_are_noted():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    model[1].weight.data[3] = torch.nan
    assert any("'1.weight'; check the original" in n for n in mq.quantize(model, **QUIET).report.notes)


def test_skips_by_type_size_and_alias_add_to_the_defaults():
    assert not chosen(mq.quantize(net(), skip_types=["Linear"], **QUIET))
    assert not chosen(mq.quantize(net(), skip_types=[nn.Linear], **QUIET))
    assert chosen(mq.quantize(net(), min_params=64 * 65, **QUIET)) == ["deep.inner.0", "deep.inner.2"]
    result = mq.quantize(net(), modules_to_not_convert=["deep"], **QUIET)
    assert chosen(result) == ["shared"] and {"embed", "small"} <= kept(result).keys()
    with pytest.raises(PatternError, match=r"type 'Conv9d' is no module.*Linear"):
        mq.quantize(net(), skip_types=["Conv9d"])


def test_a_default_is_lifted_by_its_name_only():
    assert "small" in kept(mq.quantize(net(), skip=["shared"], **QUIET))
    assert "small" in chosen(mq.quantize(net(), disable_defaults=["small"], **QUIET))
    model = tiny_llama()
    assert "lm_head" in kept(mq.quantize(model, skip=["q_proj"], **QUIET))
    assert "lm_head" in chosen(mq.quantize(model, disable_defaults=["head"], **QUIET))


def test_layers_that_engines_fuse_are_decided_together():
    reasons = kept(
        mq.quantize(tiny_llama(), skip=["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"], **QUIET)
    )
    for name in ("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj", "layers.1.mlp.gate_proj"):
        assert "decided together" in reasons[f"model.{name}"]
    assert "model.layers.0.self_attn.o_proj" not in reasons


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_hooks_are_kept(dtype):
    model, calls = net(), []
    model.shared.register_forward_hook(lambda *_: calls.append("after"))
    model.shared.register_forward_pre_hook(lambda m, a, k: calls.append("before"), with_kwargs=True)
    model.deep["inner"][0].register_forward_hook(lambda *_, **__: calls.append("always"), always_call=True)
    result = mq.quantize(model, dtype, **QUIET)
    result.model(ids())
    assert sorted(calls) == sorted(["before", "after"] * 2 + ["always"])
    calls.clear()
    model(ids())
    assert len(calls) == 5


def held(module):
    """The Parameter itself; reading `.weight` of a converted layer makes a float copy."""
    return module._parameters["weight"]


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_shared_modules_and_ties_stay_shared(dtype):
    result = mq.quantize(net(), dtype, **QUIET)
    model = result.model
    assert model.again is model.shared
    assert held(model.out) is held(model.embed)
    assert [r.module for r in result.report.quantized if r.kind == "linear"].count("shared") == 1
    shared = {r.name: r.reason for r in result.report.rows if r.action == "shared"}
    assert shared == {
        "again.weight": "shared.weight",
        "again.bias": "shared.bias",
        "out.weight": "embed.weight",
    }


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_views_and_ties_survive_a_round_trip(dtype, tmp_path):
    model = net()
    storage = torch.randn(3, 64, 64)
    model.shared.weight = nn.Parameter(storage[1])
    model.deep["inner"][0].weight = nn.Parameter(torch.randn(64, 96).t())
    result = mq.quantize(model, dtype, **QUIET)
    loaded = mq.load(result.save(tmp_path / "out"), model=net)
    assert torch.equal(run(loaded, {"ids": ids()}), run(result.model, {"ids": ids()}))
    assert loaded.again is loaded.shared and held(loaded.out) is held(loaded.embed)


def test_inplace_converts_the_model_itself():
    model = net()
    untouched, embed = copy.deepcopy(model), model.embed
    result = mq.quantize(model, inplace=True, **QUIET)
    assert result.model is model and model.embed is embed and isinstance(model.again, Int8Linear)
    expected = mq.quantize(untouched, **QUIET).model
    assert torch.equal(model(ids()), expected(ids()))


def photograph(model):
    """Every module, attribute, registry and tensor, by identity; tensors also by value."""
    parts = {}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        parts[name] = (id(module), attributes)
    tensors = {n: (id(t), t.data_ptr(), t.dtype, t.detach().clone()) for n, t in model.named_parameters()}
    tensors |= {n: (id(t), t.data_ptr(), t.dtype, t.detach().clone()) for n, t in model.named_buffers()}
    return parts, tensors


def assert_same(one, other):
    assert one[0].keys() == other[0].keys() and one[1].keys() == other[1].keys()
    for name, (identity, attributes) in one[0].items():
        assert other[0][name][0] == identity, name
        assert other[0][name][1].keys() == attributes.keys(), name
        for key, value in attributes.items():
            now = other[0][name][1][key]
            if isinstance(value, dict):
                assert list(now) == list(value), (name, key)
                assert all(now[k] is value[k] for k in value), (name, key)
            else:
                assert now is value or now == value, (name, key)
    for name, (*facts, value) in one[1].items():
        assert list(other[1][name][:3]) == facts and torch.equal(other[1][name][3], value), name


ROLLED_BACK = {
    "net": net,
    "cnn": lambda: seeded(Cnn),
    "encoder": lambda: seeded(encoder).eval(),
    "attention": lambda: seeded(Attention).eval(),
    "llama": tiny_llama,
    "mixtral": FAMILIES["mixtral"].build,
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ROLLED_BACK)
def test_a_failure_at_any_layer_puts_everything_back(monkeypatch, name, error):
    model = ROLLED_BACK[name]()
    leaf = next(m for m in model.modules() if not list(m.children()))
    leaf.register_forward_hook(lambda *_: None)
    next(model.parameters()).requires_grad_(False)
    before, real = photograph(model), int8.encode
    total = len({r.module for r in mq.plan(model).quantized})
    for k in range(total):
        calls = []

        def fail(module, layer, calls=calls, k=k):
            calls.append(layer.name)
            if len(calls) == k + 1:
                raise error("injected")
            return real(module, layer)

        monkeypatch.setattr(int8, "encode", fail)
        with pytest.raises(error, match="injected"):
            mq.quantize(model, inplace=True, **QUIET)
        assert len(calls) == k + 1
        assert_same(before, photograph(model))
    monkeypatch.setattr(int8, "encode", real)
    assert chosen(mq.quantize(model, inplace=True, **QUIET))


@pytest.mark.parametrize("name", ["net", "cnn", "llama"])
def test_fp16_a_failure_at_any_tensor_puts_everything_back(monkeypatch, name):
    model = ROLLED_BACK[name]()
    before, real, calls = photograph(model), halves.cast_half, []
    monkeypatch.setattr(halves, "cast_half", lambda t, dtype: calls.append(1) or real(t, dtype))
    mq.quantize(model, "fp16", **QUIET)
    for k in range(len(calls)):
        done = []

        def fail(tensor, dtype, done=done, k=k):
            done.append(1)
            if len(done) == k + 1:
                raise RuntimeError("injected")
            return real(tensor, dtype)

        monkeypatch.setattr(halves, "cast_half", fail)
        with pytest.raises(RuntimeError, match="injected"):
            mq.quantize(model, "fp16", inplace=True, **QUIET)
        assert_same(before, photograph(model))


def test_a_failure_while_measuring_puts_everything_back():
    model = net()
    before = photograph(model)
    with pytest.raises(ConfigError, match="cannot be measured"):
        mq.quantize(model, inplace=True, probe=torch.full((2, 2), 10**6))
    assert_same(before, photograph(model))


def facts(report):
    return [
        (
            r.name,
            r.module,
            r.kind,
            r.shape,
            r.dtype_before,
            r.dtype_after,
            r.bytes_before,
            r.bytes_after,
            r.action,
            r.reason,
        )
        for r in report.rows
    ]


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_plan_says_what_quantize_does(monkeypatch, tmp_path, name, dtype):
    model = FAMILIES[name].build()
    expected = mq.quantize(model, dtype, **QUIET).report
    planned = mq.plan(model, dtype)
    assert planned.planned and not expected.planned
    assert facts(planned) == facts(expected)
    assert (planned.bytes_after, planned.coverage) == (expected.bytes_after, expected.coverage)
    if is_plain(model) or dtype == "fp16" and name not in ("bert", "t5", "mixtral"):
        return
    model.save_pretrained(tmp_path / "float")
    monkeypatch.setattr(
        "mono_quant.io.tensors.checkpoint.Checkpoint.__getitem__", lambda *_: pytest.fail("a weight was read")
    )
    assert facts(mq.plan(tmp_path / "float", dtype)) == facts(expected)


def test_plan_takes_the_options_and_reads_no_values():
    model = net()
    model.shared.weight.data.fill_(float("nan"))
    assert [r.module for r in mq.plan(model, skip=["inner"]).quantized] == ["shared"]
    assert "would become" in mq.plan(model).table()
    with pytest.raises(NonFiniteWeightError, match=r"shared\.weight"):
        mq.quantize(model)


def test_the_report_round_trips_as_json_and_reads_as_a_table():
    report = mq.quantize(net(), probe=ids()).report
    assert type(report).from_dict(json.loads(report.to_json())) == report
    table = report.table()
    for text in ("became int8", "smaller", "layers kept in float", "embed", "relative error"):
        assert text in table


def test_fidelity_numbers_are_the_textbook_ones():
    model = tiny_llama()
    inputs = FAMILIES["llama"].inputs()
    result = mq.quantize(model, probe=inputs)
    mask = inputs["attention_mask"].bool()
    r, y = (run(m, inputs)[mask].double().numpy() for m in (model, result.model))
    found = result.report.fidelity
    p, q = (numpy.exp(v - v.max(1, keepdims=True)) for v in (r, y))
    p, q = (v / v.sum(1, keepdims=True) for v in (p, q))
    kl = (p * numpy.log(p / q)).sum(1)
    cosine = (r * y).sum(1) / numpy.linalg.norm(r, axis=1) / numpy.linalg.norm(y, axis=1)
    assert (found["output"], found["positions"], found["probe"]) == ("logits", 12, "the given inputs")
    assert found["relative_error"] == pytest.approx(numpy.linalg.norm(y - r) / numpy.linalg.norm(r), rel=1e-3)
    assert found["cosine_mean"] == pytest.approx(cosine.mean(), abs=1e-6)
    assert found["cosine_min"] == pytest.approx(cosine.min(), abs=1e-6)
    assert found["kl_mean"] == pytest.approx(kl.mean(), rel=1e-3)
    assert found["kl_p99"] == pytest.approx(numpy.quantile(kl, 0.99), rel=1e-3)
    assert found["top1_agreement"] == pytest.approx((r.argmax(1) == y.argmax(1)).mean(), abs=1e-3)


def test_fidelity_of_an_identical_model_is_perfect():
    model = tiny_llama()
    found = mq.quantize(model, skip=["*"], probe=FAMILIES["llama"].inputs()).report.fidelity
    assert found["relative_error"] == found["kl_mean"] == found["kl_p99"] == 0.0
    assert found["cosine_mean"] == found["cosine_min"] == found["top1_agreement"] == 1.0
    assert "non_finite_positions" not in found


def test_a_wrong_scale_is_noticed(monkeypatch):
    right = mq.quantize(net(), probe=ids()).report.fidelity["relative_error"]
    real = int8.build

    def wrong(module, kind, encoded):
        layer = real(module, kind, encoded)
        layer._parameters["weight_scale"].data = layer.scale() * 1.1
        return layer

    monkeypatch.setattr(int8, "build", wrong)
    assert mq.quantize(net(), probe=ids()).report.fidelity["relative_error"] > max(10 * right, 0.02)


def test_measuring_disturbs_nothing():
    model = seeded(Net)
    model.drop = nn.Dropout()
    model.train()
    states = torch.get_rng_state(), random.getstate()
    result = mq.quantize(model, probe=ids())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(m.training for m in model.modules()) and all(m.training for m in result.model.modules())


@pytest.mark.parametrize("probe", [ids(), (ids(),), {"ids": ids()}])
def test_probes_in_every_form(probe):
    assert mq.quantize(net(), probe=probe).report.fidelity["relative_error"] < 0.02


def test_a_model_that_cannot_be_measured_says_why():
    assert "pass probe=" in mq.quantize(net()).report.fidelity_note
    assert mq.quantize(net(), probe=ids(), fidelity=False).report.fidelity is None
    with pytest.raises(ConfigError, match=r"cannot be measured.*probe="):
        mq.quantize(net(), fidelity=True)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_by_name_or_kept(dtype, value, tmp_path):
    model = net()
    model.shared.weight.data[3, 5] = value
    with pytest.raises(
        NonFiniteWeightError, match=r"shared\.weight: 1 of 4096 .*first at \[3, 5\].*on_nonfinite='keep'"
    ):
        mq.quantize(model, dtype, **QUIET)
    result = mq.quantize(model, dtype, on_nonfinite="keep", **QUIET)
    assert "NaN or infinity" in kept(result)["shared"]
    assert result.model.shared.weight.dtype == torch.float32
    loaded = mq.load(result.save(tmp_path / "out"), model=net)
    assert torch.equal(
        run(loaded, {"ids": ids()}).nan_to_num(), run(result.model, {"ids": ids()}).nan_to_num()
    )


def test_a_non_finite_bias_is_passed_through_by_int8_and_refused_by_fp16():
    model = net()
    model.shared.bias.data[0] = float("nan")
    assert "shared" in chosen(mq.quantize(model, **QUIET))
    with pytest.raises(NonFiniteWeightError, match=r"shared\.bias"):
        mq.quantize(model, "fp16", **QUIET)


@pytest.mark.parametrize("value", [65_520.0, 1e6, -1e6])
def test_a_value_that_overflows_keeps_its_layer(value, tmp_path):
    model = net()
    model.shared.weight.data[0, 0] = value
    with pytest.raises(
        Fp16RangeError, match=r"shared\.weight: 1 values do not fit float16.*on_overflow='keep'"
    ):
        mq.quantize(model, "fp16", on_overflow="error", **QUIET)
    result = mq.quantize(model, "fp16", probe=ids())
    assert "which float16 cannot hold" in kept(result)["shared"]
    row = next(r for r in result.report.rows if r.name == "shared.weight")
    assert (row.dtype_after, row.bytes_after) == ("float32", 4 * 4096)
    assert result.report.bytes_after == sum(
        t.nbytes for t in load_file(result.save(tmp_path / "out") / "model.safetensors").values()
    )
    output = run(result.model, {"ids": ids()})
    assert torch.isfinite(result.model.shared(torch.zeros(1, 64))).all()
    assert torch.equal(
        run(mq.load(tmp_path / "out", model=net), {"ids": ids()}).nan_to_num(), output.nan_to_num()
    )


def test_an_overflow_in_a_transformers_model_round_trips(tmp_path):
    model, inputs = tiny_llama(), FAMILIES["llama"].inputs()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    # the activation at the large weight is small, so that the products fit
    model.model.layers[0].post_attention_layernorm.weight.data[0] = 1e-3
    result = mq.quantize(model, "fp16", probe=inputs)
    assert set(kept(result)) == {"model.layers.0.mlp.up_proj"}
    loaded = mq.load(result.save(tmp_path / "out"))
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    output = run(loaded, inputs)
    assert torch.equal(output, run(result.model, inputs)) and torch.isfinite(output).all()
    assert relative_error(run(model, inputs), output) < 0.05


def test_activations_that_float16_cannot_hold_are_reported(tmp_path):
    """Weights that fit do not make activations fit: float32 arithmetic holds them, and the report, its table and the card
    say what float16 arithmetic would do."""
    model = net()
    model.norm.weight.data.fill_(6e4)
    model.out.weight = nn.Parameter(torch.ones(80, 64))
    model.embed.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    result = mq.quantize(model, "fp16", probe=ids())
    peaks = []
    for module in model.modules():
        module.register_forward_hook(lambda m, a, y: peaks.append(float(y.detach().abs().max())))
    model(ids())
    assert max(peaks) > 65504
    assert result.report.fidelity["peak_activation"] == pytest.approx(max(peaks), rel=1e-3)
    assert result.report.fidelity["relative_error"] < 1e-3
    assert type(result.report).from_dict(json.loads(result.report.to_json())) == result.report
    assert "warning activations reach" in result.report.table() and "beyond 65504" in result.report.table()
    card = (result.save(tmp_path / "out") / "README.md").read_text()
    assert "Warning: activations reach" in card
    assert not torch.isfinite(result.model.half()(ids())).all()


def test_a_model_whose_output_is_no_number_is_reported():
    model = net()
    model.norm.bias.data.fill_(float("inf"))
    result = mq.quantize(model, "fp16", on_nonfinite="keep", probe=ids())
    assert result.report.fidelity["relative_error"] is None
    assert type(result.report).from_dict(json.loads(result.report.to_json())) == result.report


def test_what_only_rounds_is_cast():
    model = net()
    model.shared.weight.data[0, 0] = 65_519.9
    result = mq.quantize(model, "fp16", on_overflow="error", **QUIET)
    assert result.model.shared.weight[0, 0] == 65_504


def test_the_share_of_flushed_values_is_reported():
    model = net()
    model.shared.weight.data[:10] = 1e-9
    model.shared.weight.data[10:12] = 0.0
    report = mq.quantize(model, "fp16", **QUIET).report
    assert {r.name: r.flushed for r in report.rows if r.flushed} == {"shared.weight": 640}
    assert f"640 non-zero values ({640 / report.parameters:.2%}) became zero" in report.table()


def test_a_unit_stays_together_when_one_member_is_kept_for_its_values():
    model = nn.ModuleDict({name: nn.Linear(128, 128) for name in ("q_proj", "k_proj", "v_proj")})
    with torch.no_grad():
        model["k_proj"].weight[0, 0] = float("nan")
    converted, skipped = mq.dynamic_quantize(model, on_nonfinite="keep")
    assert sorted(skipped) == ["k_proj", "q_proj", "v_proj"]
    assert all(type(m) is nn.Linear for m in converted.values())


def test_an_option_given_twice_under_two_names_is_refused():
    with pytest.raises(
        mq.MonoQuantError, match="min_params is given twice, the second time as skip_param_threshold=6"
    ):
        mq.dynamic_quantize(nn.Linear(64, 64), min_params=5, skip_param_threshold=6)
