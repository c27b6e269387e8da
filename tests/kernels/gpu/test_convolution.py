"""Implicit convolutions against the reference, which unfolds: shapes, layouts, schemes, and values that are no numbers."""

import pytest
import torch

pytest.importorskip("triton")

from mono_quant import kernels
from mono_quant.kernels import paths
from mono_quant.kernels.activations import SCHEMES
from mono_quant.kernels.gpu import patches
from mono_quant.kernels.gpu.convolution import conv
from mono_quant.kernels.gpu.features import INTERPRETED, of_nvidia

DEVICE = "cpu" if INTERPRETED else "cuda"
ONE = (1, 1)
# name: images and channels, size, outputs, kernel, stride, padding, dilation, groups
SHAPES = {
    "pixels": ((2, 20), (5, 7), 9, ONE, ONE, (0, 0), ONE, 1),
    "strided pixels": ((2, 20), (5, 7), 9, ONE, (2, 3), (0, 0), ONE, 1),
    "3x3": ((2, 12), (6, 5), 18, (3, 3), ONE, (1, 1), ONE, 1),
    "5x2": ((1, 6), (9, 6), 5, (5, 2), (2, 1), (2, 1), (1, 2), 1),
    "dilated": ((1, 7), (8, 9), 4, (3, 3), ONE, (2, 2), (2, 2), 1),
    "groups": ((2, 10), (5, 4), 6, (3, 2), (1, 2), (1, 0), ONE, 2),
    "one dimension": ((2, 11), (1, 13), 8, (1, 3), (1, 2), (0, 1), ONE, 1),
    "patches": ((2, 3), (8, 12), 20, (4, 4), (4, 4), (0, 0), ONE, 1),
    "depthwise": ((2, 5), (4, 5), 5, (3, 2), (2, 1), (1, 1), ONE, 5),
    "depthwise, two each": ((1, 5), (1, 12), 10, (1, 4), ONE, (0, 3), (1, 2), 5),
    "of one channel": ((2, 1), (1, 30), 12, (1, 10), (1, 5), (0, 0), ONE, 1),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def images(shape, size, dtype, channels_last=False, seed=0):
    x = torch.randn(*shape, *size, generator=torch.Generator().manual_seed(seed))
    # one scale per field differs from pixel to pixel
    x *= torch.logspace(-3, 3, size[1])
    x = x.to(DEVICE, dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def weights(outputs, inner, kernel, bias=None):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-128, 128, (outputs, inner, *kernel), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, 1, generator=generator) + 0.5
    # as `_Int8Conv` keeps them: channels last
    weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    offset = None if bias is None else torch.randn(outputs, generator=generator).to(DEVICE, bias)
    return weight.to(DEVICE), scale.to(DEVICE), offset


def expected(x, weight, scale, bias, stride, padding, dilation, groups, scheme):
    x, weight, scale = x.cpu(), weight.cpu(), scale.cpu()
    bias = None if bias is None else bias.cpu()
    with kernels.using("reference"):
        return paths.conv(
            x, weight, scale, bias, list(stride), list(padding), list(dilation), groups, scheme.name
        )


def same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    return torch.equal(a.nan_to_num(0.0).float(), b.nan_to_num(0.0).float())


def compare(x, weight, scale, bias, *geometry, scheme):
    found = conv(x, weight, scale, bias, *geometry, scheme)
    assert found is not None
    assert found.device == x.device
    assert same_bits(found.cpu(), expected(x, weight, scale, bias, *geometry, scheme))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_one_scale_per_receptive_field_gives_the_bits_of_the_reference(name):
    shape, size, outputs, kernel, *geometry = SHAPES[name]
    cases = [
        ("int8", torch.float32, False),
        ("int8", torch.float16, True),
        ("int12", torch.bfloat16, False),
        ("int8-g128", torch.bfloat16, True),
    ]
    # shapes without a group of their own make no kernel that the others do not
    for seed, (scheme, dtype, channels_last) in enumerate(cases if "3x3" in name else cases[:3]):
        x = images(shape, size, dtype, channels_last, seed)
        parts = weights(outputs, shape[1] // geometry[-1], kernel, dtype if seed else None)
        found = compare(x, *parts, *geometry, scheme=SCHEMES[scheme])
        # as torch's convolutions leave them
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("scheme", "channels", "groups", "kernel", "geometry", "channels_last"),
    [
        ("int8-g64", 128, 2, (3, 2), ((1, 2), (1, 1), (1, 2)), False),
        ("int8-g64", 128, 1, (1, 3), (ONE, (0, 2), ONE), True),
        ("int8-g128", 256, 1, ONE, (ONE, (0, 0), ONE), True),
        ("int8-g128", 128, 1, (2, 2), ((2, 2), (0, 1), ONE), False),
    ],
)
def test_groups_that_are_parts_of_a_pixel_give_the_bits_of_the_reference(
    scheme, channels, groups, kernel, geometry, channels_last
):
    for dtype in (torch.float32, torch.bfloat16):
        x = images((2, channels), (3, 4), dtype, channels_last)
        x *= torch.logspace(-2, 2, channels).view(-1, 1, 1).to(x)
        # a pixel of zeros, and a group of one
        x[0, :, 1, 2] = 0
        x[1, :64, 0, 0] = 0
        compare(x, *weights(6, channels // groups, kernel, dtype), *geometry, groups, scheme=SCHEMES[scheme])


@pytest.mark.skipif(not INTERPRETED, reason="this device has its own answer")
def test_devices_without_products_of_bytes_give_the_same_sums(monkeypatch):
    monkeypatch.setattr(patches, "features_of", lambda _: of_nvidia((7, 5), 1 << 16, 1, False))
    x = images((1, 70), (4, 40), torch.float16)
    x[:, ::2] = x.abs().amax()
    weight, scale, _ = weights(40, 70, (1, 2))
    weight[3] = 127
    for scheme in ("int8", "int12"):
        compare(x, weight, scale, None, ONE, (0, 1), ONE, 1, scheme=SCHEMES[scheme])
    x = images((1, 64), (3, 4), torch.bfloat16)
    compare(x, *weights(6, 64, (2, 2)), ONE, (1, 0), ONE, 1, scheme=SCHEMES["int8-g64"])


def test_a_field_with_more_values_than_a_group_has_several_scales_depthwise():
    x = images((1, 3), (1, 80), torch.float16)
    parts = weights(3, 1, (1, 70), torch.float32)
    compare(x, *parts, (1, 3), (0, 5), ONE, 3, scheme=SCHEMES["int8-g64"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("scheme", "channels", "groups"),
    [("int8", 6, 1), ("int12", 6, 2), ("int8", 6, 6), ("int8-g64", 128, 1)],
)
def test_what_is_no_number_spoils_the_fields_that_hold_it_and_no_others(bad, scheme, channels, groups):
    x = images((1, channels), (5, 6), torch.float32)
    x[0, 1, 1, 4] = bad
    parts = weights(6, channels // groups, (3, 3))
    found = compare(x, *parts, ONE, (0, 0), ONE, groups, scheme=SCHEMES[scheme])
    # of 3 by 4 fields, those of the first rows and the last columns, of the group that reads the channel
    width = 6 // groups
    spoilt = torch.zeros_like(found, dtype=torch.bool)
    spoilt[0, 1 // width * width :, :2, 2:] = True
    spoilt[0, (1 // width + 1) * width :] = False
    assert torch.equal(found.isnan(), spoilt)


def test_fields_of_zeros_and_of_padding_alone_are_the_bias():
    x = torch.zeros(1, 3, 4, 4, device=DEVICE)
    weight, scale, bias = weights(5, 3, (2, 2), torch.float32)
    found = compare(x, weight, scale, bias, ONE, (3, 3), ONE, 1, scheme=SCHEMES["int8"])
    assert torch.equal(found, bias.view(1, -1, 1, 1).expand_as(found))


def test_views_are_read_where_they_lie():
    wide = images((4, 16), (6, 9), torch.float16)
    parts = weights(5, 8, (3, 3))
    for x in (
        wide[::2, 4:12, 1:, 2:7],
        wide[:2, ::2].flip(3),
        wide[:1].movedim(1, 3).contiguous().movedim(3, 1)[:, 8:],
        wide[:2, :1].expand(-1, 8, -1, -1),
    ):
        compare(x, *parts, ONE, (1, 1), ONE, 1, scheme=SCHEMES["int8"])
    # pixels of all images in one row, where memory allows: one pixel an image, channels last, and neither
    parts = weights(5, 8, ONE)
    for x in (wide[:, :8, 2:3, 3:4], wide[:, :8].to(memory_format=torch.channels_last), wide[:, :8]):
        compare(x, *parts, ONE, (0, 0), ONE, 1, scheme=SCHEMES["int8"])


def test_no_images_and_no_outputs_give_none():
    parts = weights(4, 3, (2, 2))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(0, 3, 5, 6, dtype=dtype, device=DEVICE)
        assert compare(x, *parts, ONE, (1, 0), ONE, 1, scheme=SCHEMES["int12"]).shape == (0, 4, 6, 5)
    x = torch.ones(2, 3, 5, 6, device=DEVICE)
    nobody = torch.empty(0, 3, 2, 2, dtype=torch.int8, device=DEVICE), torch.empty(0, 1, device=DEVICE), None
    assert conv(x, *nobody, ONE, (0, 0), ONE, 1, SCHEMES["int8"]).shape == (2, 0, 4, 5)


def test_what_has_no_kernel_is_left_to_the_caller():
    x, (weight, scale, bias) = torch.ones(1, 6, 5, 5, device=DEVICE), weights(4, 6, (3, 3), torch.float32)
    plain = (ONE, (0, 0), ONE, 1, SCHEMES["int8"])
    assert conv(x, weight, scale, bias, *plain) is not None
    assert conv(x.double(), weight, scale, bias, *plain) is None
    assert conv(x, weight.float(), scale, bias, *plain) is None
    assert conv(x, weight, scale.double(), bias, *plain) is None
    assert conv(x, weight, scale[:3], bias, *plain) is None
    assert conv(x, weight, scale, bias[:3], *plain) is None
    assert conv(x, weight, scale, bias.double(), *plain) is None
    assert conv(x[:, :5], weight, scale, bias, *plain) is None
    assert conv(x[..., :2], weight, scale, bias, *plain) is None
    # 54 values are one group of 64, 216 are several, and a pixel of 24 is none
    wide, (weight, scale, bias) = torch.ones(1, 24, 5, 5, device=DEVICE), weights(4, 24, (3, 3))
    assert conv(wide, weight, scale, bias, ONE, (0, 0), ONE, 1, SCHEMES["int8-g64"]) is None
