"""Defaults protect, user rules add, units stay together, and a rule that matches nothing is an error."""

import pytest

from mono_quant.errors import ConfigError, PatternError, Words, worded
from mono_quant.planning.rules import DEFAULTS, MIN_PARAMS, MIN_ROW, Layer, Rules, reread, select, user_reason

BIG = {"rows": 128, "depth": 128}
NAMES = ["enc.0.fc1", "enc.0.my_fc1", "enc.1.fc1", "enc.10.fc1", "enc.1.attn.out", "head"]


def layer(name, kind="linear", rows=128, depth=128, **options):
    return Layer(name, kind, options.pop("class_name", "Linear"), rows, depth, **options)


def reasons(layers, modules=None, **rules):
    return {n: d.reason for n, d in select(layers, Rules(**rules), modules).items()}


def kept(layers, modules=None, **rules):
    return [n for n, reason in reasons(layers, modules, **rules).items() if reason]


def test_everything_is_decided_once_in_order_and_large_layers_are_quantized():
    layers = [layer(n) for n in NAMES]
    decisions = select(layers, Rules())
    assert list(decisions) == NAMES
    assert all(d.quantize and d.layer is x for d, x in zip(decisions.values(), layers, strict=True))


LIFTABLE = sorted(DEFAULTS.keys() - {"tied"})


@pytest.mark.parametrize("rule", LIFTABLE)
def test_each_default_keeps_its_layer_with_its_reason_until_it_is_disabled(rule):
    layers = [layer("a", defaults=frozenset({rule})), layer("b")]
    assert reasons(layers) == {"a": DEFAULTS[rule], "b": ""}
    assert reasons(layers, disable_defaults=(rule,)) == {"a": "", "b": ""}
    other = next(r for r in LIFTABLE if r != rule)
    assert kept(layers, disable_defaults=(other,)) == ["a"]


def test_disabling_one_default_leaves_the_others_in_force():
    both = [layer("a", defaults=frozenset({"head", "tied"}))]
    assert reasons(both, disable_defaults=("head",)) == {"a": DEFAULTS["tied"]}
    with pytest.raises(ConfigError, match=r"'tied', which cannot be lifted.*Untie them first"):
        Rules(disable_defaults=("tied",))


def test_embeddings_are_quantized_on_request_but_not_when_tied():
    layers = [
        layer("wte", "embedding", defaults=frozenset({"embedding"})),
        layer("tied", "embedding", defaults=frozenset({"embedding", "tied"})),
    ]
    assert kept(layers) == ["wte", "tied"]
    assert reasons(layers, embeddings=True) == {"wte": "", "tied": DEFAULTS["tied"]}


def test_a_user_rule_adds_to_the_defaults():
    layers = [layer("a"), layer("b"), layer("lm_head", defaults=frozenset({"head"}))]
    assert reasons(layers, skip=("a",)) == {
        "a": "skipped by the user: a",
        "b": "",
        "lm_head": DEFAULTS["head"],
    }


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("enc.0.fc1", ["enc.0.fc1"]),
        ("fc1", ["enc.0.fc1", "enc.1.fc1", "enc.10.fc1"]),  # a whole part: not my_fc1
        ("enc.1", ["enc.1.fc1", "enc.1.attn.out"]),  # not enc.10
        ("attn", ["enc.1.attn.out"]),
        ("1", ["enc.1.fc1", "enc.1.attn.out"]),
        ("*fc1", ["enc.0.fc1", "enc.0.my_fc1", "enc.1.fc1", "enc.10.fc1"]),
        ("enc.?.fc1", ["enc.0.fc1", "enc.1.fc1"]),
        ("enc.[01].fc1", ["enc.0.fc1", "enc.1.fc1"]),
        (r"re:enc\.\d+\.fc1", ["enc.0.fc1", "enc.1.fc1", "enc.10.fc1"]),
        (r"re:.*fc1|head", ["enc.0.fc1", "enc.0.my_fc1", "enc.1.fc1", "enc.10.fc1", "head"]),
        ("head", ["head"]),
    ],
)
def test_a_pattern_covers_exactly_these_layers(pattern, expected):
    assert kept([layer(n) for n in NAMES], skip=(pattern,)) == expected


