"""The competitors: inside PyTorch a function from a float model to something that runs; outside it files and what opens them."""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import in_mono_quant, in_onnxruntime, in_openvino
from bench.cases import Case, Inputs
from bench.eager import eager
from bench.exporting import ONNX_IMPORTS
from bench.runner import Runner
from bench.skip import Skip

Convert = Callable[[nn.Module, Case], Runner]


def _cast(dtype: torch.dtype) -> Convert:
    return lambda model, case: eager(model.to(dtype), case, dtype)


def _quantized(model: nn.Module, dtype: str, activations: str = "auto") -> nn.Module:
    from mono_quant import QuantizationConfig, dynamic_quantize  # noqa: PLC0415

    if activations == "auto":
        return dynamic_quantize(model, dtype)[0]
    if "activations" not in {field.name for field in fields(QuantizationConfig)}:
        raise Skip("this mono_quant has no activation schemes")
    options: dict[str, Any] = {"activations": activations}
    return dynamic_quantize(model, dtype, **options)[0]


def _ours(dtype: str, activations: str = "auto") -> Convert:
    def convert(model: nn.Module, case: Case) -> Runner:
        from mono_quant import kernels  # noqa: PLC0415

        runner = eager(_quantized(model, dtype, activations), case)
        if dtype != "int8":
            return runner
        return runner.saying(f"{kernels.describe()}, {kernels.activation_scheme(activations)}")

    return convert


def _compiled(prepare: Callable[[nn.Module], nn.Module]) -> Convert:
    """Let torch.compile fuse what surrounds the products."""

    def convert(model: nn.Module, case: Case) -> Runner:
        if case.decode:
            raise Skip("torch.compile starts anew as the KV cache grows")
        model = prepare(model)
        model.compile()
        return eager(model, case)

    return convert


def _needs(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    if not any(isinstance(module, kinds) for module in model.modules()):
        names = " and ".join(kind.__name__ for kind in kinds)
        raise Skip(f"it quantizes {names} only, and this model has none")


def _torch_ao(model: nn.Module, case: Case) -> Runner:
    from torch.ao.quantization import quantize_dynamic  # noqa: PLC0415

    _needs(model, (nn.Linear,))
    return eager(quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8), case)


def _torchao(config: str) -> Convert:
    def convert(model: nn.Module, case: Case) -> Runner:
        quantization = importlib.import_module("torchao.quantization")
        _needs(model, (nn.Linear,))
        quantization.quantize_(model, getattr(quantization, config)())
        return eager(model, case)

    return convert


def _quanto(model: nn.Module, case: Case) -> Runner:
    library = importlib.import_module("optimum.quanto")
    _needs(model, (nn.Linear, nn.Conv2d))
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return eager(model, case)


def _bitsandbytes(model: nn.Module, case: Case) -> Runner:
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    library = importlib.import_module("bitsandbytes", ("bitsandbytes",))
    _needs(model, (nn.Linear, Conv1D))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.data.t().contiguous() if isinstance(module, Conv1D) else module.weight.data
            rows, depth = weight.shape
            layer = library.nn.Linear8bitLt(depth, rows, module.bias is not None, has_fp16_weights=False)
            layer.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            layer.bias = module.bias
            # the codes are made by a move, even to where the weights are
            model.set_submodule(name, layer.to("cpu"))
    return eager(model.eval(), case)


def _sdnq(model: nn.Module, case: Case) -> Runner:
    """Multiply in int8 as its README does after loading; on a CPU the products are OpenVINO's, the rest torch.compile's."""
    library = importlib.import_module("sdnq")
    _needs(model, (nn.Linear, nn.Conv2d))
    conv = {"quant_conv": True, "use_quantized_matmul_conv": True} if case.images else {}
    with torch.no_grad():
        model = library.sdnq_post_load_quant(
            model, weights_dtype="int8", use_quantized_matmul=True, add_skip_keys=False, **conv
        )
    common = importlib.import_module("sdnq.common")
    by = "OpenVINO" if importlib.import_module("sdnq.kernel_wrappers").use_openvino_mm else "torch"
    return eager(model, case).saying(
        f"products by {by}, {'compiled' if common.use_torch_compile else 'eager'}"
    )


