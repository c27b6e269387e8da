"""What becomes of the models that people use: which calls, and that they compute what was written."""

import pytest
import torch
from captured import GRAPHS, ON_DEVICE, Captured, capture
from models import relative_error
from torch import Tensor

from mono_quant import dynamic_quantize

# Activations of halves of a tensor, which torch computes in another order than those of a tensor of their own.
STRIDED = {"modernbert", "phi3", "glm4"}


def first(out: object) -> Tensor:
    value = out if isinstance(out, Tensor) else out[0]
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize("name", GRAPHS)
def test_a_family_becomes_these_calls_and_computes_the_same(name):
    family, expected = GRAPHS[name]
    model, inputs = family.build(), family.inputs()
    quantized = dynamic_quantize(model, "int8", embeddings=False)[0].eval()
    with torch.inference_mode():
        exact, eager = first(model(**inputs)), first(quantized(**inputs))
        captured, composed = capture(quantized, **inputs)
    noise = relative_error(exact, eager)
    assert captured.calls == expected
    if name in STRIDED:
        assert relative_error(eager, first(composed)) <= 0.5 * noise + 1e-6
    else:
        assert torch.equal(first(composed), eager)
    for fused in captured.fused:
        outputs = [t for t in fused if isinstance(t, Tensor) and t.shape == eager.shape]
        assert any(relative_error(eager, t) <= 1.5 * noise + 1e-5 for t in outputs)


# the others are in test_devices
@pytest.mark.parametrize("name", ["t5", "gemma3", "phi3"])
def test_a_family_in_half_precision_becomes_these_calls_where_kernels_for_a_device_are(name):
    pytest.importorskip("triton")
    family, expected = GRAPHS[name][0], ON_DEVICE[name]
    model = dynamic_quantize(family.build().bfloat16(), "int8", embeddings=False)[0].eval()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in family.inputs().items()}
    captured = Captured(path="triton")
    torch.compiler.reset()
    with torch.inference_mode():
        eager = first(model(**inputs))
        composed = first(torch.compile(model, backend=captured)(**inputs))
    assert captured.calls == expected
    outputs = [out for out in captured.fused[0] if isinstance(out, Tensor) and out.shape == eager.shape]
    errors = [relative_error(eager, out) for out in (composed, *outputs)]
    # a GELU by a hyperbolic tangent is written out in one of the two, and rounds after each operation there
    assert min(errors) == 0 and sorted(errors)[1] <= 2 * torch.finfo(torch.bfloat16).eps
