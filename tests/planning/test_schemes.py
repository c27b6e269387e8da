"""What is asked for by pattern, over what the block of a layer needs; names alone decide."""

import pytest
from torch import nn

from mono_quant.errors import ConfigError, PatternError
from mono_quant.kernels import ACTIVATIONS
from mono_quant.planning.schemes import (
    ASKED,
    BLOCKS,
    MEASURED,
    WIDE,
    Choice,
    blocks_of,
    check_patterns,
    choose,
    parse_activations,
    plain,
    spelled,
    without_layer,
)

LAYERS = {name: (name,) for name in ("a.up", "a.down", "b.up", "b.down")}


def schemes(asked, blocks=None, layers=LAYERS):
    return {name: c.scheme for name, c in choose(layers, parse_activations(asked), blocks or {}).items()}


@pytest.mark.parametrize("name", [*ACTIVATIONS, MEASURED])
def test_a_name_is_what_is_asked_for(name):
    assert parse_activations(name) == plain(name) == spelled(name) == name
    found = schemes(name)
    assert set(found.values()) == {"auto" if name == MEASURED else name}


def test_pairs_keep_their_order_in_every_form():
    # backwards by name, so that a sorted object would turn them around
    asked = parse_activations({"*": "int8", "*.down": "int12", "*.a": "auto"})
    assert asked == (("*", "int8"), ("*.down", "int12"), ("*.a", "auto"))
    assert plain(asked) == [["*", "int8"], ["*.down", "int12"], ["*.a", "auto"]]
    assert list(spelled(asked)) == ["*", "*.down", "*.a"]
    assert parse_activations(plain(asked)) == parse_activations(asked) == asked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int9", "activations is 'int9'; use one of 'auto', 'int8', .*'measured'"),
        ({"a": "int9"}, "activations of 'a' is 'int9'; use one of 'auto', 'int8'"),
        ({"a": MEASURED}, "activations of 'a' is 'measured'; use one of"),
        ({"a": None}, "activations of 'a' is None"),
        ({"": "int8"}, "activations pattern '' is empty"),
        ({3: "int8"}, "activations pattern 3 is empty or no text"),
        ({"re:(": "int8"}, r"activations pattern 're:\(' is no valid regular expression"),
        ({}, r"activations is \{\}; give one of .* or a mapping of patterns to schemes"),
        ([("a",)], "activations is .*; give one of"),
        ([3], "activations is .*; give one of"),
        (12, "activations is 12; give one of"),
        (None, "activations is None; give one of"),
    ],
)
def test_what_is_no_scheme_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_activations(given)


def test_the_last_pattern_that_matches_counts_and_the_rest_is_open():
    assert schemes({"*": "int8", "*.down": "int12"}) == {
        "a.up": "int8", "a.down": "int12", "b.up": "int8", "b.down": "int12"
    }  # fmt: skip
    assert set(schemes({"*.down": "int12", "*": "int8"}).values()) == {"int8"}
    assert schemes({"re:.*up": "int8-g64", "a": "int12"}) == {
        "a.up": "int12", "a.down": "int12", "b.up": "int8-g64", "b.down": "auto"
    }  # fmt: skip
    chosen = choose(LAYERS, (("*", "int8"), ("down", "int12")), {})
    assert chosen["a.up"] == Choice("int8", f"{ASKED}: *") and chosen["b.down"].reason == f"{ASKED}: down"


def test_any_name_of_a_layer_counts():
    layers = {"a": ("a", "tied.to"), "b": ("b",)}
    assert schemes({"*.to": "int12"}, layers=layers) == {"a": "int12", "b": "auto"}
    assert schemes("auto", {"tied.to": "recurrence"}, layers) == {"a": WIDE, "b": "auto"}


def test_a_block_decides_what_is_left_open_alone():
    blocks = {"a.up": "recurrence", "b.up": "recurrence"}
    assert choose(LAYERS, "auto", blocks)["a.up"] == Choice(WIDE, BLOCKS["recurrence"])
    assert schemes(MEASURED, blocks)["b.up"] == WIDE
    assert set(schemes("int8", blocks).values()) == {"int8"}
    assert schemes({"a": "int8-g64", "b": "auto"}, blocks) == {
        "a.up": "int8-g64", "a.down": "int8-g64", "b.up": WIDE, "b.down": "auto"
    }  # fmt: skip


def test_a_pattern_without_a_layer_is_refused_with_what_is_near():
    with pytest.raises(
        PatternError, match=r"activations without a match .*'\*\.dwn' matches no layer; near names: .*down"
    ):
        check_patterns(LAYERS.values(), (("a", "int8"), ("*.dwn", "int12")))
    check_patterns(LAYERS.values(), (("a", "int8"), ("*.down", "int12")))
    check_patterns([], "int12")


def test_patterns_of_layers_that_stay_in_float_are_told():
    asked = (("*.down", "int12"), ("c", "int8"))
    assert list(without_layer(LAYERS, asked)) == ["c"]
    assert list(without_layer(LAYERS, "int12")) == []


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.A_log = nn.Linear(4, 4), nn.Parameter(nn.Linear(1, 4).weight)


class Mixer(nn.Module):
    def __init__(self, learns=True):
        super().__init__()
        self.inner, self.deep = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
        if learns:
            self.register_parameter("A_log", nn.Linear(1, 4).weight)
        else:
            self.register_buffer("slope_rate", nn.Linear(1, 4).weight.detach())


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.gate, self.mlp = nn.Linear(4, 4), Gate(), nn.Linear(4, 4)


def test_blocks_are_found_by_their_decay_and_no_further():
    model = nn.ModuleDict({
        "learnt": Mixer(), "fixed": Mixer(learns=False), "kimi": Around(), "mlp": nn.Linear(4, 4)
    })  # fmt: skip
    assert set(blocks_of(model)) == {
        "learnt.inner", "learnt.deep", "fixed.inner", "fixed.deep", "kimi.out", "kimi.gate", "kimi.gate.f", "kimi.mlp",
    }  # fmt: skip
    assert set(blocks_of(model).values()) == set(BLOCKS) == {"recurrence"}
    # the block itself may be the model
    assert "inner" in blocks_of(Mixer()) and blocks_of(nn.Linear(4, 4)) == {}
