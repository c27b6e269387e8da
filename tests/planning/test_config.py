"""Arguments win over the config, the config over defaults; options that cannot be honoured are errors."""

import json
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import nn

from mono_quant.errors import ConfigError
from mono_quant.planning.config import QuantizationConfig, merge, parse_dtype
from mono_quant.planning.rules import Rules

# One row per option: default, and two other values.
OPTIONS = {
    "dtype": ("int8", "fp16", "int8"),
    "skip": ((), ("a", "b"), ("c",)),
    "skip_types": ((), ("Linear",), ("Conv1d",)),
    "min_params": (0, 100, 7),
    "disable_defaults": ((), ("head",), ("router", "small")),
    "embeddings": (False, True, False),
    "on_nonfinite": ("error", "keep", "error"),
    "on_overflow": ("keep", "error", "keep"),
    "fidelity": ("auto", True, False),
    "kept": ("same", "fp16", "same"),
    "activations": ("auto", "int12", (("*", "int8"), ("*.down_proj", "int12"))),
}
EACH = pytest.mark.parametrize("option", sorted(OPTIONS))


def test_the_table_of_this_test_knows_every_option():
    assert {f.name for f in fields(QuantizationConfig)} == set(OPTIONS)


@EACH
def test_arguments_win_over_the_config_and_the_config_over_defaults(option):
    default, first, second = OPTIONS[option]
    config = QuantizationConfig(**{option: first})
    assert getattr(QuantizationConfig(), option) == default
    for base in (config, {option: first}):
        assert getattr(merge(base, {}), option) == first
        assert getattr(merge(base, {option: second}), option) == second
        # an explicit argument that equals the default is still an argument
        assert getattr(merge(base, {option: default}), option) == default
    assert getattr(merge(None, {option: first}), option) == first
    assert getattr(merge(None, {}), option) == default
    assert getattr(config, option) == first


@EACH
def test_one_argument_leaves_the_other_options_of_the_config(option):
    # fp16 takes no scheme of activations
    given = {name: values[1] for name, values in OPTIONS.items()} | {"dtype": "int8"}
    merged = merge(QuantizationConfig(**given), {option: OPTIONS[option][0]})
    for other, values in OPTIONS.items():
        assert getattr(merged, other) == (values[0] if other == option else given[other])


@EACH
def test_configs_go_round_as_json(option):
    config = QuantizationConfig(**{option: OPTIONS[option][1]})
    data = json.loads(json.dumps(config.to_dict()))
    assert data.keys() == OPTIONS.keys()
    again = QuantizationConfig.from_dict(data)
    assert again == config and hash(again) == hash(config)
    assert QuantizationConfig.from_dict({}) == QuantizationConfig()


@EACH
def test_a_config_cannot_be_changed(option):
    with pytest.raises(FrozenInstanceError):
        setattr(QuantizationConfig(), option, OPTIONS[option][1])


@pytest.mark.parametrize(
    ("alias", "option", "value", "stored"),
    [
        ("modules_to_not_convert", "skip", ["lm_head"], ("lm_head",)),
        ("skip_layer_names", "skip", "lm_head", ("lm_head",)),
        ("skip_layer_types", "skip_types", [nn.Linear, "Conv1d"], ("Linear", "Conv1d")),
        ("skip_param_threshold", "min_params", 512, 512),
        ("scheme", "dtype", torch.float16, "fp16"),
    ],
)
def test_names_of_other_tools_mean_the_same_option(alias, option, value, stored):
    assert getattr(merge(None, {alias: value}), option) == stored
    assert getattr(QuantizationConfig.from_dict({alias: value}), option) == stored
    base = QuantizationConfig(**{option: OPTIONS[option][1]})
    assert getattr(merge(base, {alias: value}), option) == stored


def test_an_alias_beside_its_option_adds_to_it():
    given = {"skip": ["a"], "modules_to_not_convert": ["b"], "skip_layer_names": "c"}
    assert merge(None, given).skip == ("a", "b", "c")
    assert merge(None, {"skip": None, "modules_to_not_convert": ["b"]}).skip == ("b",)


@pytest.mark.parametrize(("one", "two"), [("min_params", "skip_param_threshold"), ("dtype", "scheme")])
def test_an_option_that_takes_one_value_is_not_given_twice(one, two):
    value = OPTIONS[one][1]
    with pytest.raises(ConfigError, match=one):
        merge(None, {one: value, two: value})


