"""What becomes of the models that people use: which calls, and that they compute what was written."""

import pytest
import torch
from captured import GRAPHS, capture
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
