"""A product on the path that `choice` holds, or on that of the device: the native one where it has an answer, else plain torch.

Nobody may look on: `ops` sends compilers, tracers and autograd another way.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mono_quant.kernels import packs, reference, weight_only
from mono_quant.kernels.accelerators import has_int_mm, int_mm_is_exact, path_of
from mono_quant.kernels.activations import AUTO, ActivationScheme
from mono_quant.kernels.choice import active, scheme_of, scheme_on
from mono_quant.kernels.cpu import Cpu, Packed
from mono_quant.kernels.inputs import check_codes, check_indices, check_input

# What errors call the layers.
INT8, CONV, TABLE, HALF = (
    "an int8 linear layer", "an int8 convolution", "an int8 embedding", "a float16 linear layer"
)  # fmt: skip

# So few tokens alone, as of a model that only ever decodes, are not worth the memory of packed weights.
_FEW_TOKENS = 4

# What torch's int8 product wants on a device: more rows than 16, and the other two sizes multiples of 8.
_INT_MM_ROWS, _INT_MM_STEP = 32, 8

# Rows of unfolded patches held at once by a convolution, in elements: bounds its scratch memory.
_PATCH_ELEMENTS = 1 << 24


def linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activations: str = AUTO
) -> Tensor:
    """Apply an int8 linear layer; see `ops.int8_linear`."""
    scheme = scheme_of(activations, x)
    out, cpu = None, active.cpu
    if cpu is not None and x.is_cpu:
        out = cpu.linear(x, weight, weight_scale, bias, scheme, _packed(cpu, x, weight, scheme))
    elif (device := path_of(x)) is not None:
        out = device.linear(x, weight, weight_scale, bias, scheme)
    if out is not None:
        return out
    check_codes(weight, INT8)
    check_input(x, INT8, weight.shape[1])
    if weight_only.serves(x.device, activations, active.wanted):
        return weight_only.linear(x, weight, weight_scale, bias)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = reference.linear(rows, weight, weight_scale, bias, scheme, _matmul)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _packed(cpu: Cpu, x: Tensor, weight: Tensor, scheme: ActivationScheme) -> Packed | None:
    """Return the packed form of a weight, if it is kept."""
    if x.numel() <= _FEW_TOKENS * weight.shape[1] or not packs.pays(cpu, scheme):
        return None
    if weight.dtype is not torch.int8 or not weight.is_cpu or not weight.is_contiguous():
        return None
    rows, depth = weight.shape
    return packs.find(cpu, weight, (weight.data_ptr(), rows, depth), scheme)


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer with float16 weights in float32; see `ops.half_linear`."""
    cpu = active.cpu
    if cpu is not None:
        out = cpu.half_linear(x, weight, bias)
        if out is not None:
            return out
    check_input(x, HALF, weight.shape[1])
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def native_embedding(
    indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Gather and dequantize rows by kernels of ours; None where they have no answer. See `ops.int8_embedding`."""
    cpu = active.cpu
    if cpu is not None and weight.is_cpu:
        return cpu.embedding(indices, weight, weight_scale, dtype)
    device = path_of(weight)
    return None if device is None else device.embedding(indices, weight, weight_scale, dtype)


def embedding(indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather and dequantize rows in plain torch; see `ops.int8_embedding`."""
    check_codes(weight, TABLE)
    check_indices(indices, TABLE)
    rows = F.embedding(indices, weight)
    return (rows.float() * F.embedding(indices, weight_scale)).to(dtype)


def _matmul(codes: Tensor, weight: Tensor) -> Tensor:
    if not _has_int_mm(codes, weight):
        return reference.int_matmul(codes, weight)
    return by_int_mm(codes, weight, 0 if codes.is_cpu else _INT_MM_ROWS)


def by_int_mm(codes: Tensor, weight: Tensor, least: int) -> Tensor:
    """Return the product by torch's int8 one, with zeros below fewer tokens than `least`."""
    rows = codes.shape[0]
    if rows < least:
        codes = F.pad(codes, (0, 0, 0, least - rows))
    return torch._int_mm(codes.contiguous(), weight.contiguous().t())[:rows]


def _has_int_mm(codes: Tensor, weight: Tensor) -> bool:
    if not codes.is_cpu:
        return fits_int_mm(codes, weight) and has_int_mm(codes.device)
    # with one input feature torch 2.13 confuses the strides and the result is wrong
    if codes.shape[0] <= 16 or codes.shape[1] < 16 or weight.shape[0] == 0:
        return False
    # on CPUs without VNNI it is a scalar loop
    return _int_mm_is_exact()


def fits_int_mm(codes: Tensor, weight: Tensor) -> bool:
    """Say whether torch's int8 product takes these sizes on a device, rows of zeros added where there are too few."""
    sizes = (codes.shape[1], *weight.shape)
    return codes.shape[0] > 0 and all(size > 0 and size % _INT_MM_STEP == 0 for size in sizes)


@functools.cache
def _int_mm_is_exact() -> bool:
    return torch.cpu._is_vnni_supported() and int_mm_is_exact("cpu")


def out_sizes(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Return height and width of what a convolution gives."""
    return [
        (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, gap in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]


def conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activations: str = AUTO,
) -> Tensor:
    """Apply an int8 convolution; see `ops.int8_conv`."""
    size = out_sizes(x, weight, stride, padding, dilation)
    scheme = scheme_on(activations, x.is_cpu)
    native, cpu = None, active.cpu
    if cpu is not None and x.is_cpu:
        native = cpu.conv(x, weight, weight_scale, bias, stride, padding, dilation, groups, size, scheme)
    elif (device := path_of(x)) is not None:
        native = device.conv(x, weight, weight_scale, bias, stride, padding, dilation, groups, scheme)
    if native is not None:
        return native
    check_codes(weight, CONV)
    if weight_only.serves(x.device, activations, active.wanted):
        return weight_only.conv(x, weight, weight_scale, bias, stride, padding, dilation, groups)
    places = size[0] * size[1]
    kernel_size, channels, inner = weight.shape[2:], weight.shape[0], weight.shape[1]
    # kernel row, kernel column, channel: the order in which values share a scale
    weight = weight.permute(0, 2, 3, 1).flatten(1)
    out = x.new_empty(x.shape[0], channels, *size)
    depth, width = weight.shape[1], channels // groups
    step = max(1, _PATCH_ELEMENTS // max(1, places * depth * groups))
    for start in range(0, x.shape[0], step):
        # unfold has no half kernel on every device; the codes are computed from fp32 in any case
        part = x[start : start + step].float()
        patches = F.unfold(part, tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride))
        patches = patches.view(part.shape[0], groups, inner, depth // max(1, inner), places)
        tokens = patches.permute(1, 0, 4, 3, 2).flatten(3)
        for group in range(groups):
            rows = slice(group * width, (group + 1) * width)
            offset = None if bias is None else bias[rows]
            y = linear(tokens[group], weight[rows], weight_scale[rows], offset, scheme.name)
            out[start : start + step, rows] = y.transpose(1, 2).reshape(part.shape[0], width, *size)
    return out
