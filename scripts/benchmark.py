"""Measure the kernels, the conversion loops and whole models against their peers.

    pip install -c scripts/constraints.txt '.[bench]'

    python scripts/benchmark.py kernels --json kernels.json --png kernels.png
    python scripts/benchmark.py convert --cpu avx2
    python scripts/benchmark.py models --models minilm --batches 1 --stacks ours onnxruntime
    python scripts/benchmark.py sentences
    python scripts/benchmark.py loading --gigabytes 2.2
    python scripts/benchmark.py stream --gigabytes 2 8 --wide --llmcompressor env/bin/python
    python scripts/benchmark.py gpu --layers 32

Competitors of one row run in turn, round after round, so that a disturbance hits all of them; the numbers are medians
(`--best` takes minima, for a machine that is shared). `models` gives every stack a process of its own, or with `--rounds` several
of which the fastest counts. `gpu` is what scripts/check_gpu runs after the tests, each section in a process of its own; `--dry`
walks through it on a CPU. `--cpu avx2` keeps the libraries from using AVX-512, so that a newer machine can stand in for an AVX2
one.
"""

import argparse
import json
import os
import warnings
from pathlib import Path

import torch
from bench import plots
from bench.cases import CASES
from bench.conversion import run_convert
from bench.gpu.sections import SECTIONS, Plan, run_gpu
from bench.in_openvino import PEERS
from bench.limits import processor
from bench.loading import WAYS, run_loading
from bench.products import SHAPES, TOKENS, run_kernels
from bench.race import BACKENDS
from bench.restriction import NOTE, restrict, restricted
from bench.sentences import COUNT, run_sentences
from bench.stacks import STACKS
from bench.streaming import CACHES, run_stream
from bench.streaming import WAYS as STREAM_WAYS
from bench.whole import run_models, run_worker

from mono_quant import kernels


def shape(text: str) -> tuple[int, int]:
    rows, depth = text.split("x")
    return int(rows), int(depth)


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; give 1 or more")
    return number


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seconds", type=float, default=0.3, help="time for each competitor of a row")
    common.add_argument("--threads", type=int, default=torch.get_num_threads())
    common.add_argument(
        "--best", action="store_true", help="minima in place of medians, for a shared machine"
    )
    common.add_argument("--cpu", choices=["avx2"], help="keep every library that can be kept to AVX2")
    common.add_argument(
        "--peers", help="the Python of an environment with sentence-transformers[openvino] and optimum-intel"
    )
    common.add_argument("--json", type=Path, help="write the result here")
    common.add_argument("--png", type=Path, help="draw the result here (needs matplotlib)")
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True)
    command = commands.add_parser("kernels", parents=[common])
    command.set_defaults(run=run_kernels, plot=plots.plot_kernels)
    path = kernels.environment()["path"]
    command.add_argument(
        "--path", default=path, help="kernel path; the one that mono_quant chose when not given"
    )
    command.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, help="N x K, such as 384x1536")
    command.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    command = commands.add_parser("convert", parents=[common])
    command.set_defaults(run=run_convert, plot=plots.plot_convert)
    command = commands.add_parser("models", parents=[common])
    command.set_defaults(run=run_models, plot=plots.plot_models)
    command.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    command.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS), help="fp32 always runs")
    command.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    command.add_argument(
        "--rounds", type=count, default=1, help="processes for each stack; the fastest counts"
    )
    command.add_argument("--fp32-once", action="store_true", help="fp32 in the first round alone")
    command.add_argument(
        "--keep", type=Path, help="folder for the graphs that are written, which a later run takes from there"
    )
    command.add_argument("--timeout", type=int, default=900, help="seconds for one stack on one model")
    command = commands.add_parser("sentences", parents=[common])
    command.set_defaults(run=run_sentences, plot=plots.plot_sentences)
    command.add_argument("--count", type=count, default=COUNT)
    command.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    command.add_argument("--rounds", type=count, default=3)
    command.add_argument(
        "--onnx-python", help="the Python of an environment with sentence-transformers[onnx], as --peers"
    )
    command = commands.add_parser("loading", parents=[common])
    command.set_defaults(run=run_loading, plot=plots.plot_loading)
    command.add_argument("--gigabytes", type=float, default=2.2, help="of the float checkpoint")
    command.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    command.add_argument("--rounds", type=count, default=3)
    command.add_argument(
        "--scratch", type=Path, help="folder for the checkpoints; the system's when not given"
    )
    command = commands.add_parser("stream", parents=[common])
    command.set_defaults(run=run_stream, plot=plots.plot_stream)
    command.add_argument("--gigabytes", type=float, nargs="*", default=[8], help="of the float checkpoints")
    command.add_argument("--wide", action="store_true", help="and one with very large tensors")
    command.add_argument("--ways", nargs="+", choices=STREAM_WAYS, default=list(STREAM_WAYS))
    command.add_argument(
        "--once", nargs="+", choices=STREAM_WAYS, default=[], help="in the first round alone"
    )
    command.add_argument("--cache", nargs="+", choices=CACHES, default=list(CACHES))
    command.add_argument("--rounds", type=count, default=3)
    command.add_argument(
        "--llmcompressor", help="the Python of an environment with llm-compressor, as --peers"
    )
    command.add_argument(
        "--scratch", type=Path, help="folder for what is written; the system's when not given"
    )
    command.add_argument(
        "--keep",
        type=Path,
        help="folder for the checkpoints, on the same disk, which a later run takes from there",
    )
    command = commands.add_parser("gpu", parents=[common])
    command.set_defaults(run=run_gpu, plot=plots.plot_gpu)
    command.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    command.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    command.add_argument(
        "--layers", type=count, default=Plan.layers, help="of the Llama-3-8B shape, which has 32"
    )
    command.add_argument("--limit", type=float, default=600, help="seconds for everything")
    command.add_argument(
        "--dry",
        nargs="?",
        const="triton",
        default="",
        metavar="PATH",
        help="on a CPU, on this path of its kernels",
    )
    command = commands.add_parser("worker", parents=[common])
    command.set_defaults(run=run_worker)
    for name in ("--model", "--stack"):
        command.add_argument(name, required=True)
    command.add_argument("--folder", type=Path, required=True, help="inputs, the fp32 output, graphs")
    command.add_argument("--write", action="store_true", help="only write the graph's files")
    command.add_argument("--batch", type=int, required=True)
    return top


def main() -> None:
    warnings.simplefilter("ignore")
    options = parser().parse_args()
    restrict(options.cpu)
    torch.set_num_threads(options.threads)
    if options.peers is not None:
        # for the workers too
        os.environ[PEERS] = options.peers
    if options.run is run_worker:
        print(json.dumps(options.run(options)))
        return
    facts = {
        "environment": kernels.environment(),
        "processor": processor(),
        "restricted": restricted(),
        "statistic": "min" if options.best else "median",
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    print(
        f"{facts['processor']}, {options.threads} threads, torch {facts['torch']} on {facts['torch_cpu_capability']}, "
        f"mono_quant on {facts['environment']['path']}; {facts['statistic']}s"
    )
    if facts["restricted"]:
        print(NOTE)
    result = {**options.run(options), **facts}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if options.png is not None:
        options.plot(result, options.png)


if __name__ == "__main__":
    main()
