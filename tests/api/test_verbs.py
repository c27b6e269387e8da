"""The public verbs: what they promise, and every verified defect of the original mono-quant as a test that passes."""

import copy
import json
import pickle
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
    Lstm,
    encoder,
    is_plain,
    relative_error,
    run,
    seeded,
    snapshot,
    tiny_llama,
)
from safetensors.torch import load_file
from torch import nn

import mono_quant as mq
from mono_quant.convert import half, int8
from mono_quant.convert.int8_layers import Int8Conv1d, Int8Conv2d, Int8Linear, Int8Module
from mono_quant.errors import ConfigError, Fp16RangeError, NonFiniteWeightError, PatternError

QUIET = {"fidelity": False}
ROOT = Path(mq.__file__).parent


class Net(nn.Module):
    """A nested net: a shared layer, a tie, a norm, a hook-carrying layer and a layer too small to gain."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.deep = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))})
        self.shared = nn.Linear(64, 64)
        self.again = self.shared
        self.norm = nn.LayerNorm(64)
        self.small = nn.Linear(64, 4)
        self.out = nn.Linear(64, 80, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(x + self.again(self.shared(self.deep["inner"](x))))
        return self.out(x) + self.small(x).sum(-1, keepdim=True)


def net():
    return seeded(Net).eval()


def ids():
    return seeded(lambda: torch.randint(0, 80, (3, 5)))


def kept(result):
    return {row.module: row.reason for row in result.report.skipped}


def chosen(result):
    return [row.module for row in result.report.quantized]


# --- the contract ---------------------------------------------------------------------------------------------------


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


def test_M10_the_settings_of_the_process_are_untouched(monkeypatch):
    def settings():
        return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), Path.cwd()

    before = settings()
    mq.quantize(net(), probe=ids())
    assert settings() == before


def test_import_does_not_import_transformers():
    code = "import sys, mono_quant; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0


# --- selection ------------------------------------------------------------------------------------------------------


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


# --- hooks, sharing, ties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_M4_hooks_are_kept(dtype):
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
def test_M5_W8_shared_modules_and_ties_stay_shared(dtype):
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
def test_W8_views_and_ties_survive_a_round_trip(dtype, tmp_path):
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
def test_M8_a_failure_at_any_layer_puts_everything_back(monkeypatch, name, error):
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
def test_M8_fp16_a_failure_at_any_tensor_puts_everything_back(monkeypatch, name):
    model = ROLLED_BACK[name]()
    before, real, calls = photograph(model), half.cast_half, []
    monkeypatch.setattr(half, "cast_half", lambda t: calls.append(1) or real(t))
    mq.quantize(model, "fp16", **QUIET)
    for k in range(len(calls)):
        done = []

        def fail(tensor, done=done, k=k):
            done.append(1)
            if len(done) == k + 1:
                raise RuntimeError("injected")
            return real(tensor)

        monkeypatch.setattr(half, "cast_half", fail)
        with pytest.raises(RuntimeError, match="injected"):
            mq.quantize(model, "fp16", inplace=True, **QUIET)
        assert_same(before, photograph(model))


def test_M8_a_failure_while_measuring_puts_everything_back():
    model = net()
    before = photograph(model)
    with pytest.raises(ConfigError, match="cannot be measured"):
        mq.quantize(model, inplace=True, probe=torch.full((2, 2), 10**6))
    assert_same(before, photograph(model))


# --- plan -----------------------------------------------------------------------------------------------------------


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


# --- fidelity -------------------------------------------------------------------------------------------------------


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


# --- values that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_W1_non_finite_weights_are_refused_by_name_or_kept(dtype, value, tmp_path):
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


def test_W1_a_non_finite_bias_is_passed_through_by_int8_and_refused_by_fp16():
    model = net()
    model.shared.bias.data[0] = float("nan")
    assert "shared" in chosen(mq.quantize(model, **QUIET))
    with pytest.raises(NonFiniteWeightError, match=r"shared\.bias"):
        mq.quantize(model, "fp16", **QUIET)


@pytest.mark.parametrize("value", [65_520.0, 1e6, -1e6])
def test_W6_a_value_that_overflows_keeps_its_layer(value, tmp_path):
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


def test_W6_an_overflow_in_a_transformers_model_round_trips(tmp_path):
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


def test_W6_activations_that_float16_cannot_hold_are_reported(tmp_path):
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


def test_W6_what_only_rounds_is_cast():
    model = net()
    model.shared.weight.data[0, 0] = 65_519.9
    result = mq.quantize(model, "fp16", on_overflow="error", **QUIET)
    assert result.model.shared.weight[0, 0] == 65_504


def test_W6_the_share_of_flushed_values_is_reported():
    model = net()
    model.shared.weight.data[:10] = 1e-9
    model.shared.weight.data[10:12] = 0.0
    report = mq.quantize(model, "fp16", **QUIET).report
    assert {r.name: r.flushed for r in report.rows if r.flushed} == {"shared.weight": 640}
    assert f"640 non-zero values ({640 / report.parameters:.2%}) became zero" in report.table()


# --- the defects of the original (peers.md, section 4) --------------------------------------------------------------


@pytest.mark.parametrize("form", [str, Path, lambda p: f"{p}/", lambda p: Path(p) / "deep" / "er"])
def test_original_defect_01_save_in_every_form_works(tmp_path, form):
    out = mq.quantize(seeded(Lstm), **QUIET).save(form(tmp_path / "out"))
    assert (out / "model.safetensors").is_file() and mq.load(out, model=Lstm()).out.weight.shape == (100, 64)


def test_original_defect_02_str_and_path_behave_alike(tmp_path):
    result = mq.quantize(seeded(Lstm), **QUIET)
    one, two = result.save(str(tmp_path / "a")), result.save(tmp_path / "b")
    assert type(one) is type(two) and snapshot(one) == snapshot(two)
    assert type(mq.load(str(one), model=Lstm)) is type(mq.load(two, model=Lstm))


def test_original_defect_03_bytes_on_disk_equal_the_report(tmp_path):
    result = mq.quantize(net(), **QUIET)
    tensors = load_file(result.save(tmp_path / "out") / "model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == result.report.bytes_after < result.report.bytes_before


def test_original_defect_04_dtypes_on_disk(tmp_path):
    tensors = load_file(mq.quantize(net(), **QUIET).save(tmp_path / "out") / "model.safetensors")
    codes = {n for n, t in tensors.items() if t.dtype == torch.int8}
    assert codes == {"deep.inner.0.weight", "deep.inner.2.weight", "shared.weight"}
    assert {t.dtype for n, t in tensors.items() if n not in codes} == {torch.float32}
    assert not [n for n in tensors if "zero_point" in n]


def test_original_defect_05_no_mode_without_a_proven_bound():
    with pytest.raises(ConfigError, match="dtype is 'int4'"):
        mq.quantize(net(), "int4")
    model = net()
    converted = mq.quantize(model, **QUIET).model
    for name in ("shared", "deep.inner.0", "deep.inner.2"):
        before, layer = model.get_submodule(name).weight, converted.get_submodule(name)
        assert ((before - layer.weight).abs() <= layer.scale() * 0.50001).all()


def test_original_defect_06_sqnr_and_ratio_are_right():
    model = net()
    result = mq.quantize(model, **QUIET)
    for row in result.report.quantized:
        weight = model.get_submodule(row.module).weight.detach().double().numpy()
        scale = numpy.abs(weight).max(1, keepdims=True) / 127
        noise = weight - numpy.round(weight / scale) * scale
        assert row.sqnr_db == pytest.approx(10 * numpy.log10((weight**2).sum() / (noise**2).sum()), abs=0.01)
    large = mq.quantize(nn.Sequential(nn.Linear(512, 512)), **QUIET).report
    assert large.bytes_before / large.bytes_after == pytest.approx(4 * 513 / (512 + 8), rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_original_defect_07_skipped_names_exist(name):
    model = FAMILIES[name].build()
    names = dict(model.named_modules())
    for dtype in ("int8", "fp16"):
        converted, skipped = mq.dynamic_quantize(model, dtype)
        assert set(skipped) <= names.keys()
        assert not [n for n in skipped if isinstance(converted.get_submodule(n), Int8Module)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "cnn", "encoder", "attention"])
def test_original_defect_08_a_result_can_be_cast(name, dtype):
    family = FAMILIES[name]
    result = mq.quantize(family.build(), **QUIET)
    expected = run(result.model, family.inputs())
    scales = {n: p.clone() for n, p in result.model.named_parameters() if n.endswith("_scale")}
    model = copy.deepcopy(result.model).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.inputs().items()}
    output = run(model, inputs)
    assert output.dtype == dtype and relative_error(expected, output) < 0.05
    for n, scale in scales.items():
        assert torch.equal(dict(model.named_parameters())[n], scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_original_defect_09_every_float_dtype_is_quantized(dtype):
    model = net().to(dtype)
    result = mq.quantize(model, **QUIET)
    assert chosen(result) == ["deep.inner.0", "deep.inner.2", "shared"]
    output = result.model(ids())
    assert output.dtype == dtype and relative_error(model(ids()), output) < 0.05


def test_original_defect_10_fp16_runs_with_batchnorm_and_honours_skips(tmp_path):
    model, x = seeded(Cnn).eval(), seeded(lambda: torch.randn(2, 3, 16, 16))
    result = mq.quantize(model, "fp16", skip=["bn2", "fc"], probe=x)
    folder = result.save(tmp_path / "out")
    dtypes = {n: t.dtype for n, t in load_file(folder / "model.safetensors").items()}
    assert {n.split(".")[0] for n, d in dtypes.items() if d == torch.float32} == {"bn2", "fc"}
    assert dtypes["bn.running_mean"] == torch.float16 and dtypes["bn.num_batches_tracked"] == torch.int64
    output = result.model(x)
    assert relative_error(model(x), output) < 1e-3
    assert torch.isfinite(result.model(x.half())).all()
    assert torch.equal(mq.load(folder, model=Cnn)(x), output)


@pytest.mark.parametrize("name", ["llama", "gpt2", "cnn", "attention"])
def test_original_defect_11_compiles_in_one_graph(name):
    family = FAMILIES[name]
    model = mq.quantize(family.build(), **QUIET).model
    expected = run(model, family.inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(**family.inputs())
    assert torch.allclose(
        out if isinstance(out, torch.Tensor) else out.logits, expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "cnn", "attention"])
def test_original_defect_12_all_tensors_are_registered(name):
    model = mq.quantize(FAMILIES[name].build(), **QUIET).model
    layers = [m for m in model.modules() if isinstance(m, Int8Module)]
    assert layers
    for layer in layers:
        loose = [k for k, v in vars(layer).items() if isinstance(v, torch.Tensor)]
        assert not loose
        assert all(type(p) is nn.Parameter and type(p.data) is torch.Tensor for p in layer.parameters())
    moved = copy.deepcopy(model).to("meta")
    assert {t.device.type for t in [*moved.parameters(), *moved.buffers()]} == {"meta"}
    again = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    again.load_state_dict(model.state_dict(), strict=True)


CONVS = [
    {"padding": 1},
    {"padding": "same", "kernel_size": 4},
    {"padding": "valid", "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": 1, "groups": 2},
    {"padding": 1, "bias": False},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("options", CONVS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(
    ("float_class", "int8_class", "size"), [(nn.Conv1d, Int8Conv1d, (31,)), (nn.Conv2d, Int8Conv2d, (9, 11))]
)
def test_original_defect_13_every_conv_option_works(float_class, int8_class, size, options):
    layer = seeded(lambda: nn.Sequential(float_class(64, 64, **{"kernel_size": 3, **options}))).eval()
    x = seeded(lambda: torch.randn(2, 64, *size))
    converted = mq.quantize(layer, **QUIET).model
    assert type(converted[0]) is int8_class
    for given in (x, x[0], x[:0]):
        output, expected = converted(given), layer(given)
        assert output.shape == expected.shape
        assert not given.numel() or relative_error(expected, output) < 0.02


def test_original_defect_14_an_option_has_an_effect_or_raises():
    for option, value in (("per_channel", False), ("symmetric", False), ("dynamic", False)):
        with pytest.raises(ConfigError, match=f"{option}=False is not supported"):
            mq.quantize(net(), **{option: value})
        assert mq.quantize(net(), **{option: True}, **QUIET)
    assert "tied" in kept(mq.quantize(net(), embeddings=True, **QUIET))["embed"]
    with pytest.raises(ConfigError, match=r"'tied', which cannot be lifted.*Untie them first"):
        mq.quantize(net(), embeddings=True, disable_defaults=["tied"], **QUIET)
    assert chosen(mq.quantize(seeded(Lstm), embeddings=True, **QUIET)) == ["emb", "out"]


@pytest.mark.parametrize("name", FAMILIES)
def test_original_defect_15_the_way_back_to_float(name):
    model = FAMILIES[name].build()
    result = mq.quantize(model, **QUIET)
    for row in result.report.quantized:
        owner, _, last = row.name.rpartition(".")
        layer, before = result.model.get_submodule(owner), model.get_parameter(row.name).float()
        # fused experts are read by transformers as codes; the others show their float weight as an attribute
        back = layer.dequantize(last) if row.kind == "experts" else getattr(layer, last)
        assert back.dtype == model.get_parameter(row.name).dtype and back.shape == before.shape
        scale = layer.scale(last)
        if layer.kind == "transposed_linear":
            scale = scale.t()
        elif before.dim() == 4:
            scale = scale[:, :, None, None]
        # half a step, and for bf16 half a unit of the last place of the product
        slack = 0.5 * scale * 1.0001 + (before.abs() * 2**-8 if back.dtype == torch.bfloat16 else 0.0)
        assert ((before - back.float()).abs() <= slack).all(), row.name


def test_original_defect_16_rounding_is_exact_at_the_edges():
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    steps = torch.cat([
        torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]),
        torch.arange(55.0),
    ])
    layer[0].weight.data = (steps * 0.25).repeat(64, 1)
    codes = mq.quantize(layer, **QUIET).model[0].codes()
    assert codes[0, :9].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126]
    assert codes[0, 9:].tolist() == list(range(55))


@pytest.mark.parametrize("name", FAMILIES)
def test_original_defect_17_the_report_lists_every_quantized_layer(name):
    result = mq.quantize(FAMILIES[name].build(), **QUIET)
    layers = {n for n, m in result.model.named_modules() if isinstance(m, Int8Module)}
    listed = set(chosen(result))
    assert listed and layers - {f"{n}.out_proj" for n in listed} == listed


def test_original_defect_18_one_source_of_the_version(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "mono_quant", "--version"],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    manifest = json.loads(
        (mq.quantize(net(), **QUIET).save(tmp_path / "out") / "mono_quant.json").read_text()
    )
    assert out.strip() == mq.__version__ == manifest["mono_quant_version"]


def test_original_defect_19_patterns_are_patterns():
    assert chosen(mq.quantize(net(), skip=["deep.*"], **QUIET)) == ["shared"]
    assert chosen(mq.quantize(net(), skip=[r"re:.*inner\.[0-1]"], **QUIET)) == ["deep.inner.2", "shared"]
    with pytest.raises(PatternError, match=r"near names: .*shared"):
        mq.quantize(net(), skip=["sharde"])


def test_original_defect_20_no_deprecated_quantization_of_torch(pytestconfig):
    assert "error" in pytestconfig.getini("filterwarnings")
    text = "\n".join(p.read_text() for p in ROOT.rglob("*.py"))
    assert not re.findall(
        r"quantize_per_(?:channel|tensor)|torch\.ao\.quantization|quantize_dynamic\(|_make_per_", text
    )
    model = mq.quantize(net(), **QUIET).model
    assert not [n for n, p in model.named_parameters() if p.is_quantized]


def test_original_defect_plus_nested_layers_are_found():
    bert = mq.quantize(FAMILIES["bert"].build(), **QUIET)
    assert len([n for n in chosen(bert) if n.startswith("bert.encoder.")]) == 12
    gpt2 = mq.quantize(FAMILIES["gpt2"].build(), **QUIET)
    assert len(chosen(gpt2)) == 8 and "lm_head" not in chosen(gpt2)


@pytest.mark.parametrize("name", ["lstm", "llama", "gpt2"])
def test_original_defect_plus_embeddings_are_in_the_file(tmp_path, name):
    model = FAMILIES[name].build()
    result = mq.quantize(model, embeddings=True, **QUIET)
    embeddings = [n for n in chosen(result) if isinstance(model.get_submodule(n), nn.Embedding)]
    # GPT-2 ties its token embeddings to the head; its position table is free
    assert len(embeddings) == 1
    folder = result.save(tmp_path / "out")
    saved = load_file(folder / "model.safetensors")
    assert {n.removesuffix("_scale") for n in saved} == {
        n for n in model.state_dict() if n != "lm_head.weight" or name == "llama"
    }
    assert saved[f"{embeddings[0]}.weight"].dtype == torch.int8
    loaded = mq.load(folder, model=FAMILIES[name].build if is_plain(model) else None)
    inputs = FAMILIES[name].inputs()
    assert torch.equal(run(loaded, inputs), run(result.model, inputs))


def test_W1_a_unit_stays_together_when_one_member_is_kept_for_its_values():
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
