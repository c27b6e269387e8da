"""CNNs through conversion, memory with channels last, saving and loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import mono_quant
from mono_quant import kernels
from mono_quant.convert.int8_layers import Int8Conv2d


def resnet() -> nn.Module:
    return hf.ResNetModel(hf.ResNetConfig(embedding_size=64, hidden_sizes=[128, 256], depths=[1, 2]))


def convnext() -> nn.Module:
    return hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[96, 128], depths=[1, 1], num_stages=2))


def mobilenet() -> nn.Module:
    return hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.35, image_size=64))


@pytest.mark.parametrize("build", [resnet, convnext, mobilenet])
@pytest.mark.parametrize("scheme", ["int8", "int8-g64"])
def test_a_cnn_lives_with_channels_last(build: Any, scheme: str, tmp_path: Path) -> None:
    model = build().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2.0)
    images = torch.randn(2, 3, 64, 64)
    # ConvNext has linear layers, for whose sake its convolutions would stay float
    result = mono_quant.quantize(model, activations=scheme, disable_defaults=["portable"])
    assert any(isinstance(module, Int8Conv2d) for module in result.model.modules())
    with torch.no_grad():
        exact = model(images).last_hidden_state
        planes = result.model(images).last_hidden_state
        last = result.model(images.contiguous(memory_format=torch.channels_last)).last_hidden_state
        assert ((planes - exact).norm() / exact.norm()) < 0.1
        # torch sums up norms in another order
        assert ((last - planes).norm() / planes.norm()) < 0.02
        result.save(tmp_path / "saved")
        loaded = mono_quant.load(tmp_path / "saved")
        assert torch.equal(loaded(images).last_hidden_state, planes)
        moved = loaded.to(memory_format=torch.channels_last)
        assert torch.equal(moved(images).last_hidden_state, planes)


def fused(layer: Any, norm: nn.BatchNorm2d, x: torch.Tensor, **rest: Any) -> torch.Tensor:
    with torch.no_grad():
        return kernels.conv(
            x, layer.stored("weight"), layer.scale(), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups,
            batch_norm=(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps),
            activations=layer.activations, **rest,
        )  # fmt: skip


def test_a_block_of_layers_is_one_call() -> None:
    model = nn.Sequential(nn.Conv2d(64, 96, 3, 2, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU())
    model(torch.randn(4, 64, 9, 9))
    model = mono_quant.dynamic_quantize(model.eval())[0]
    x = torch.randn(2, 64, 11, 9)
    with torch.no_grad():
        composed = model(x)
    # one more call than it takes for packed weights to be used
    for _ in range(3):
        torch.testing.assert_close(fused(model[0], model[1], x, relu=True), composed, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        other = model(torch.zeros_like(x))
        model[0].load_state_dict({**model[0].state_dict(), "weight_scale": 2 * model[0].scale()})
        assert not torch.equal(model(x), composed)
        torch.testing.assert_close(fused(model[0], model[1], x, relu=True), model(x), rtol=1e-4, atol=1e-5)
        model[0].stored("weight").neg_()
        torch.testing.assert_close(fused(model[0], model[1], x, relu=True), model(x), rtol=1e-4, atol=1e-5)
    assert other.isfinite().all()
