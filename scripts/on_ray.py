"""Share a conversion among the workers of a Ray cluster; the result is one folder, or one repository.

    pip install ray    # where mono_quant is, on every machine; then, on one of them:
    python scripts/on_ray.py SOURCE --output /shared/out [--push-to ORG/NAME] [--dtype fp16] [--workers 8] [--cpus 1]

Workers take shards from a store that this process serves, so any of them may die: the others do its work. They share the folder in
which `--output` (or, of a push alone, this process) lies, so it must be on a file system that all of their machines see.
"""

import argparse
import os
from pathlib import Path

import ray
from ray.exceptions import RayError
from torch.distributed import TCPStore

import mono_quant


@ray.remote(max_retries=0, scheduling_strategy="SPREAD")
def work(place: Path, environment: dict[str, str], source: str, options: dict[str, str]) -> object:
    """Be one worker: `quantize_checkpoint` finds the others by what torchrun would have set."""
    os.chdir(place)
    os.environ.update(environment)
    return mono_quant.quantize_checkpoint(source, **options).folder


def main() -> None:
    """Start the workers, and wait for all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--output")
    parser.add_argument("--push-to")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--max-shard-size", default="5GB", help="there is one worker at most for every shard")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="of each worker")
    asked = parser.parse_args()
    options = {"dtype": asked.dtype, "output": asked.output, "push_to": asked.push_to}
    options["max_shard_size"] = asked.max_shard_size

    ray.init()
    address = ray.util.get_node_ip_address()
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    crew = {
        "WORLD_SIZE": f"{asked.workers}",
        "MASTER_ADDR": address,
        "MASTER_PORT": f"{store.port}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no worker serves it
    }
    tasks = [
        work.options(num_cpus=asked.cpus).remote(
            Path.cwd(), crew | {"RANK": f"{rank}"}, asked.source, options
        )
        for rank in range(asked.workers)
    ]
    failed = 0
    for rank, task in enumerate(tasks):
        try:
            print(f"worker {rank}: {ray.get(task) or 'has nothing left to do'}", flush=True)
        except RayError as error:
            failed += 1
            print(f"worker {rank} failed: {error}", flush=True)
    if failed == len(tasks):
        raise SystemExit("no worker is left; the same command goes on from what is finished")


if __name__ == "__main__":
    main()
