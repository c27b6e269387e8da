"""The competitors that run a graph of their own: ONNX Runtime and OpenVINO."""

import contextlib
import functools
import importlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import memory
from bench.cases import PROMPT, Case, Inputs
from bench.restriction import restricted
from bench.timing import measure

# What the export loads.
ONNX_IMPORTS = ("onnx", "onnxscript", "onnxruntime", "onnxruntime.quantization")


@dataclass(frozen=True)
class Runner:
    """Something that runs.

    Attributes:
        call: gives the output for inputs.
        note: which of several ways was taken.
        without: MiB that the process held before this was opened, where that is not what it held before the model was built.
    """

    call: Callable[[Inputs], torch.Tensor]
    note: str = ""
    without: float | None = None

    def saying(self, note: str) -> "Runner":
        return replace(self, note=note)


class _Whole(nn.Module):
    """A model with its inputs by position, and its first output alone."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, args, strict=True)))[0]  # type: ignore[no-any-return]


class _Step(nn.Module):
    """A decoder fed one token, with the cache as plain tensors in and out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache  # noqa: PLC0415

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)[0]
        return out, *_tensors(cache)


def _tensors(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def _prompt(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    from transformers import DynamicCache  # noqa: PLC0415

    cache = DynamicCache()
    model(input_ids=inputs["input_ids"][:, :PROMPT], past_key_values=cache, use_cache=True)
    return [tensor.contiguous() for tensor in _tensors(cache)]


def _names(past: list[torch.Tensor]) -> tuple[list[str], list[str]]:
    return [f"past_{i}" for i in range(len(past))], [f"present_{i}" for i in range(len(past))]


def _export(model: nn.Module, inputs: Inputs, past: list[torch.Tensor], file: Path) -> None:
    """Write an ONNX file: of fixed sizes, which suit the optimizers best, but for the cache, which grows."""
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "external_data": False}
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        if not past:
            example = tuple(inputs.values())
            torch.onnx.export(_Whole(model, list(inputs)), example, file, input_names=list(inputs), **options)
            return
        before, after = _names(past)
        torch.onnx.export(
            _Step(model),
            (inputs["input_ids"][:, PROMPT : PROMPT + 1], past),
            file,
            input_names=["input_ids", *before],
            output_names=["out", *after],
            dynamic_shapes=(None, [{2: torch.export.Dim.DYNAMIC}] * len(past)),
            **options,
        )


# ---- ONNX Runtime


def onnxruntime(model: nn.Module, case: Case, inputs: Inputs) -> Runner:
    """Quantize in every reasonable way, and keep the one that is fastest here."""
    importlib.import_module("onnxruntime.quantization")
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        past = _prompt(model, inputs) if case.decode else []
        source = Path(folder) / "model.onnx"
        _export(model, inputs, past, source)
        del model
        ways = _quantized(source, case, config)
        openers = {name: functools.partial(_open_onnxruntime, file, past) for name, file in ways.items()}
        return _fastest(openers, inputs, past)


def _fastest(
    openers: dict[str, Callable[[], Callable[[Inputs], torch.Tensor]]],
    inputs: Inputs,
    past: list[torch.Tensor],
) -> Runner:
    """Open each way, time them in turn, and open the best again, alone: the first that is within 5 % of the fastest."""
    calls = {name: opener() for name, opener in openers.items()}
    for call in calls.values():
        call(inputs)
    times = measure({n: functools.partial(c, inputs) for n, c in calls.items()}, 0.5, best=True)
    name = next(n for n in times if times[n] <= 1.05 * min(times.values()))
    calls.clear()
    del call
    memory.forget()
    without = memory.resident()
    return Runner(openers[name](), name + (", prompt's cache from fp32" if past else ""), without)


def _quantized(source: Path, case: Case, config: Any) -> dict[str, Path]:
    """Write the int8 files to choose from."""
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


def _open_onnxruntime(file: Path, past: list[torch.Tensor]) -> Callable[[Inputs], torch.Tensor]:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    known = {node.name for node in session.get_inputs()}

    def forward(inputs: Inputs) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in inputs.items() if n in known})[0])

    if not past:
        return forward
    value = runtime.OrtValue.ortvalue_from_numpy
    before, _ = _names(past)
    prompt = {name: value(tensor.numpy()) for name, tensor in zip(before, past, strict=True)}

    def decode(inputs: Inputs) -> torch.Tensor:
        ids, cache, steps = inputs["input_ids"], prompt, []
        for i in range(PROMPT, ids.shape[1]):
            feed = {"input_ids": value(ids[:, i : i + 1].numpy()), **cache}
            out, *present = session.run_with_ort_values(None, feed)
            steps.append(torch.from_numpy(out.numpy()))
            cache = dict(zip(before, present, strict=True))
        return torch.cat(steps, 1)

    return decode


