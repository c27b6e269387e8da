"""The rule that names the few layers for which more bits pay, on noise that is known."""

from math import sqrt

import pytest
import torch

import mono_quant
from mono_quant.errors import ConfigError
from mono_quant.kernels import SCHEMES
from mono_quant.planning.suggestion import DENSITY, NARROW, REMOVED, WIDE, LayerNoise, suggest_for


def layer(name, work=1, error=0.01, scheme="auto"):
    """A layer whose noise falls by 16 with the wide scheme, as its codes have 4 bits more."""
    errors = dict.fromkeys(SCHEMES, error) | {WIDE: error / 16}
    return LayerNoise(name, scheme, work, 4.0, 6.0, errors)


def test_the_layers_that_make_the_noise_are_named_by_what_they_share():
    layers = [
        layer(f"h.{i}.{name}", error=0.1 if name == "down" else 0.01)
        for i in range(4)
        for name in ("a", "b", "c", "down")
    ]
    found = suggest_for(layers, "the probe")
    assert found.chosen == tuple(f"h.{i}.down" for i in range(4))
    assert found.activations == {"*.down": WIDE}
    energy = 4 * 0.1**2 + 12 * 0.01**2
    assert found.removed == pytest.approx(4 * 0.1**2 * (1 - 1 / 256) / energy)
    assert found.work == pytest.approx(0.25)
    assert found.total(NARROW) == pytest.approx(sqrt(energy))
    assert "int12 in 4 of 16 layers (25% of the work)" in found.verdict and repr(found).endswith(
        f"{found.verdict}>"
    )


def test_a_name_that_others_share_is_written_out():
    layers = [layer(f"h.{i}.down", error=0.1 if i == 1 else 0.01) for i in range(8)]
    assert suggest_for(layers, "").activations == {"h.1.down": WIDE}
    # numbers say nothing, and a name without a parent is matched by no glob
    assert suggest_for([layer("0", error=0.1), *(layer(f"a.{i}") for i in range(8))], "").activations == {
        "0": WIDE
    }
    layers = [*(layer(f"seq.{i}", error=0.01 if i else 0.1) for i in range(8)), layer("x.0")]
    assert suggest_for(layers, "").activations == {"seq.0": WIDE}


@pytest.mark.parametrize("error", [0.01, 0.014, 0.02])
def test_noise_that_is_spread_names_nobody_and_says_so(error):
    # at most a fifth of the work makes up to half of the noise: 0.02 ** 2 * 2 / (0.02 ** 2 * 2 + 8 * 0.01 ** 2)
    layers = [layer(f"h.{i}.a", error=0.01) for i in range(9)] + [layer("h.0.b", error=error)]
    found = suggest_for(layers, "p")
    assert found.chosen == () and found.activations == "auto" and found.removed == found.work == 0
    assert found.verdict.startswith("no few layers suffice: ")
    assert f"with {WIDE}" in found.verdict and NARROW in found.verdict
    assert "activations=" not in found.table()


def test_much_noise_from_most_of_the_work_is_no_few_layers():
    layers = [layer("a", work=60, error=0.1), layer("b", work=40, error=0.01)]
    assert suggest_for(layers, "").chosen == ()
    assert 1 / DENSITY < 0.6


def test_layers_that_are_decided_together_are_taken_together():
    layers = [
        layer("h.q_proj", error=0.1), layer("h.k_proj", error=0.01), layer("h.v_proj", error=0.01),
        *(layer(f"h.{i}.mlp", work=4) for i in range(4)),
    ]  # fmt: skip
    assert suggest_for(layers, "").chosen == ("h.q_proj", "h.k_proj", "h.v_proj")


def test_what_is_decided_already_is_counted_with_the_scheme_that_it_has():
    layers = [layer("a.in", error=0.1, scheme=WIDE), *(layer(f"b.{i}", error=0.01) for i in range(8))]
    assert suggest_for(layers, "").chosen == ()
    layers[1] = layer("b.0", error=0.2)
    assert suggest_for(layers, "").activations == {"b.0": WIDE}
    assert f"({WIDE})" in suggest_for(layers, "").table()
    everywhere = suggest_for([layer("a", scheme=WIDE), layer("b", scheme=WIDE)], "")
    assert everywhere.verdict.startswith("nothing to widen") and everywhere.activations == "auto"


def test_what_makes_no_noise_or_did_not_run():
    assert suggest_for([], "").verdict.startswith("nothing to widen")
    silent = suggest_for([layer("a", error=0.0)], "p")
    assert silent.chosen == () and silent.table().splitlines()[1] == "measured on p"


def test_the_table_has_the_noisiest_first_and_all_numbers():
    layers = [layer("h.a"), layer("h.down", error=0.1), layer("h.b")]
    found = suggest_for(layers, "4 x 32 random tokens")
    lines = found.table().splitlines()
    assert lines[1] == "measured on 4 x 32 random tokens"
    assert lines[3].split() == ["layer", "work", "crest", "1", "%", "above", *SCHEMES]
    assert lines[4].split() == ["int12", "h.down", "33.3%", "4.0", "6.0", "0.1", "0.1", "0.1", "0.0063"]
    assert lines[5].split()[0] == "h.a"
    assert lines[-1] == "activations={'*.down': 'int12'}"
    data = found.to_dict()
    assert data["activations"] == [["*.down", "int12"]] and data["chosen"] == ["h.down"]
    assert [x["name"] for x in data["layers"]] == ["h.a", "h.down", "h.b"]
    assert data["removed"] >= REMOVED
    many = suggest_for([layer(f"h.{i}") for i in range(50)], "")
    assert many.table().splitlines()[-1] == "... and 10 more"


@pytest.mark.parametrize("probe", [torch.full((4, 64), float("nan")), torch.randn(0, 64)])
def test_inputs_that_measure_nothing_are_refused(probe):
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    with pytest.raises(ConfigError, match="measure"):
        mono_quant.suggest(model, probe=probe)
