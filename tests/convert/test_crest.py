"""What rounding activations does to each layer, against float64 and by hand."""

import copy

import pytest
import torch
from models import FAMILIES, is_plain, seeded
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import mono_quant as mq
from mono_quant import kernels
from mono_quant.convert import crest
from mono_quant.convert.crest import measure_layers
from mono_quant.convert.int8_layers import layers_with_schemes
from mono_quant.convert.probes import ProbeError, given_probe


def int8(model, **options):
    return mq.dynamic_quantize(model, disable_defaults=["small"], **options)[0]


def error(value, exact):
    exact = exact.detach()
    return float((value.detach().double() - exact).norm() / exact.norm())


def test_a_layer_is_measured_against_its_own_weights_with_activations_in_float():
    model = int8(seeded(lambda: nn.Sequential(nn.Linear(300, 40), nn.ReLU(), nn.Linear(40, 20))))
    x = seeded(lambda: torch.randn(3, 5, 300))
    first, second = measure_layers(model, given_probe(x))
    weight = model[0].weight.double()
    exact = x.double() @ weight.t()
    for scheme in kernels.SCHEMES:
        product = kernels.int8_linear(x, model[0].codes(), model[0].scale(), None, scheme)
        assert first.errors[scheme] == pytest.approx(error(product, exact), rel=2e-3)
    assert (first.name, first.scheme, first.work) == ("0", "auto", 15 * 300 * 40)
    crest = x.double().abs().amax(-1) / x.double().square().mean(-1).sqrt()
    assert first.crest == pytest.approx(float(crest.quantile(0.5)), rel=1e-3)
    assert first.peak_crest == pytest.approx(float(crest.quantile(0.99)), rel=1e-3)
    # the second one gets what float activations give, bias included
    hidden = (exact + model[0].bias.double()).relu()
    exact = hidden @ model[2].weight.double().t()
    product = kernels.int8_linear(hidden.float(), model[2].codes(), model[2].scale(), None, "int8")
    assert second.errors["int8"] == pytest.approx(error(product, exact), rel=2e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_of_a_convolution_each_receptive_field_is_a_token(groups):
    layer = seeded(lambda: nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=groups))
    x = seeded(lambda: torch.randn(2, 6, 11, 9))
    model = int8(nn.Sequential(layer))
    (found,) = measure_layers(model, given_probe(x))
    exact = F.conv2d(x.double(), model[0].weight.double(), None, 2, 1, (1, 2), groups)
    how = (None, (2, 2), (1, 1), (1, 2), groups)
    product = kernels.int8_conv(x, model[0].codes().unflatten(1, (-1, 3, 2)), model[0].scale(), *how, "int8")
    assert found.errors["int8"] == pytest.approx(error(product, exact), rel=2e-3)
    assert found.work == exact.numel() * (6 // groups) * 6
    fields = F.unfold(x.double(), (3, 2), (1, 2), 1, 2).unflatten(1, (groups, -1))
    crest = fields.abs().amax(2) / fields.square().mean(2).sqrt()
    assert found.crest == pytest.approx(float(crest.quantile(0.5)), rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "attention", "encoder", "lstm", "cnn"])
def test_every_kind_of_layer_is_measured_and_the_model_is_what_it_was(name):
    family = FAMILIES[name]
    model = int8(family.build())
    before = copy.deepcopy(model)
    layers = measure_layers(model, given_probe(family.inputs()))
    assert {layer.name for layer in layers} == set(layers_with_schemes(model))
    for layer in layers:
        assert 0 < layer.errors["int12"] < layer.errors["int8"] < 0.1
        # four more bits: the step is 2047 / 127 times smaller
        assert layer.errors["int8"] / layer.errors["int12"] == pytest.approx(2047 / 127, rel=0.35)
        assert layer.errors["int8-g64"] <= layer.errors["int8-g128"] * 1.05
        assert 1 < layer.crest <= layer.peak_crest and layer.work > 0
    with torch.no_grad():
        inputs = family.inputs()
        outputs = [m(**inputs) for m in (model, before)]
    a, b = (out if isinstance(out, torch.Tensor) else out[0] for out in outputs)
    assert torch.equal(a, b)
    for one, two in zip(model.modules(), before.modules(), strict=True):
        assert vars(one).keys() == vars(two).keys()
    assert is_plain(model) or model.training is False


def test_one_channel_far_above_the_rest_is_seen_in_the_crest_and_in_the_error():
    model = int8(nn.Sequential(seeded(lambda: nn.Linear(512, 32))))
    x = seeded(lambda: torch.randn(64, 512))
    (plain,) = measure_layers(model, given_probe(x))
    x[:, 7] = 100.0
    (high,) = measure_layers(model, given_probe(x))
    # a / rms, where the channel is nearly all of the energy: at most the root of the length
    assert plain.crest < 4 and 20 < high.crest <= 512**0.5
    # groups keep it to itself
    assert high.errors["int8-g64"] < high.errors["int8-g128"] < high.errors["int8"]


class OneOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(64, 16)

    def forward(self, x):
        return self.a(x)


def test_tokens_of_zeros_have_no_crest_and_layers_that_do_not_run_are_left_out():
    model = int8(OneOfTwo())
    x = torch.zeros(4, 64)
    x[0] = torch.arange(64.0)
    (found,) = measure_layers(model, given_probe(x))
    assert found.name == "a"
    assert found.crest == found.peak_crest == pytest.approx(63 / (float((x[0] ** 2).mean()) ** 0.5), rel=1e-3)


def test_a_model_that_does_not_run_is_put_back_and_told():
    model = int8(nn.Sequential(nn.Linear(64, 16)))
    with pytest.raises(ProbeError, match="the model did not run on the given inputs"):
        measure_layers(model, given_probe(torch.zeros(2, 3)))
    assert "multiply" not in vars(model[0]) and "convolve" not in vars(model[0])


def test_a_gpu_that_cuts_float32_to_ten_bits_does_not_measure_that():
    # a convolution is computed in TF32 there unless somebody says otherwise
    with FakeTensorMode():
        assert crest._exactly(torch.empty(2, device="cuda", dtype=torch.float16)).dtype == torch.float64
        assert crest._exactly(torch.empty(2, dtype=torch.float16)).dtype == torch.float32
