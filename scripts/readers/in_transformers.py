"""Run folders in the transformers of another environment; imports nothing of this project. See `in_vllm`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers


def run(job: dict[str, Any]) -> torch.Tensor:
    """Return log-probabilities [tokens, vocabulary] or hidden states [tokens, size]."""
    folder = Path(job["folder"])
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    kinds = {"dtype": getattr(torch, job["dtype"])}
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kinds)
    lost = [*info["missing_keys"], *info["mismatched_keys"]]
    if lost:
        raise ValueError(f"not in the file: {lost[:5]}")
    with torch.inference_mode():
        out = model.eval()(input_ids=torch.tensor([job["tokens"]]))
    if job["read"] == "hidden":
        return out.last_hidden_state[0].float()
    return out.logits[0, :-1].float().log_softmax(-1)


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            torch.save(run(job), job["result"])
            print(f"done {job['name']}", flush=True)
        except Exception as e:  # noqa: BLE001 - whatever a library raises is what we want to know
            print(f"failed {job['name']}: {' '.join(str(e).split())[:400]}", flush=True)


if __name__ == "__main__":
    main()
