"""mono_quant as its users run it: the folder that `save` wrote, loaded and compiled."""

import tempfile
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
    """Do all of it with a tiny model, after which Python, torch and its compiler hold what they hold for themselves."""
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    from mono_quant import load, quantize  # noqa: PLC0415

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name) / FOLDER
        quantize(BertModel(BertConfig(**sizes, vocab_size=64)).eval(), fidelity=False).save(folder)
        model = load(folder, mmap=True, compile=True)
        for _ in range(3):
            model(torch.ones(1, 4, dtype=torch.long))
    torch.compiler.reset()