# ---- OpenVINO


def openvino(model: nn.Module, case: Case, inputs: Inputs) -> Runner:
    """Compress the weights to int8; on CPUs with VNNI or AMX OpenVINO then quantizes activations at run time."""
    library, nncf = importlib.import_module("openvino"), importlib.import_module("nncf")
    importlib.import_module("logging").getLogger("nncf").setLevel("ERROR")
    past = _prompt(model, inputs) if case.decode else []
    with tempfile.TemporaryDirectory() as folder:
        graph, source = _openvino_graph(model, inputs, past, Path(folder) / "model.onnx")
        del model
        with contextlib.redirect_stdout(io.StringIO()):
            graph = nncf.compress_weights(graph)
        target = Path(folder) / "int8.xml"
        library.save_model(graph, target, compress_to_fp16=False)
        del graph
        openers = {
            name + source: functools.partial(_open_openvino, target, settings, past, list(inputs))
            for name, settings in _openvino_ways().items()
        }
        return _fastest(openers, inputs, past)


def _openvino_graph(
    model: nn.Module, inputs: Inputs, past: list[torch.Tensor], file: Path
) -> tuple[Any, str]:
    """Return the float graph, and where it comes from when that is not torch itself."""
    library = importlib.import_module("openvino")
    if not past:
        try:
            whole, example = _Whole(model, list(inputs)), tuple(inputs.values())
            return library.convert_model(whole, example_input=example), ""
        except importlib.import_module("openvino.frontend").OpConversionFailure:
            # an operation that its torch front end does not know: causal masks of transformers
            pass
    _export(model, inputs, past, file)
    graph = library.Core().read_model(file)
    if past:
        transformations = importlib.import_module("openvino._offline_transformations")
        transformations.apply_make_stateful_transformation(graph, dict(zip(*_names(past), strict=True)))
    return graph, ", from ONNX"


def _openvino_ways() -> dict[str, dict[str, Any]]:
    common = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if restricted():
        # what it chooses by itself on a CPU without VNNI and bf16
        return {
            "f32 activations": {
                **common,
                "INFERENCE_PRECISION_HINT": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            }
        }
    return {"defaults": common, "groups of 128": {**common, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}}


def _open_openvino(
    file: Path, settings: dict[str, Any], past: list[torch.Tensor], order: list[str]
) -> Callable[[Inputs], torch.Tensor]:
    library = importlib.import_module("openvino")
    request = library.Core().compile_model(file, "CPU", settings).create_infer_request()
    if not past:
        return lambda inputs: torch.from_numpy(request.infer([inputs[n].numpy() for n in order])[0].copy())
    names = {f"{a}{b}": tensor for a, b, tensor in zip(*_names(past), past, strict=True)}

    def decode(inputs: Inputs) -> torch.Tensor:
        ids, steps = inputs["input_ids"], []
        for state in request.query_state():
            state.state = library.Tensor(names[state.name].numpy())
        for i in range(PROMPT, ids.shape[1]):
            found = request.infer({"input_ids": ids[:, i : i + 1].numpy()})
            steps.append(torch.from_numpy(found[0].copy()))
        return torch.cat(steps, 1)

    return decode
