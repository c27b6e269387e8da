"""Make int8 checkpoints with llm-compressor's `model_free_ptq`; runs in an environment of its own. See `in_vllm`.

Each job names the folder of a float model and the folder for the int8 one.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from llmcompressor import model_free_ptq

# what its own examples leave in float
IGNORE = ["lm_head", "re:.*embed_tokens$", r"re:.*(mlp|block_sparse_moe)\.gate$"]


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            model_free_ptq(job["folder"], job["result"], scheme="W8A8", ignore=IGNORE, device="cpu")
            print(f"done {job['name']}", flush=True)
        except Exception as e:  # noqa: BLE001 - whatever a library raises is what we want to know
            print(f"failed {job['name']}: {' '.join(str(e).split())[:400]}", flush=True)


if __name__ == "__main__":
    main()
