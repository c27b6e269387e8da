"""Walking over tensors."""

import torch

from mono_quant.planning.walk import common_dtype


def test_the_common_dtype_is_the_floating_one_with_most_values():
    fp32, bf16, int8 = torch.float32, torch.bfloat16, torch.int8
    assert common_dtype([]) == fp32
    assert common_dtype([(int8, 9), (bf16, 0)]) == fp32
    assert common_dtype([(fp32, 2), (bf16, 3), (fp32, 2), (int8, 9)]) == fp32
    assert common_dtype([(fp32, 2), (bf16, 5), (fp32, 2)]) == bf16
