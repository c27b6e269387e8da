"""Where kernels of a GPU run in tests, and whether codes are those of the reference."""

import torch
from torch import Tensor

from mono_quant.kernels import reference
from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.features import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def assert_codes_of(codes: Codes, x: Tensor, scheme: ActivationScheme) -> None:
    """Assert that codes and scales are exactly those of `x` [M, K] under a scheme."""
    x = x.cpu()
    rows, depth = x.shape
    qmax, spans = scheme.widest_code(depth), scheme.spans(depth)
    planes, scale = codes.planes.cpu(), codes.scale.cpu()
    assert codes.group == scheme.group
    assert planes.dtype == torch.int8 and planes.is_contiguous()
    assert planes.shape == (1 if qmax <= 127 else 2, rows, depth)
    assert scale.dtype == torch.float32 and scale.shape == (len(spans), rows)
    whole = planes[0].int()
    if qmax > 127:
        assert planes[1].numel() == 0 or (planes[1].min() >= 0 and planes[1].max() < 64)
        whole = 64 * whole + planes[1]
    for group, span in enumerate(spans):
        wanted, wanted_scale = reference.quantize_tokens(x[:, span], qmax)
        assert torch.equal(whole[:, span], wanted.int())
        # NaN is any NaN
        assert torch.equal(scale[group].isnan(), wanted_scale[:, 0].isnan())
        assert torch.equal(scale[group].nan_to_num(0.0), wanted_scale[:, 0].nan_to_num(0.0))
