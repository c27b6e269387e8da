"""What torch gives back with the memory of a weight is followed: a write into it is a write into the weight."""

import importlib.util

import pytest
import torch

from mono_quant.planning.writes import written_by_code

# each shares the memory of a 4 x 4 tensor of some dtype
CALLS = [
    "bfloat16()",
    "chunk(2)[0]",
    "contiguous()",
    "detach()",
    "diagonal()",
    "double()",
    "expand(4,4)",
    "flatten()",
    "float()",
    "half()",
    "movedim(0,1)",
    "narrow(0,0,2)",
    "permute(1,0)",
    "requires_grad_(False)",
    "reshape(2,8)",
    "select(0,1)",
    "split(2)[0]",
    "squeeze()",
    "t()",
    'to("cpu")',
    "transpose(0,1)",
    "type_as(x)",
    "unbind()[0]",
    "unsqueeze(0)",
    "view(2,8)",
    "view_as(x)",
    "data",
    "T",
    "mT",
    "real",
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CODE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        self.fc.weight.{call}.mul_(2)
        return x
"""


@pytest.mark.parametrize("call", CALLS)
def test_a_write_into_a_view_is_a_write_into_the_weight(tmp_path, call):
    def shares(weight):
        made = eval(f"weight.{call}", {"weight": weight, "x": torch.ones_like(weight)})
        return made.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()

    assert any(shares(torch.ones(4, 4, dtype=dtype)) for dtype in DTYPES)
    path = tmp_path / "block.py"
    path.write_text(CODE.format(call=call))
    spec = importlib.util.spec_from_file_location("block", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(written_by_code(module.Block())) == {"fc.weight"}
