"""Rows of a report after a conversion."""

import torch
from torch import nn

from mono_quant.planning.rows import Converted, _is_sound, account, survey


def test_a_tensor_that_only_changed_its_float_dtype_is_kept_with_its_reason_and_its_new_size():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)).bfloat16()
    done = {
        "0.weight": Converted(12, torch.int8, 40.0),
        "0.bias": Converted(12, torch.float32, kept=True),
        "1.weight": Converted(48, torch.float32, kept=True),
    }

    rows = {row.name: row for row in account(survey(model, []), done, {"1.weight": "because"})}

    assert {n: (r.action, r.dtype_before, r.dtype_after, r.bytes_before, r.bytes_after, r.reason) for n, r in rows.items()} == {
        "0.weight": ("quantized", "bfloat16", "int8", 24, 12, ""),
        "0.bias": ("kept", "bfloat16", "float32", 6, 12, "bias"),
        "1.weight": ("kept", "bfloat16", "float32", 24, 48, "because"),
        "1.bias": ("kept", "bfloat16", "bfloat16", 6, 6, "bias"),
    }  # fmt: skip


def test_a_shared_tensor_has_the_dtype_of_the_one_it_is_shared_with():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight

    rows = account(survey(model, []), {"a.weight": Converted(32, torch.float16)}, {})

    assert {r.name: (r.action, r.dtype_after, r.bytes_after) for r in rows} == {
        "a.weight": ("quantized", "float16", 32),
        "a.bias": ("kept", "float32", 16),
        "b.weight": ("shared", "float16", 0),
        "b.bias": ("kept", "float32", 16),
    }


def test_values_of_eight_bits_are_looked_at_too():
    fine = torch.ones(3).to(torch.float8_e4m3fn)
    assert _is_sound(fine, is_buffer=False) and _is_sound(torch.ones(3).half(), is_buffer=False)
    bad = torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2)
    assert not _is_sound(bad, is_buffer=False) and not _is_sound(bad, is_buffer=True)
    mask = torch.tensor([0.0, float("-inf")])
    assert _is_sound(mask, is_buffer=True) and not _is_sound(mask, is_buffer=False)
