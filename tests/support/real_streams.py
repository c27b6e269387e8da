"""A small checkpoint in several files, and a program that streams it: `real_streams.py SOURCE OUTPUT [JSON of options]`."""

import json
import sys
import warnings
from pathlib import Path

from models import FAMILIES
from safetensors.torch import load_file, save_file

import mono_quant

SHARD = 60_000
OPTIONS = {"max_shard_size": 40_000}


def prepare(folder: Path, *, wide: bool = False) -> Path:
    """Write the checkpoint.

    Args:
        folder: where there is nothing.
        wide: a row of the last file has a scale that float16 cannot hold.
    """
    model = FAMILIES["llama"].build()
    (model.half() if wide else model.bfloat16()).save_pretrained(folder, max_shard_size=SHARD)
    if wide:
        path = max(folder.glob("*.safetensors"))
        held = load_file(path)
        name = next(n for n in held if n.endswith("_proj.weight"))
        held[name][3] = 1e-5
        save_file(held, path, {"format": "pt"})
    return folder


def stream(source: Path, output: Path, **more: object) -> object:
    """Convert it; what is given wins over the options that it has else."""
    return mono_quant.quantize_checkpoint(source, output=output, **OPTIONS | {"fidelity": False} | more)


def main() -> None:
    warnings.simplefilter("ignore")
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    made = stream(source, output, **json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}"))
    sys.stdout.write("published\n" if made.report else "left\n")


if __name__ == "__main__":
    main()