@pytest.mark.parametrize("option", ["symmetric", "per_channel", "dynamic"])
def test_choices_that_are_fixed_are_accepted_only_as_they_are(option):
    assert merge(None, {option: True}) == QuantizationConfig()
    for wrong in (False, None, 1, "true"):
        with pytest.raises(
            ConfigError, match=rf"{option}={wrong!r} is not supported: .*; leave it out or give True"
        ):
            merge(None, {option: wrong})


@pytest.mark.parametrize(
    "dtype", ["int8", "INT8", "qint8", "torch.int8", "torch.qint8", torch.int8, torch.qint8]
)
def test_int8_by_every_name(dtype):
    assert parse_dtype(dtype) == QuantizationConfig(dtype=dtype).dtype == "int8"


@pytest.mark.parametrize(
    "dtype", ["fp16", "float16", "half", "torch.float16", "Float16", torch.float16, torch.half]
)
def test_fp16_by_every_name(dtype):
    assert parse_dtype(dtype) == QuantizationConfig(dtype=dtype).dtype == "fp16"


@pytest.mark.parametrize(
    "dtype", [None, "", "int4", "bf16", torch.bfloat16, torch.uint8, torch.quint8, 8, int, []]
)
def test_any_other_dtype_is_refused_with_what_works(dtype):
    with pytest.raises(ConfigError, match=r"dtype is .*; use 'int8' or 'fp16'"):
        parse_dtype(dtype)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skp": ["a"]}, "unknown option 'skp'; the options are activations, disable_defaults, dtype"),
        ({"skip": 3}, "skip is 3; give a name or a list of names"),
        ({"skip": ["a", 3]}, "skip holds 3, which is no name"),
        ({"skip_types": [nn.Linear(2, 2)]}, "skip_types holds Linear"),
        ({"disable_defaults": 1}, "disable_defaults is 1"),
        ({"disable_defaults": "heads"}, r"disable_defaults names unknown rules \['heads'\]"),
        ({"skip": "re:["}, "no valid regular expression"),
        ({"skip": ""}, "skip pattern '' is empty"),
        ({"min_params": "5"}, "min_params is '5'; give a whole number"),
        ({"min_params": 5.0}, "min_params is 5.0; give a whole number"),
        ({"min_params": True}, "min_params is True; give a whole number"),
        ({"min_params": -1}, "min_params is -1"),
        ({"on_nonfinite": "skip"}, "on_nonfinite is 'skip'; use one of 'error', 'keep'"),
        ({"on_overflow": None}, "on_overflow is None; use one of 'keep', 'error'"),
        ({"fidelity": "yes"}, "fidelity is 'yes'; use one of True, False, 'auto'"),
        ({"embeddings": 1}, "embeddings is 1; use one of True, False"),
        ({"embeddings": "true"}, "embeddings is 'true'; use one of True, False"),
        ({"kept": "int4"}, "kept is 'int4'; use one of 'same', 'fp16', 'bf16'"),
        ({"kept": torch.float16}, "kept is torch.float16; use one of 'same', 'fp16', 'bf16'"),
        ({"kept": "bf16", "dtype": "fp16"}, "kept='bf16' is about what int8 leaves in float"),
    ],
)
def test_a_wrong_value_is_refused_by_every_road(given, message):
    for road in (
        lambda: merge(None, given),
        lambda: merge(given, {}),
        lambda: QuantizationConfig().override(given),
        lambda: QuantizationConfig.from_dict(given),
    ):
        with pytest.raises(ConfigError, match=message):
            road()


@pytest.mark.parametrize("config", [["skip"], "int8", 3, QuantizationConfig])
def test_a_config_of_another_kind_is_refused(config):
    with pytest.raises(ConfigError, match=r"config is a .*; give a QuantizationConfig or a dict"):
        merge(config, {})


def test_lists_generators_and_single_names_become_tuples():
    config = QuantizationConfig(skip=(n for n in "ab"), skip_types=nn.Linear, disable_defaults="head")
    assert (config.skip, config.skip_types, config.disable_defaults) == (("a", "b"), ("Linear",), ("head",))


def test_the_selection_rules_carry_every_rule():
    config = QuantizationConfig(
        skip=["a"], skip_types=["B"], min_params=3, disable_defaults=["head"], embeddings=True
    )
    assert config.rules() == Rules(("a",), ("B",), 3, ("head",), True)
