"""The competitors that run inside PyTorch, each a function from a float model to something that runs."""

import importlib
import importlib.metadata
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from bench import graphs
from bench.cases import PROMPT, Case, Inputs
from bench.skip import Skip

Run = Callable[[Inputs], torch.Tensor]
Convert = Callable[[nn.Module, Case, Inputs], graphs.Runner]
# What is entered here lasts as long as the process.
_for_good = ExitStack()


def eager(model: nn.Module, case: Case, dtype: torch.dtype = torch.float32) -> graphs.Runner:
    """Run a torch model: one pass, or token by token behind a prompt that is read once."""

    def forward(inputs: Inputs) -> torch.Tensor:
        cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        return model(**cast)[0].float()  # type: ignore[no-any-return]

    if not case.decode:
        return graphs.Runner(forward)
    from transformers import DynamicCache  # noqa: PLC0415

    cache = DynamicCache()

    def decode(inputs: Inputs) -> torch.Tensor:
        ids = inputs["input_ids"]
        known = cache.get_seq_length()
        if known == 0:
            model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        elif known > PROMPT:
            cache.crop(PROMPT - known)
        steps = [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)[0]
            for i in range(PROMPT, ids.shape[1])
        ]
        return torch.cat(steps, 1).float()

    return graphs.Runner(decode)


def _cast(dtype: torch.dtype) -> Convert:
    return lambda model, case, _: eager(model.to(dtype), case, dtype)


def _quantized(model: nn.Module, dtype: str) -> nn.Module:
    from mono_quant import dynamic_quantize  # noqa: PLC0415

    return dynamic_quantize(model, dtype)[0]


def _ours(dtype: str) -> Convert:
    def convert(model: nn.Module, case: Case, _: Inputs) -> graphs.Runner:
        from mono_quant import kernels  # noqa: PLC0415

        runner = eager(_quantized(model, dtype), case)
        return runner.saying(kernels.describe()) if dtype == "int8" else runner

    return convert


def _compiled(prepare: Callable[[nn.Module], nn.Module]) -> Convert:
    """Let torch.compile fuse what surrounds the products."""

    def convert(model: nn.Module, case: Case, inputs: Inputs) -> graphs.Runner:
        if case.decode:
            raise Skip("torch.compile starts anew as the KV cache grows")
        model = prepare(model)
        model.compile()
        runner = eager(model, case)
        with torch.inference_mode():
            runner.call(inputs)
        return runner

    return convert


def _ours_at(bits: int) -> Convert:
    """Run int8 at a width of the activation codes, where it is not the one of `ours`."""

    def convert(model: nn.Module, case: Case, inputs: Inputs) -> graphs.Runner:
        from mono_quant import kernels  # noqa: PLC0415

        scheme = f"int{bits}"
        if kernels.activation_scheme() == scheme:
            raise Skip(f"`ours` has {bits}-bit activations on this kernel path")
        _for_good.enter_context(kernels.using(activations=scheme))
        return _ours("int8")(model, case, inputs)

    return convert


def _needs(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    if not any(isinstance(module, kinds) for module in model.modules()):
        names = " and ".join(kind.__name__ for kind in kinds)
        raise Skip(f"it quantizes {names} only, and this model has none")


def _torch_ao(model: nn.Module, case: Case, _: Inputs) -> graphs.Runner:
    from torch.ao.quantization import quantize_dynamic  # noqa: PLC0415

    _needs(model, (nn.Linear,))
    return eager(quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8), case)


def _torchao(config: str) -> Convert:
    def convert(model: nn.Module, case: Case, _: Inputs) -> graphs.Runner:
        quantization = importlib.import_module("torchao.quantization")
        _needs(model, (nn.Linear,))
        quantization.quantize_(model, getattr(quantization, config)())
        return eager(model, case)

    return convert


def _quanto(model: nn.Module, case: Case, _: Inputs) -> graphs.Runner:
    library = importlib.import_module("optimum.quanto")
    _needs(model, (nn.Linear, nn.Conv2d))
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return eager(model, case)


def _bitsandbytes(model: nn.Module, case: Case, _: Inputs) -> graphs.Runner:
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


@dataclass(frozen=True)
class Stack:
    """One competitor.

    Attributes:
        convert: from the float model to something that runs.
        package: the distribution whose version is reported; torch itself when empty.
        imports: what to load before memory is measured.
    """

    convert: Convert
    package: str = ""
    imports: tuple[str, ...] = ()


STACKS = {
    "fp32": Stack(_cast(torch.float32)),
    "bf16": Stack(_cast(torch.bfloat16)),
    "fp16": Stack(_cast(torch.float16)),
    "fp32-compiled": Stack(_compiled(lambda model: model)),
    "ours": Stack(_ours("int8"), imports=("mono_quant",)),
    "ours-compiled": Stack(_compiled(lambda model: _quantized(model, "int8")), imports=("mono_quant",)),
    "ours-8bit": Stack(_ours_at(8), imports=("mono_quant",)),
    "ours-12bit": Stack(_ours_at(12), imports=("mono_quant",)),
    "ours-fp16": Stack(_ours("fp16"), imports=("mono_quant",)),
    "torch.ao": Stack(_torch_ao),
    "torchao-dynamic": Stack(
        _torchao("Int8DynamicActivationInt8WeightConfig"), "torchao", ("torchao.quantization",)
    ),
    "torchao-weight": Stack(_torchao("Int8WeightOnlyConfig"), "torchao", ("torchao.quantization",)),
    "quanto": Stack(_quanto, "optimum-quanto", ("optimum.quanto",)),
    "bitsandbytes": Stack(_bitsandbytes, "bitsandbytes", ("bitsandbytes",)),
    "onnxruntime": Stack(graphs.onnxruntime, "onnxruntime", graphs.ONNX_IMPORTS),
    "openvino": Stack(graphs.openvino, "openvino", ("openvino", "nncf", *graphs.ONNX_IMPORTS)),
}


def version(stack: str) -> str:
    """Return the version of a stack's package, or why there is none."""
    package = STACKS[stack].package
    try:
        return importlib.metadata.version(package) if package else torch.__version__
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
