"""mono_quant as its users run it: the folder that `save` wrote, loaded and compiled."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import Case, Inputs
from bench.eager import eager
from bench.runner import Runner
from bench.skip import Skip

FOLDER = "int8"


def write(model: nn.Module, case: Case, inputs: Inputs, folder: Path) -> None:
    """Save the int8 model."""
    from mono_quant import quantize  # noqa: PLC0415

    quantize(model, fidelity=False).save(folder / FOLDER)


def open_(folder: Path, case: Case, _: Inputs, activations: str = "auto") -> Runner:
    """Load it, its weights mapped as the other runtimes map theirs; decoders keep a static cache."""
    from mono_quant import kernels, load  # noqa: PLC0415

    if "mono_quant" not in torch.compiler.list_backends():
        raise Skip("this mono_quant has no graph backend")
    options: dict[str, Any] = {} if activations == "auto" else {"activations": activations}
    model = load(folder / FOLDER, mmap=True, compile=True, **options)
    runner = eager(model, case, static=True)
    return runner.saying(f"{kernels.describe()}, {kernels.activation_scheme(activations)}")


def open_nothing() -> None:
    """Run a compiled model of two products, after which Python, torch and its compiler hold what they hold for themselves."""
    from mono_quant import dynamic_quantize, graphs  # noqa: F401, PLC0415

    model = dynamic_quantize(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))[0]
    model.compile(backend="mono_quant")
    with torch.inference_mode():
        model(torch.zeros(1, 8))
    torch.compiler.reset()
