"""Rows of a report after a conversion."""

import math

import pytest
import torch
from torch import nn

from mono_quant.planning.rows import Converted, _has_nan, account, int8_notes, survey


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
    assert _has_nan(fine) is None and _has_nan(torch.ones(3).half()) is None
    assert _has_nan(torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2)) is True
    assert _has_nan(torch.tensor([0.0, float("-inf")])) is False


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_infinity_in_a_buffer_is_a_mask_and_nan_never_is(device):
    values = {"mask": -math.inf, "mean": math.nan, "weight": math.inf, "bias": 1.0}
    model = nn.Module()
    for name in ("mask", "mean"):
        model.register_buffer(name, torch.tensor([0.0, values[name]], device=device))
    for name in ("weight", "bias"):
        model.register_parameter(name, nn.Parameter(torch.tensor([0.0, values[name]], device=device)))
    # of what is on meta, whoever read the values says so
    unsound = {name: math.isnan(value) for name, value in values.items() if not math.isfinite(value)}
    rows = list(account(survey(model, []), {}, {}))
    (note,) = [note for note in int8_notes(rows, model, unsound) if note.startswith("NaN")]
    assert "'mean'" in note and "'weight'" in note and "mask" not in note and "bias" not in note
