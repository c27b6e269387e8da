"""Converts one checkpoint into another as llm-compressor does without a model; the protocol is that of `converting`.

Run in an environment of llm-compressor's own, whose transformers is older than ours: python with_llmcompressor.py SOURCE TARGET THREADS
"""

import sys
import time

import torch
from llmcompressor import model_free_ptq
from loguru import logger


def main(source: str, target: str, threads: int) -> None:
    """Make int8 weights with a scale for each channel, for activations that are quantized per token, when told to."""
    logger.remove()
    torch.set_num_threads(threads)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    model_free_ptq(
        source,
        target,
        scheme="W8A8",
        ignore=["lm_head", "re:.*embed_tokens"],
        device="cpu",
        max_workers=threads,
    )
    print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
