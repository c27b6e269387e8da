"""What it takes to convert a checkpoint and to load the result: memory that cannot be given back, and time."""

import argparse
import gc
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import mono_quant
from bench.timing import Row

HEADER = """\
A bfloat16 Llama with random weights; every way in processes of its own, in turn, the file in the page cache.
Each has done the same with a tiny model before, so that nothing is imported while it is measured.
anonymous MiB: the peak of RssAnon over what the process held before, so without pages of files, which the system can take back.
of the model: the same over the bytes of the parameters that the model then has. s: median of the rounds."""
LAYER = 44_044_288
Way = Callable[[Path], Any]


def _float(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder / "float")


def _on_load(folder: Path, dtype: str = "int8") -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=mono_quant.MonoQuantConfig(dtype)
    )


def _bitsandbytes(folder: Path) -> Any:
    config = hf.BitsAndBytesConfig(load_in_8bit=True)
    return hf.AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=config, device_map="cpu"
    )


def _torchao(folder: Path) -> Any:
    scheme = importlib.import_module("torchao.quantization").Int8DynamicActivationInt8WeightConfig()
    config = hf.TorchAoConfig(scheme)
    return hf.AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)


def _enabled(folder: Path) -> Any:
    with mono_quant.enable():
        return _touched(hf.AutoModelForCausalLM.from_pretrained(folder / "int8"))


def _touched(held: Any) -> Any:
    """Read every byte once, so that a mapped file counts as loaded."""
    tensors = held.values() if isinstance(held, dict) else held.parameters()
    for tensor in tensors:
        tensor.detach().reshape(-1).view(torch.uint8).max()
    return held


WAYS: dict[str, Way] = {
    "float": lambda folder: _touched(_float(folder)),
    "on load, int8": _on_load,
    "on load, fp16": lambda folder: _on_load(folder, "fp16"),
    "quantize(folder)": lambda folder: mono_quant.quantize(folder / "float", fidelity=False).model,
    "quantize(folder), measured": lambda folder: mono_quant.quantize(folder / "float", fidelity=True).model,
    "quantize(folder, fp16)": lambda folder: (
        mono_quant.quantize(folder / "float", "fp16", fidelity=False).model
    ),
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "safetensors, mapped": lambda folder: _touched(load_file(folder / "int8" / "model.safetensors")),
    "safetensors, in memory": lambda folder: {
        name: tensor.clone() for name, tensor in load_file(folder / "int8" / "model.safetensors").items()
    },
    "load": lambda folder: mono_quant.load(folder / "int8"),
    "load, not verified": lambda folder: mono_quant.load(folder / "int8", verify=False),
    "from_pretrained, enabled": _enabled,
}


def run_loading(options: argparse.Namespace) -> Row:
    """Measure every way, each in processes of its own."""
    print(HEADER)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        for place, gigabytes in ((folder, options.gigabytes), (folder / "tiny", 0)):
            _checkpoint(place / "float", gigabytes)
            result = mono_quant.quantize(place / "float", fidelity=False)
            result.save(place / "int8", max_shard_size="100GB")
        found: dict[str, list[Row]] = {way: [] for way in options.ways}
        for _ in range(options.rounds):
            for way in options.ways:
                found[way].append(_measured(way, folder, options))
        print(f"{'':<28} {'anonymous MiB':>13} {'of the model':>12} {'s':>6}")
        for way, runs in found.items():
            rows.append(_row(way, runs))
    return {"rows": rows, "gigabytes": options.gigabytes}


def _row(way: str, runs: list[Row]) -> Row:
    problem = next((run["skipped"] for run in runs if "skipped" in run), "")
    if problem:
        print(f"{way:<28} {problem}")
        return {"way": way, "skipped": problem}
    row = {
        "way": way,
        "anonymous": max(run["anonymous"] for run in runs),
        "share": max(run["share"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
    }
    print(f"{way:<28} {row['anonymous']:>13.0f} {row['share']:>12.2f} {row['seconds']:>6.2f}")
    return row


def _measured(way: str, folder: Path, options: argparse.Namespace) -> Row:
    code = f"from bench.loading import worker; worker({way!r}, {str(folder)!r}, {options.threads})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"skipped": done.stderr.strip().splitlines()[-1][:100] if done.stderr.strip() else "it failed"}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(way: str, folder: str, threads: int) -> None:
    """Load once in this process and print what it took."""
    torch.set_num_threads(threads)
    WAYS[way](Path(folder) / "tiny")
    gc.collect()
    before = _anonymous()
    with _peak() as peak:
        start = time.perf_counter()
        held = WAYS[way](Path(folder))
        seconds = time.perf_counter() - start
    tensors = held.values() if isinstance(held, dict) else {id(p): p for p in held.parameters()}.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
    taken = peak[0] - before
    print(json.dumps({"anonymous": taken, "share": taken / size, "seconds": seconds}))


def _anonymous() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


@contextmanager
def _peak() -> Iterator[list[float]]:
    """Yield the largest RssAnon seen in the block, in MiB, looked at every 5 ms."""
    found, ended = [_anonymous()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            found[0] = max(found[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        found[0] = max(found[0], _anonymous())


def _checkpoint(folder: Path, gigabytes: float) -> None:
    """Write a bfloat16 Llama of about this size."""
    wide = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "vocab_size": 32000}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / LAYER))
    sizes = wide if gigabytes else small
    config = hf.LlamaConfig(**sizes, num_hidden_layers=layers, num_key_value_heads=4, dtype="bfloat16")
    with torch.device("meta"):
        bare = hf.LlamaForCausalLM(config)
    torch.manual_seed(0)
    tensors = {
        name: (torch.randn(p.shape) * 0.02 if p.dim() > 1 else torch.ones(p.shape)).bfloat16()
        for name, p in bare.named_parameters()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
