"""ONNX Runtime: int8 files made in every reasonable way, and the fastest of them opened."""

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import PROMPT, Case, Inputs
from bench.exporting import export, names, prompt
from bench.runner import Runner
from bench.timing import measure

CHOSEN, PAST = "chosen.json", "past.pt"


def write(model: nn.Module, case: Case, inputs: Inputs, folder: Path) -> None:
    """Quantize in every reasonable way, and note down which is fastest here."""
    config = model.config
    past = prompt(model, inputs) if case.decode else []
    source = folder / "model.onnx"
    export(model, inputs, past, source)
    del model
    torch.save(past, folder / PAST)
    ways = _quantized(source, case, config)
    calls = {name: functools.partial(_opened(file, past), inputs) for name, file in ways.items()}
    times = measure(calls, 0.5, best=True)
    # the first that is within 5 % of the fastest: the more accurate come first
    name = next(n for n in times if times[n] <= 1.05 * min(times.values()))
    calls.clear()
    for file in folder.glob("*.onnx*"):
        if file != ways[name]:
            file.unlink()
    (folder / CHOSEN).write_text(json.dumps({"note": name, "file": ways[name].name}), encoding="utf-8")


def open_(folder: Path, case: Case, _: Inputs) -> Runner:
    """Open the file that `write` chose."""
    chosen = json.loads((folder / CHOSEN).read_text(encoding="utf-8"))
    past = torch.load(folder / PAST)
    runner = Runner(_opened(folder / chosen["file"], past), chosen["note"])
    return runner.saying("prompt's cache from fp32") if case.decode else runner


def open_nothing() -> None:
    """Run a graph of one product, after which the runtime holds what it holds for itself."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    value = [helper.make_tensor_value_info(name, kind, [8, 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "g", value[:1], value[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    session = runtime.InferenceSession(
        made.SerializeToString(), _options(), providers=["CPUExecutionProvider"]
    )
    session.run(None, {"x": torch.zeros(8, 8).numpy()})


def _quantized(source: Path, case: Case, config: Any) -> dict[str, Path]:
    """Write the int8 files to choose from."""
    quantization = importlib.import_module("onnxruntime.quantization")
    sources = _sources(source, case, config)
    kinds = {"per channel": (True, "QInt8"), "per tensor": (False, "QInt8")}
    if case.images:
        # convolutions are faster with unsigned weights
        kinds["per tensor, unsigned"] = (False, "QUInt8")
    found, failure = {}, None
    # the more accurate first
    for kind, (per_channel, dtype) in kinds.items():
        for name, file in sources.items():
            target = file.with_stem(f"{file.stem}-{kind}")
            weight_type = getattr(quantization.QuantType, dtype)
            # the type of tensors whose producer shape inference does not know
            extra = {"DefaultTensorType": 1}
            try:
                quantization.quantize_dynamic(
                    str(file),
                    str(target),
                    per_channel=per_channel,
                    weight_type=weight_type,
                    extra_options=extra,
                )
                found[f"{name}, {kind}"] = target
            except Exception as e:  # noqa: BLE001 - one of several ways
                failure = e
    if not found and failure is not None:
        raise failure
    return found


def _sources(source: Path, case: Case, config: Any) -> dict[str, Path]:
    """Return the float graph as it is, and what ONNX Runtime's own tools make of it."""
    quantization = importlib.import_module("onnxruntime.quantization")
    sources = {"plain": source}
    prepared = source.with_stem("prepared")
    try:
        quantization.shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        sources["pre-processed"] = prepared
    except Exception:  # noqa: BLE001, S110 - it does not know every model; the plain graph is there
        pass
    if case.kind:
        optimized = source.with_stem("optimized")
        try:
            optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
            heads = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
            optimizer.optimize_model(str(source), case.kind, **heads).save_model_to_file(str(optimized))
            sources["optimized"] = optimized
        except Exception:  # noqa: BLE001, S110 - as above
            pass
    return sources


def _options() -> Any:
    options = importlib.import_module("onnxruntime").SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return options


def _opened(file: Path, past: list[torch.Tensor]) -> Callable[[Inputs], torch.Tensor]:
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), _options(), providers=["CPUExecutionProvider"])
    known = {node.name for node in session.get_inputs()}

    def forward(inputs: Inputs) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in inputs.items() if n in known})[0])

    if not past:
        return forward
    value = runtime.OrtValue.ortvalue_from_numpy
    before, _ = names(past)
    prompt_ = {name: value(tensor.numpy()) for name, tensor in zip(before, past, strict=True)}

    def decode(inputs: Inputs) -> torch.Tensor:
        # the cache of one step is handed to the next as it is, without a copy
        ids, cache, steps = inputs["input_ids"], prompt_, []
        for i in range(PROMPT, ids.shape[1]):
            feed = {"input_ids": value(ids[:, i : i + 1].numpy()), **cache}
            out, *present = session.run_with_ort_values(None, feed)
            steps.append(torch.from_numpy(out.numpy()))
            cache = dict(zip(before, present, strict=True))
        return torch.cat(steps, 1)

    return decode