@pytest.mark.parametrize(
    "pattern", ["re:fc1", "enc.0.fc", "nc.0.fc1", "fc?", "enc..fc1", "Head", "enc.0.fc1.weight"]
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(PatternError, match="matches no module; "):
        select([layer(n) for n in NAMES], Rules(skip=(pattern,)))


def test_the_error_lists_every_bad_rule_with_near_names():
    layers = [layer(n) for n in NAMES]
    rules = Rules(skip=("haed", "head", "enc.0.fc2"), skip_types=("Lniear",))
    with pytest.raises(PatternError) as caught:
        select(layers, rules)
    text = str(caught.value)
    assert "'haed' matches no module; near names: head" in text
    assert "'enc.0.fc2' matches no module; near names: enc.0.fc1" in text
    assert "type 'Lniear' is no module of this model; its types are Linear" in text
    assert "'head'" not in text


def test_a_pattern_far_from_everything_shows_what_there_is():
    with pytest.raises(PatternError, match="the model's modules are named attn, enc, fc1, head, my_fc1, out"):
        select([layer(n) for n in NAMES], Rules(skip=("zzzzzz",)))


def test_a_pattern_may_name_a_module_that_holds_no_matrix():
    modules = {"": "Model", "norm": "LayerNorm", "enc": "Stack"}
    assert kept([layer("enc.0")], modules, skip=("norm",)) == []
    assert kept([layer("enc.0")], modules, skip_types=("LayerNorm",)) == []
    with pytest.raises(PatternError, match="'nrom' matches no module; near names: norm"):
        select([layer("enc.0")], Rules(skip=("nrom",)), modules)


def test_a_shared_layer_is_skipped_under_each_of_its_names():
    layers = [layer("a", aliases=("b.again",)), layer("c")]
    assert kept(layers, skip=("b",)) == ["a"] and kept(layers, skip=("again",)) == ["a"]


def test_types_are_skipped_by_class_name():
    layers = [layer("a"), layer("b", "conv1d", class_name="Conv1d")]
    assert reasons(layers, skip_types=("Conv1d",)) == {"a": "", "b": "skipped by the user: type Conv1d"}


def test_a_type_of_container_keeps_everything_inside_it():
    layers = [layer("mlp.up"), layer("attn.q"), layer("own.up", aliases=("mlp.shared.up",))]
    modules = {"": "Model", "mlp": "LlamaMLP", "mlp.up": "Linear", "attn": "Attention"}
    reason = "skipped by the user: type LlamaMLP"
    assert reasons(layers, modules, skip_types=("LlamaMLP",)) == {
        "mlp.up": reason,
        "attn.q": "",
        "own.up": reason,
    }
    assert kept(layers, modules, skip_types=("Model",)) == ["mlp.up", "attn.q", "own.up"]


@pytest.mark.parametrize(("rows", "is_kept"), [(99, True), (100, False), (101, False)])
def test_min_params_keeps_layers_with_fewer_weights(rows, is_kept):
    found = reasons([layer("a", rows=rows)], min_params=12800)
    assert found == {"a": "fewer than min_params=12800 weights" if is_kept else ""}


@pytest.mark.parametrize(
    ("rows", "depth", "reason"),
    [
        (MIN_PARAMS // 64, 64, ""),
        (MIN_PARAMS // 64 - 1, 64, DEFAULTS["small"]),
        (100_000, MIN_ROW, ""),
        (100_000, MIN_ROW - 1, "short rows: 15 weights share one scale, fewer than 16"),
    ],
)
def test_tiny_layers_and_short_rows_are_kept_unless_disabled(rows, depth, reason):
    layers = [layer("a", rows=rows, depth=depth)]
    assert reasons(layers) == {"a": reason}
    assert reasons(layers, disable_defaults=("small",)) == {"a": ""}


def test_min_params_still_holds_when_the_small_default_is_disabled():
    layers = [layer("a", rows=4, depth=64), layer("b", rows=1, depth=64)]
    assert kept(layers, min_params=100, disable_defaults=("small",)) == ["b"]


def test_no_rule_makes_an_unsupported_layer_int8():
    layers = [layer("a", unsupported="no int8 form of Odd")]
    everything = tuple(LIFTABLE)
    assert reasons(layers, disable_defaults=everything, embeddings=True) == {"a": "no int8 form of Odd"}


UNITS = [
    ("q_proj", "k_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "g_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("linear_q", "linear_k", "linear_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("wk", "weights_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
]


@pytest.mark.parametrize("unit", UNITS, ids="/".join)
def test_layers_that_engines_fuse_are_decided_together(unit):
    layers = (
        [layer(f"x.{part}") for part in unit] + [layer(f"y.{part}") for part in unit] + [layer("x.o_proj")]
    )
    assert kept(layers) == []
    last = f"x.{unit[-1]}"
    found = reasons(layers, skip=(last,))
    together = f"decided together with {unit[-1]}, which is kept"
    assert found == {
        **dict.fromkeys((x.name for x in layers), ""),
        **dict.fromkeys((f"x.{part}" for part in unit[:-1]), together),
        last: f"skipped by the user: {last}",
    }


def test_a_small_member_counts_with_its_unit():
    sizes = {"q_proj": 64, "k_proj": 8, "v_proj": 8}
    layers = [layer(f"a.{n}", rows=r, depth=64) for n, r in sizes.items()] + [
        layer("a.o_proj", rows=8, depth=64)
    ]
    assert reasons(layers) == {"a.q_proj": "", "a.k_proj": "", "a.v_proj": "", "a.o_proj": DEFAULTS["small"]}
    assert kept(layers, min_params=80 * 64) == ["a.o_proj"]
    assert kept(layers, min_params=80 * 64 + 1) == [x.name for x in layers]


def test_a_unit_that_is_small_as_a_whole_is_kept():
    layers = [layer(f"a.{n}", rows=8, depth=64) for n in ("q_proj", "k_proj", "v_proj")]
    assert reasons(layers) == dict.fromkeys((x.name for x in layers), DEFAULTS["small"])


def test_a_unit_with_a_member_that_int8_cannot_hold_is_kept_whole():
    layers = [layer("a.q_proj", unsupported="subclass"), layer("a.k_proj"), layer("a.v_proj")]
    assert kept(layers) == ["a.q_proj", "a.k_proj", "a.v_proj"]


def test_the_same_last_name_elsewhere_is_another_unit():
    layers = [layer("a.q_proj"), layer("b.k_proj")]
    assert kept(layers, skip=("a.q_proj",)) == ["a.q_proj"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"disable_defaults": ("heads",)},
            r"unknown rules \['heads'\]; the default rules are \['embedding', 'head'",
        ),
        ({"min_params": -1}, "min_params is -1; give 0 or"),
        ({"skip": ("",)}, "skip pattern '' is empty"),
        ({"skip": ("re:",)}, "skip pattern 're:' is empty"),
        ({"skip": ("re:(",)}, r"skip pattern 're:\(' is no valid regular expression"),
        ({"skip": (3,)}, "skip pattern 3 is empty or no text"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, message):
    with pytest.raises(ConfigError, match=message):
        Rules(**rules)


def test_a_reason_read_from_a_report_speaks_of_its_options_again():
    reasons = [DEFAULTS["embedding"], user_reason(("b",), "X", 9, Rules(min_params=10))]
    for given in (*reasons, *(Words(reason, "; stored in float16 on request") for reason in reasons)):
        read = reread(str(given))
        assert read == given
        assert worded(read, lambda option: option.name.upper()) == worded(
            given, lambda option: option.name.upper()
        )
        assert worded(read, lambda option: option.name.upper()) != given
    for other in ("skipped by the user: fewer than min_params=10 weights", "bias", ""):
        assert reread(other) is other
    assert reread(DEFAULTS["head"]) == DEFAULTS["head"]


def test_user_reason_alone_ignores_sizes_it_does_not_know():
    rules = Rules(skip=("a",), min_params=10)
    assert user_reason(("b",), "X", None, rules) == ""
    assert user_reason(("b",), "X", 9, rules) == "fewer than min_params=10 weights"
    assert user_reason(("b", "a"), "X", 99, rules) == "skipped by the user: a"
