"""OpenVINO: weights compressed to int8, activations quantized at run time as it does by default, the cache in its states.

Decoders come from optimum-intel, as they do for its users: graphs through ONNX have no attention that OpenVINO knows as one.
"""

import contextlib
import importlib
import io
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import PROMPT, Case, Inputs
from bench.exporting import Whole
from bench.restriction import restricted
from bench.runner import Runner
from bench.skip import Skip

FILE = "int8.xml"
# Holds the Python of the environment that has optimum-intel.
PEERS = "MONO_QUANT_BENCHMARK_PEERS"
# What it decides by itself, and the error and the speed depend on.
CHOICES = {
    "INFERENCE_PRECISION_HINT": "",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "groups of ",
    "KV_CACHE_PRECISION": "cache ",
}


def write(model: nn.Module, case: Case, inputs: Inputs, folder: Path) -> None:
    """Compress the weights to int8, as optimum-intel's `load_in_8bit` does, and write the graph."""
    if case.causal:
        _write_decoder(model, case, folder)
        return
    library, nncf = importlib.import_module("openvino"), importlib.import_module("nncf")
    importlib.import_module("logging").getLogger("nncf").setLevel("ERROR")
    whole, example = Whole(model, list(inputs)), tuple(inputs.values())
    graph = library.convert_model(whole, example_input=example)
    with contextlib.redirect_stdout(io.StringIO()):
        graph = nncf.compress_weights(graph)
    library.save_model(graph, folder / FILE, compress_to_fp16=False)


def _write_decoder(model: nn.Module, case: Case, folder: Path) -> None:
    python = os.environ.get(PEERS)
    if python is None:
        raise Skip(
            "its decoders are written by optimum-intel, in an environment of its own: give --peers PYTHON"
        )
    model.save_pretrained(folder / "float")
    script = Path(__file__).with_name("with_optimum.py")
    # the environment of this process is not that one's
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, str(script), str(folder), "decode" if case.decode else "prefill"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Skip(f"optimum-intel failed: {done.stderr.strip().splitlines()[-1][:160]}")
    for name in ("float", "headed"):
        shutil.rmtree(folder / name, ignore_errors=True)


def open_(folder: Path, case: Case, inputs: Inputs, **more: Any) -> Runner:
    """Open the graph with the settings of optimum-intel, which are OpenVINO's own but for the hint, and with those in `more`."""
    library = importlib.import_module("openvino")
    compiled = library.Core().compile_model(folder / FILE, "CPU", {**more, **_settings()})
    note = ", ".join(f"{text}{_plain(compiled.get_property(name))}" for name, text in CHOICES.items())
    request = compiled.create_infer_request()
    if case.decode:
        return _decoder(request, inputs["input_ids"]).saying(note)
    note = note.rpartition(", ")[0]
    if not case.causal:
        order = list(inputs)
        return Runner(
            lambda x: torch.from_numpy(request.infer([x[n].numpy() for n in order])[0].copy()), note
        )

    def forward(inputs: Inputs) -> torch.Tensor:
        ids = inputs["input_ids"]
        return torch.from_numpy(request.infer(_fed(compiled, ids, 0))["last_hidden_state"].copy())

    return Runner(forward, note)


def _decoder(request: Any, prompt: torch.Tensor) -> Runner:
    """Read the prompt when it is reset, and let the states grow as optimum-intel does."""
    compiled = request.get_compiled_model()

    def step(ids: torch.Tensor, known: int) -> torch.Tensor:
        found = request.infer(_fed(compiled, ids, known))
        return torch.from_numpy(found[0].copy())

    def reset() -> None:
        request.reset_state()
        step(prompt[:, :PROMPT], 0)

    def decode(inputs: Inputs) -> torch.Tensor:
        ids = inputs["input_ids"]
        return torch.cat([step(ids[:, i : i + 1], i) for i in range(PROMPT, ids.shape[1])], 1)

    return Runner(decode, reset=reset)


def _fed(compiled: Any, ids: torch.Tensor, known: int) -> dict[str, Any]:
    """Return what a decoder is fed: tokens behind `known` others, none of them masked."""
    batch, length = ids.shape
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones(batch, known + length, dtype=torch.int64),
        "position_ids": torch.arange(known, known + length).expand(batch, length),
        "beam_idx": torch.arange(batch, dtype=torch.int32),
    }
    asked = [name for port in compiled.inputs for name in port.get_names() if name in values]
    return {name: values[name].numpy() for name in asked}


def open_nothing() -> None:
    """Run a graph of one product, after which the runtime holds what it holds for itself."""
    library = importlib.import_module("openvino")
    ops = importlib.import_module("openvino.opset13")
    x = ops.parameter([8, 8], dtype=library.Type.f32)
    graph = library.Model([ops.matmul(x, x, False, False)], [x], "nothing")
    library.Core().compile_model(graph, "CPU", _settings())([torch.zeros(8, 8).numpy()])


def _plain(value: Any) -> str:
    return str(getattr(value, "get_type_name", lambda: value)())


def _settings() -> dict[str, Any]:
    common = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if not restricted():
        return common
    # what it chooses by itself on a CPU without VNNI and bf16
    return {**common, "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
