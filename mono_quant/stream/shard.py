"""One file of a result, made from files of a source in bounded memory."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import torch

from mono_quant.io.disk.disk import NewFile, new_file
from mono_quant.io.disk.reading import open_regular, read_from_front_to_back
from mono_quant.io.tensors.checkpoint import WeightFile, check_unchanged
from mono_quant.stream.bench import Bench, Tally, seen_by
from mono_quant.stream.blocks import BLOCK, Block, blocks_of, check_plan
from mono_quant.stream.spec import Found, Job, Seen, ShardPlan, ShardRecord
from mono_quant.stream.supply import Supply


def convert_shard(
    plan: ShardPlan,
    supply: Supply,
    target: Path,
    *,
    told: Callable[[int], None] = lambda count: None,
    threads: int | None = None,
    block: int = BLOCK,
) -> ShardRecord:
    """Write one file of a result; its bytes depend on the plan and the source alone.

    Several files may be made at once, in threads of one process.

    Args:
        plan: of the file.
        supply: of the files of the source; the caller releases them.
        target: where there is nothing yet. Where this fails, or something is found, there is nothing afterwards either.
        told: gets the number of bytes of the source that are done, again and again, from several threads.
        threads: as many as torch has when not given.
        block: values that a thread holds at once; a longer row is held whole.

    Returns:
        What was written and seen, or `found`.

    Raises:
        OutputError: the plan leaves a part of the file to nobody, or gives it to two.
        OutputWriteError: the file system refused.
        CorruptCheckpointError: a file of the source is not as it was, or was changed while it was read.
        LimitExceededError: a row is too long to be held.
    """
    check_plan(plan)
    with new_file(target, plan.size) as file, _Sources(supply) as sources:
        file.write_at(memoryview(plan.header), 0)
        for place, data in plan.constants:
            file.write_at(memoryview(data), place.start)
        run = _Run(plan, sources, file, told, block)
        run.work(threads or torch.get_num_threads())
        sources.check()
        seen, found = run.seen(), run.found()
        facts = {"size": 0, "sha256": ""} if found else file.seal()
    return ShardRecord(plan.file, plan.digest(), **facts, seen=seen, found=found)


class _Sources:
    """The files of a source that one shard needs, open until it is done."""

    def __init__(self, supply: Supply) -> None:
        self._supply = supply
        self._open: dict[str, tuple[int, WeightFile]] = {}
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def open(self, name: str) -> None:
        """Open a file, once it is here; one at a time."""
        if name not in self._open:
            file = self._supply.fetch(name)
            descriptor = open_regular(file.path)
            self._closing.callback(os.close, descriptor)
            check_unchanged(descriptor, file)
            read_from_front_to_back(descriptor)
            self._open[name] = descriptor, file

    def descriptor(self, name: str) -> int:
        """Return the descriptor of a file that was opened."""
        return self._open[name][0]

    def check(self) -> None:
        """Prove that no file was changed."""
        for descriptor, file in self._open.values():
            check_unchanged(descriptor, file)


class _Run:
    """The blocks of a shard, shared out among threads."""

    def __init__(
        self, plan: ShardPlan, sources: _Sources, file: NewFile, told: Callable[[int], None], block: int
    ) -> None:
        self._plan, self._sources, self._file, self._told = plan, sources, file, told
        self._blocks = enumerate(self._ready(blocks_of(plan, block)))
        self._lock, self._is_stopped = Lock(), False
        self._tallies: dict[int, tuple[int, Tally]] = {}

    def work(self, threads: int) -> None:
        """Work through all blocks."""
        if threads == 1:
            return self._loop()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for loop in [pool.submit(self._loop) for _ in range(threads)]:
                    loop.result()
            finally:
                self._is_stopped = True

    def seen(self) -> tuple[Seen, ...]:
        """Return what each job saw."""
        found: Mapping[int, list[Tally]] = {number: [] for number in range(len(self._plan.jobs))}
        # in the order of the blocks, whichever was done first
        for _, (job, tally) in sorted(self._tallies.items()):
            found[job].append(tally)
        return tuple(seen_by(self._plan.jobs[number], tallies) for number, tallies in found.items())

    def found(self) -> Found:
        """Return what the plan did not know."""
        jobs = [(self._plan.jobs[number], tally) for number, tally in self._tallies.values()]
        return Found(
            frozenset(job.scale.name for job, tally in jobs if tally.is_wide and job.scale is not None),
            frozenset(job.weight for job, tally in jobs if tally.unfinite and _is_lost(job)),
            frozenset(job.weight for job, tally in jobs if tally.overflowed),
        )

    def _ready(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Yield blocks whose sources are open."""
        for block in blocks:
            source = self._plan.jobs[block.job].source
            for piece in (source, source.inverse):
                if piece is not None:
                    self._sources.open(piece.file)
            yield block

    def _loop(self) -> None:
        bench = Bench(self._sources.descriptor, self._file.write_at)
        try:
            while not self._is_stopped:
                with self._lock:
                    number, block = next(self._blocks, (-1, None))
                if block is None:
                    return
                job = self._plan.jobs[block.job]
                self._tallies[number] = block.job, bench.work(job, block)
                self._told(_bytes_of(job, block))
        except BaseException:
            self._is_stopped = True
            raise


def _is_lost(job: Job) -> bool:
    """Tell whether what is not finite would be lost: a copy keeps it."""
    return (
        job.action == "int8"
        or bool(job.fits)
        or (job.action == "cast" and job.value is not None and job.value.dtype in ("float16", "bfloat16"))
    )


def _bytes_of(job: Job, block: Block) -> int:
    """Return how many bytes of the source a block is; those of all blocks are those of the tensor and of its scales."""
    whole = sum(piece.nbytes for piece in (job.source, job.source.inverse) if piece is not None)
    rows = max(1, block.grid.rows)
    return whole * (block.first + block.rows) // rows - whole * block.first // rows
