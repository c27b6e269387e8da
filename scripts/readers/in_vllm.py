"""Run folders in vLLM and write what came out; runs in an environment of its own and imports nothing of this project.

    PYTHON in_vllm.py JOBS.json

Each job names a folder, a dtype, the tokens, what to read ("logits" or "hidden") and the file for the result. One line is printed
for each: `done NAME` or `failed NAME: why`.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from vllm import LLM, SamplingParams
from vllm.config import PoolerConfig
from vllm.distributed import cleanup_dist_env_and_memory


def run(job: dict[str, Any]) -> torch.Tensor:
    """Return log-probabilities [tokens, vocabulary] or hidden states [tokens, size]."""
    tokens = job["tokens"]
    options = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 128, "max_logprobs": -1}
    pooling = job["read"] == "hidden"
    llm = LLM(
        model=job["folder"],
        dtype=job["dtype"],
        skip_tokenizer_init=not pooling,
        enforce_eager=True,
        disable_log_stats=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        **({"runner": "pooling", "pooler_config": PoolerConfig(task="token_embed")} if pooling else {}),
        limit_mm_per_prompt={},
        # by itself it asks this of float models alone
        model_loader_extra_config={"enable_weights_track": True},
        **options,
    )
    try:
        prompt = [{"prompt_token_ids": tokens}]
        if pooling:
            out = llm.encode(prompt, pooling_task="token_embed", use_tqdm=False)
            return out[0].outputs.data.float()
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, temperature=0, detokenize=False)
        rows = llm.generate(prompt, sampling, use_tqdm=False)[0].prompt_logprobs[1:]
        return torch.tensor([[row[i].logprob for i in range(len(row))] for row in rows])
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            torch.save(run(job), job["result"])
            print(f"done {job['name']}", flush=True)
        except Exception as e:  # noqa: BLE001 - whatever an engine raises is what we want to know
            print(f"failed {job['name']}: {' '.join(str(e).split())[:400]}", flush=True)


if __name__ == "__main__":
    main()
