# /// script
# requires-python = ">=3.11"
# dependencies = []  # they come with the wheel; `mono-quant` on PyPI is another project
#
# [tool.hf-jobs]
# flavor = "cpu-upgrade"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
# ///
"""Convert a repository into a repository on Hugging Face Jobs: nothing passes through the machine that asks for it.

    pip wheel --no-deps -w dist .
    hf jobs uv run --attempts 3 -v ./dist:/dist --with "/$(echo dist/*.whl)" scripts/on_jobs.py ORG/MODEL ME/MODEL-int8

A few files are on the disk of the job at a time; finished ones gather on a branch of the target. An attempt that follows one that
was cut off, on whatever machine, goes on from there, and one commit publishes all.
"""

import sys

import mono_quant


def main() -> None:
    """Convert and publish; the token is the secret `HF_TOKEN`."""
    source, target, *dtype = sys.argv[1:]
    done = mono_quant.quantize_checkpoint(source, *dtype, push_to=target, origin="hub")
    print(done.report.table() if done.report else "", done.pushed, sep="\n")


if __name__ == "__main__":
    main()
