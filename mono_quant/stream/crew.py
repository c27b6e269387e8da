"""Who does which shard: one process, or the ranks of torchrun, accelerate launch or a scheduler, each of which has the same list.

With a store, a rank that is done takes the next shard (`TCPStore.add`, no collective: none waits for another). Without one, each
begins with every world-th shard. Either way a shard that nobody finished is left for whoever looks last; see `work`.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed

from mono_quant.errors import ConfigError, OutputError
from mono_quant.io.text import printable
from mono_quant.stream.spec import ShardPlan

STORE_SECONDS = 60
_PAUSE = 0.05
# How many classes of size there are: shards of about one size stay in the order of their sources.
_CLASSES = 4


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return its value."""
        ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a key that is not there yet; return what it holds."""
        ...


@dataclass(frozen=True)
class Crew:
    """The workers of one command, as one of them sees them.

    Attributes:
        rank: of this worker.
        world: number of workers.
        run: what all of them share, and no other run.
        store: of the process group; None where none is reachable.
        prefix: of keys in the store.
    """

    rank: int = 0
    world: int = 1
    run: str = ""
    store: Store | None = None
    prefix: str = ""

    @property
    def foresees(self) -> bool:
        """Whether a worker knows beforehand which shards it will do."""
        return self.store is None

    def turns(self, shards: Sequence[ShardPlan], name: str) -> Iterator[ShardPlan]:
        """Yield the shards that are this worker's to do, one whenever it asks.

        Args:
            shards: all of them; workers with equal lists share them.
            name: of the work; two with equal plans have different ones.
        """
        if self.world == 1:
            yield from shards
            return
        ordered = largest_first(shards)
        if self.store is None:
            yield from ordered[self.rank :: self.world]
            return
        key = f"{self.prefix}/{name}/{_digest(ordered)}"
        while (turn := _add(self.store, key) - 1) < len(ordered):
            yield ordered[turn]

    def arrive(self, name: str) -> None:
        """Say that this worker looked at the target and is about to work; who plans anew says so again, and counts once."""
        key = f"{self.prefix}/{name}/arrived"
        if self.store is not None and _add(self.store, f"{key}/{self.rank}") == 1:
            _add(self.store, key)

    def wait_for_arrivals(self, name: str, seconds: float) -> bool:
        """Wait until all workers arrived: one that comes after the publication would find a finished target.

        Args:
            name: of the work.
            seconds: to wait at the most.

        Returns:
            Whether all are there; True where nobody can tell.
        """
        if self.store is None:
            return True
        end = time.monotonic() + seconds
        while _add(self.store, f"{self.prefix}/{name}/arrived", 0) < self.world:
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE)
        return True


def meet(environment: Mapping[str, str] = os.environ) -> Crew:
    """Find the crew that this process was started as a part of.

    Args:
        environment: with `RANK` and `WORLD_SIZE` as torchrun sets them, and the address of its store; or with
            `SLURM_ARRAY_TASK_ID` and `SLURM_ARRAY_TASK_COUNT`.

    Returns:
        It; one worker alone where the environment names no other.

    Raises:
        ConfigError: a value is no number, or no rank of that world.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    elif "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", 1))
        rank = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // step
        world = _number(environment, "SLURM_ARRAY_TASK_COUNT")
    else:
        return Crew()
    if not 0 <= rank < world:
        raise ConfigError(
            f"this process is number {rank} of {world} in its environment; number them from 0, or unset RANK"
        )
    if world == 1:
        return Crew()
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        return Crew(rank, world, _job(environment))
    store = _store(environment, rank, world)
    run = store.compare_set("mono_quant/run", "", secrets.token_hex(8)).decode()
    # a store outlives the workers that torchrun starts again, and the turns of those that died are gone
    prefix = f"mono_quant/{run}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Crew(rank, world, run, store, prefix)


def largest_first(shards: Sequence[ShardPlan]) -> list[ShardPlan]:
    """Return shards in the order in which many workers take them: the small ones last, so that all end at about one time."""
    top = max((shard.size for shard in shards), default=0) or 1
    return sorted(shards, key=lambda shard: -(_CLASSES * shard.size // top))


def _store(environment: Mapping[str, str], rank: int, world: int) -> Store:
    """Return the store of the process group, as `torch.distributed.rendezvous("env://")` finds it."""
    address, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")
    serves = environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
    try:
        return torch.distributed.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            world,
            is_master=serves,
            timeout=timedelta(seconds=STORE_SECONDS),
            wait_for_workers=False,
            multi_tenant=serves,
        )
    except RuntimeError as error:
        raise OutputError(
            f"the store of the process group does not answer at {printable(address)}:{port} ({printable(error)}); "
            "check MASTER_ADDR and MASTER_PORT, or unset them to share the shards without a store"
        ) from error


def _add(store: Store, key: str, amount: int = 1) -> int:
    try:
        return store.add(key, amount)
    except RuntimeError as error:
        raise OutputError(
            f"the store of the process group is gone ({printable(error)}), so its first worker is; "
            "run the same command again"
        ) from error


def _job(environment: Mapping[str, str]) -> str:
    """Name what the tasks of a job share; tasks of a scheduler that says nothing count as one run."""
    for key in ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if environment.get(key):
            return f"{key}={environment[key]}"
    return "static"


def _number(environment: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environment.get(key)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError as error:
        raise ConfigError(f"{key} is {printable(text)} in the environment; it must be a number") from error


def _digest(shards: Sequence[ShardPlan]) -> str:
    return hashlib.sha256("".join(shard.digest() for shard in shards).encode()).hexdigest()[:16]