@dataclass(frozen=True)
class Graph:
    """A runtime that opens a file, so that what made the file is not in its memory.

    Attributes:
        files: the folder of its files; stacks of one name share them.
        write: from the float model to files in a folder.
        open: from them to something that runs.
        open_nothing: loads the runtime, without a model.
    """

    files: str
    write: Callable[[nn.Module, Case, Inputs, Path], None]
    open: Callable[[Path, Case, Inputs], Runner]
    open_nothing: Callable[[], None]


@dataclass(frozen=True)
class Stack:
    """One competitor.

    Attributes:
        way: from the float model to something that runs, in one process or in two.
        package: the distribution whose version is reported; torch itself when empty.
        imports: what to load before memory is measured.
    """

    way: Convert | Graph
    package: str = ""
    imports: tuple[str, ...] = ()


SCHEMES = ("int8", "int8-g128", "int8-g64", "int12")
_MONO = ("mono_quant",)
_IN_ONNXRUNTIME = Graph(
    "onnxruntime", in_onnxruntime.write, in_onnxruntime.open_, in_onnxruntime.open_nothing
)
_IN_OPENVINO = Graph("openvino", in_openvino.write, in_openvino.open_, in_openvino.open_nothing)
# Faster and less accurate than its own choice on some processors (groups of 32 on a Zen 4).
_WIDE_GROUPS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
_IN_OPENVINO_WIDE = replace(_IN_OPENVINO, open=partial(in_openvino.open_, **_WIDE_GROUPS))
_SAVED = Graph("mono_quant", in_mono_quant.write, in_mono_quant.open_, in_mono_quant.open_nothing)
_TRANSFORMERS = ("transformers", *_MONO)
STACKS = {
    "fp32": Stack(_cast(torch.float32)),
    "bf16": Stack(_cast(torch.bfloat16)),
    "fp16": Stack(_cast(torch.float16)),
    "fp32-compiled": Stack(_compiled(lambda model: model)),
    "ours": Stack(_ours("int8"), imports=_MONO),
    "ours-compiled": Stack(_compiled(lambda model: _quantized(model, "int8")), imports=_MONO),
    "ours-fused": Stack(_SAVED, imports=_TRANSFORMERS),
    **{f"ours-{name}": Stack(_ours("int8", name), imports=_MONO) for name in SCHEMES},
    **{
        f"ours-fused-{name}": Stack(
            replace(_SAVED, open=partial(in_mono_quant.open_, activations=name)), imports=_TRANSFORMERS
        )
        for name in SCHEMES
    },
    "ours-fp16": Stack(_ours("fp16"), imports=_MONO),
    "torch.ao": Stack(_torch_ao),
    "torchao-dynamic": Stack(
        _torchao("Int8DynamicActivationInt8WeightConfig"), "torchao", ("torchao.quantization",)
    ),
    "torchao-weight": Stack(_torchao("Int8WeightOnlyConfig"), "torchao", ("torchao.quantization",)),
    "quanto": Stack(_quanto, "optimum-quanto", ("optimum.quanto",)),
    "bitsandbytes": Stack(_bitsandbytes, "bitsandbytes", ("bitsandbytes",)),
    "sdnq": Stack(_sdnq, "sdnq", ("sdnq",)),
    "onnxruntime": Stack(_IN_ONNXRUNTIME, "onnxruntime", ONNX_IMPORTS),
    "openvino": Stack(_IN_OPENVINO, "openvino", ("openvino",)),
    "openvino-g128": Stack(_IN_OPENVINO_WIDE, "openvino", ("openvino",)),
}


def version(stack: str) -> str:
    """Return the version of a stack's package, or why there is none."""
    package = STACKS[stack].package
    try:
        return importlib.metadata.version(package) if package else torch.__version__
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
