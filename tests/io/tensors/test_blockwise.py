"""fp8 codes and their scales are read as the floats that they stand for, whatever the sizes of tensors and blocks."""

import re

import pytest
import torch
from fp8 import CODES, decode, encode
from safetensors.torch import save_file

from mono_quant.errors import CorruptCheckpointError
from mono_quant.io.tensors import blockwise
from mono_quant.io.tensors.blockwise import Blockwise, Dequantized, Scaled, inverse_of, values_of
from mono_quant.io.tensors.checkpoint import open_checkpoint

NAME, INVERSE = "a.weight", "a.weight_scale_inv"
EVERY_CODE = torch.arange(256, dtype=torch.uint8).view(CODES)


def opened(folder, tensors, block=(128, 128), dtype=torch.bfloat16):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    shapes = {name: (header.dtype, header.shape) for name, header in checkpoint.headers.items()}
    return Dequantized(checkpoint, Blockwise.of(shapes, block, dtype, "this"))


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((128, 128), (128, 128)),
        ((256, 384), (128, 128)),
        ((130, 257), (128, 128)),
        ((127, 1), (128, 128)),
        ((13, 17), (4, 5)),
        ((13, 17), (1, 17)),
        ((13, 17), (64, 1)),
    ],
)
def test_values_are_those_of_the_reference(tmp_path, shape, block, monkeypatch):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    codes, scales = encode(weight, block)
    plain = torch.randn(3, 5)
    for part in (1, 64, 1 << 22):
        monkeypatch.setattr(blockwise, "_PART", part)
        found = opened(tmp_path / str(part), {NAME: codes, INVERSE: scales, "plain": plain}, block)
        assert same(found[NAME], decode(codes, scales, block)) and same(found["plain"], plain)


