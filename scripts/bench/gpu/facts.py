"""What the device is, what is installed, and how fast memory and matrix units are: what every other number is read against."""

import importlib.metadata
import platform

import torch
from torch.nn import functional as F

from bench.gpu.clock import Clock
from bench.gpu.journal import Journal
from bench.gpu.sizes import Sizes
from mono_quant import kernels

_PACKAGES = (
    "torch", "triton", "transformers", "huggingface_hub", "accelerate", "safetensors", "tokenizers", "bitsandbytes", "torchao"
)  # fmt: skip


def run_facts(journal: Journal, clock: Clock, sizes: Sizes) -> None:
    """Write them down."""
    device = clock.device
    journal.row("software", python=platform.python_version(), **{name: _version(name) for name in _PACKAGES})
    journal.row("path", int8=kernels.describe(device), activations=kernels.activation_scheme("auto", device))
    if not clock.real:
        journal.row("device", name="none: a walk through on a CPU")
        return
    about = torch.cuda.get_device_properties(device)
    journal.row(
        "device",
        name=about.name,
        capability=f"{about.major}.{about.minor}",
        multiprocessors=about.multi_processor_count,
        l2_mib=about.L2_cache_size / 2**20,
        memory_gib=about.total_memory / 2**30,
        cuda=torch.version.cuda,
    )
    _peaks(journal, clock)


def _peaks(journal: Journal, clock: Clock) -> None:
    source = torch.empty(1 << 30, dtype=torch.int8, device=clock.device).random_(-100, 100)
    target = torch.empty_like(source)
    seconds = clock.in_graph(lambda _: target.copy_(source), 4)
    journal.row("peak", what="copy, bytes read and written", gb_per_s=2e-9 * source.numel() / seconds)
    size = 8192
    x, w = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = clock.in_graph(lambda _: F.linear(x, w), 4, 5)
    journal.row("peak", what="bf16 product, 8192^3", tflops=2e-12 * size**3 / seconds)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