def test_every_code_times_awkward_scales(tmp_path):
    scales = torch.tensor([[1e-38, 3.3e-5, 1.0, 7.7e35]])
    codes = EVERY_CODE.repeat(3, 4)
    found = opened(tmp_path, {NAME: codes, INVERSE: scales}, (3, 256))
    value = found[NAME]
    nan = codes.float().isnan()
    assert torch.equal(value.isnan(), nan) and nan.sum() == 3 * 4 * 2
    exact = (codes.double().reshape(3, 4, 256) * scales.double().reshape(1, 4, 1)).reshape(3, 1024)
    error = (value.double() - exact).abs()[~nan]
    # rounded twice, to 24 and to 8 bits; the small ones are subnormal
    bound = exact.abs()[~nan] * (2**-8 + 2**-24) + 2.0**-134
    finite = value[~nan].isfinite()
    assert bool((error <= bound)[finite].all()) and bool((exact.abs()[~nan] > 3.3e38)[~finite].all())
    assert same(torch.nan_to_num(value), torch.nan_to_num(decode(codes, scales, (3, 256))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_get_the_dtype_that_is_asked_for(tmp_path, dtype):
    codes, scales = encode(torch.randn(40, 50), (16, 16))
    found = opened(tmp_path, {NAME: codes, INVERSE: scales}, (16, 16), dtype)
    assert same(found[NAME], decode(codes, scales, (16, 16), dtype))
    assert found.headers[NAME].dtype == dtype and found.headers[NAME].nbytes == 2000 * dtype.itemsize


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.bfloat16, [[0.5, 3.0]]),
        (torch.float16, [[0.5, 3.0]]),
        (torch.float8_e8m0fnu, [[0.5, 4.0]]),
        (torch.uint8, [[126, 129]]),
    ],
)
def test_scales_of_other_dtypes_mean_what_they_say(tmp_path, dtype, values):
    codes = EVERY_CODE[:120].reshape(6, 20).contiguous()
    scales = torch.tensor(values).to(dtype)
    meant = torch.tensor([[0.5, 4.0]]) if dtype == torch.uint8 else scales.float()
    found = opened(tmp_path, {NAME: codes, INVERSE: scales}, (6, 10))
    assert same(found[NAME], decode(codes, meant, (6, 10)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_the_whole_matrix(tmp_path, shape):
    codes = EVERY_CODE[:120].reshape(6, 20).contiguous()
    scales = torch.full(shape, 0.3)
    tensors = {NAME: codes, INVERSE: scales, "a.activation_scale": torch.ones(())}
    found = opened(tmp_path, tensors, None)
    assert list(found) == [NAME] and same(found[NAME], decode(codes, scales.reshape(1, 1), (6, 20)))


def test_experts_in_one_tensor_have_blocks_of_their_own(tmp_path):
    experts = [encode(torch.randn(13, 17), (4, 5)) for _ in range(3)]
    name = "experts.gate_up_proj"
    tensors = {
        name: torch.stack([c.view(torch.uint8) for c, _ in experts]).view(CODES),
        f"{name}_scale_inv": torch.stack([s for _, s in experts]),
        f"{name}_activation_scale": torch.ones(3),
    }
    found = opened(tmp_path, tensors, (4, 5))
    assert list(found) == [name]
    assert same(found[name], torch.stack([decode(c, s, (4, 5)) for c, s in experts]))


def test_parts_are_those_of_the_whole(tmp_path):
    stack = [encode(torch.randn(13, 17), (4, 5)) for _ in range(3)]
    plain, scales = encode(torch.randn(13, 17), (4, 5))
    tensors = {
        "stack": torch.stack([c.view(torch.uint8) for c, _ in stack]).view(CODES),
        "stack_scale_inv": torch.stack([s for _, s in stack]),
        NAME: plain,
        INVERSE: scales,
        "bias": torch.randn(13),
    }
    found = opened(tmp_path, tensors, (4, 5))
    for name in ("stack", NAME, "bias"):
        for start, stop in ((0, 3), (1, 2), (2, 3)):
            assert same(found.part(name, start, stop).contiguous(), found[name][start:stop].contiguous())


def test_stored_tensors_and_headers_know_nothing_of_fp8(tmp_path):
    codes, scales = encode(torch.randn(40, 50), (16, 16))
    found = opened(tmp_path, {NAME: codes, INVERSE: scales}, (16, 16))
    stored = found.stored()
    assert list(stored) == list(found) == [NAME] and len(found) == 1 and INVERSE not in found
    assert stored[NAME].get_dtype() == "BF16" and stored[NAME].get_shape() == [40, 50]
    assert same(stored[NAME][3:5], decode(codes, scales, (16, 16))[3:5])
    assert found.layout.scaled == {NAME: Scaled(INVERSE, (16, 16))}
    assert found.sha256s() == found.checkpoint.sha256s() and found.folder == tmp_path


def test_names_of_scales():
    names = dict.fromkeys(("a.weight_scale_inv", "b.scale", "c.qscale_weight", "d_scale_inv", "e.scale"), 0)
    assert [inverse_of(f"{n}.weight", names) for n in "abcd"] == [
        "a.weight_scale_inv",
        "b.scale",
        "c.qscale_weight",
        "",
    ]
    assert inverse_of("d", names) == "d_scale_inv" and inverse_of("e", names) == ""


GOOD = {NAME: (CODES, (130, 257)), INVERSE: (torch.float32, (2, 3))}


@pytest.mark.parametrize(
    ("changes", "block", "words"),
    [
        ({INVERSE: None}, (128, 128), r"this: 1 weights are fp8 without scales: 'a\.weight' \(there is no 'a\.weight_scale_inv'\); fetch"),
        ({"b.weight_scale_inv": (torch.float32, (1, 1))}, (128, 128), "that are not there: 'b.weight_scale_inv'; fetch"),
        ({NAME: (torch.bfloat16, (130, 257))}, (128, 128), "that are not there: 'a.weight_scale_inv'; fetch"),
        ({INVERSE: (torch.float32, (3, 2))}, (128, 128), r"'a\.weight_scale_inv' is \(3, 2\) and should be \(2, 3\), one scale per 128 x 128"),
        ({INVERSE: (torch.float32, (1, 2))}, (128, 128), r"is \(1, 2\) and should be \(2, 3\)"),
        ({INVERSE: (torch.float32, (6,))}, (128, 128), r"is \(6,\) and should be \(2, 3\)"),
        ({}, (64, 64), r"is \(2, 3\) and should be \(3, 5\).*correct weight_block_size"),
        ({}, None, r"is \(2, 3\) and should be \(1, 1\)"),
        ({INVERSE: (torch.int32, (2, 3))}, (128, 128), r"'a\.weight_scale_inv' is torch\.int32, and scales are float32"),
        ({NAME: (CODES, (130,)), INVERSE: (torch.float32, (2,))}, (128, 128), r"fp8 of shape \(130,\), which is no matrix"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(changes, block, words):
    shapes = {name: facts for name, facts in (GOOD | changes).items() if facts}
    with pytest.raises(CorruptCheckpointError, match=words):
        Blockwise.of(shapes, block, torch.bfloat16, "this")
    assert Blockwise.of(GOOD, (128, 128), torch.bfloat16, "this").shapes(GOOD) == {
        NAME: (torch.bfloat16, (130, 257))
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_scales_that_are_no_scales_are_refused_when_they_are_read(tmp_path, bad):
    codes, scales = encode(torch.randn(40, 50), (16, 16))
    scales[1, 2] = bad
    found = opened(tmp_path, {NAME: codes, INVERSE: scales}, (16, 16))
    words = rf"model\.safetensors: 'a\.weight_scale_inv' holds 1 scales .* above 0, such as {re.escape(str(bad))}; fetch"
    with pytest.raises(CorruptCheckpointError, match=words):
        found[NAME]


def test_every_code_is_the_float_that_torch_has():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    one = values_of(every, torch.ones(16, 1), 16)
    assert torch.equal(one.nan_to_num(1e9), every.float().nan_to_num(1e9))
    assert torch.equal(one.signbit(), every.float().signbit())
    # rows of several scales, the last block being a part of one
    scales = torch.rand(16, 4)
    into = torch.empty(16, 16)
    expected = every.float() * scales.repeat_interleave(5, 1)[:, :16]
    assert values_of(every, scales, 5, into) is into
    assert torch.equal(into.nan_to_num(1e9), expected.nan_to_num(1e9))
    assert torch.equal(values_of(every[3:4], scales[3], 5), expected[3:4])
    assert values_of(every[:, :0], scales[:, :0], 5).shape == (16, 0)
