"""A whole conversion from files to files, tiny: what it reads, what it must write, and a command that does it.

python stream_runs.py BASE streams BASE/source into BASE/out, as one of the crew that the environment names.
"""

import json
import logging
import os
import random
import struct
import sys
import time
from pathlib import Path

from mono_quant.io.disk import disk
from mono_quant.io.disk.output import check_target, new_folder
from mono_quant.io.tensors.checkpoint import WeightFile
from mono_quant.stream.crew import Crew, meet
from mono_quant.stream.spec import Constant, Found, Job, Piece, Place, Seen, ShardPlan, ShardRecord
from mono_quant.stream.supply import FolderSupply
from mono_quant.stream.work import convert_all
from mono_quant.stream.workspace import forget_published, open_workspace

FILES, ROWS = 4, 40
# Which files of the source a shard is made of: neighbours share one, and the last needs all but one.
SHARDS = ((0,), (0, 1), (1, 2), (3,), (3, 0, 2))
IDENTITY = {"source": {"path": "source", "sizes": [1, 2]}, "settings": {"dtype": "int8", "skip": []}}


def sources(count=FILES):
    """The content of each file."""
    return {f"part{i}.bin": random.Random(i).randbytes(ROWS + 8 * i) for i in range(count)}


def prepare(base, count=FILES):
    (base / "source").mkdir(parents=True)
    for name, data in sources(count).items():
        (base / "source" / name).write_bytes(data)


def shard_plan(index, count, uses, wide=frozenset()):
    """A shard that copies the first 32 bytes of every file it uses; a weight that is wide has a longer constant behind."""
    jobs, constants, at = [], [], 0
    for i in uses:
        name = f"{index}.{i}"
        place = Place(name, "uint8", (32,), at, 32)
        piece = Piece(name, f"part{i}.bin", 0, "uint8", (32,), 32)
        jobs.append(Job(name, 0, "copy", piece, value=place))
        at += 32
    data = bytes([index]) * (8 if any(job.weight in wide for job in jobs) else 4)
    constants.append(Constant(Place("c", "uint8", (len(data),), at, len(data)), data))
    at += len(data)
    places = [*(job.value for job in jobs), *(constant.place for constant in constants)]
    header = {
        p.name: {"dtype": "U8", "shape": p.shape, "data_offsets": [p.start, p.start + p.nbytes]}
        for p in places
    }
    text = json.dumps(header).encode()
    head = struct.pack("<Q", len(text)) + text
    return ShardPlan(
        f"model-{index + 1:05}-of-{count:05}.safetensors", len(head) + at, head, tuple(jobs), tuple(constants)
    )


NOTHING, ALONE = Found(), Crew()


def plan(found=NOTHING, shards=SHARDS):
    return [shard_plan(i, len(shards), uses, found.wide) for i, uses in enumerate(shards)]


def expected(found=NOTHING, shards=SHARDS):
    """What every file must hold, from the definition alone."""
    source = list(sources().values())
    files = {}
    for shard in plan(found, shards):
        body = b"".join(source[int(job.source.file[4:-4])][:32] for job in shard.jobs)
        files[shard.file] = shard.header + body + shard.constants[0].data
    return files


def convert(plan, supply, target, told=lambda count: None):
    """Write a shard: what `convert_shard` does, for copies alone."""
    chunks = [plan.header]
    for job in plan.jobs:
        with supply.fetch(job.source.file).path.open("rb") as file:
            file.seek(job.source.start)
            chunks.append(file.read(job.source.nbytes))
        told(job.source.nbytes)
    chunks += [constant.data for constant in plan.constants]
    facts = disk.write_new(target, chunks, plan.size)
    seen = tuple(Seen(job.weight, job.part, signal=1.5) for job in plan.jobs)
    return ShardRecord(plan.file, plan.digest(), facts["size"], facts["sha256"], seen)


def finding(names):
    """A converter that finds the scales of these weights too wide, until they are planned so."""

    def convert_or_find(plan, supply, target, told):
        found = frozenset(job.weight for job in plan.jobs if job.weight in names)
        if found and len(plan.constants[0].data) == 4:
            seen = tuple(Seen(job.weight, job.part, unfinite=2) for job in plan.jobs)
            return ShardRecord(plan.file, plan.digest(), 0, "", seen, Found(wide=found))
        return convert(plan, supply, target, told)

    return convert_or_find


def supply_of(base):
    return FolderSupply(WeightFile(path, ()) for path in sorted((base / "source").iterdir()))


def stream(
    base,
    identity=IDENTITY,
    *,
    crew=ALONE,
    restart=False,
    shards=SHARDS,
    convert=convert,
    supply=None,
    overwrite=False,
    **options,
):
    """The whole road, as `api/streaming` goes it; None where another worker ends it."""
    forget_published(base / "out")
    check_target(base / "out", overwrite=overwrite)
    with open_workspace(
        base / "out",
        identity,
        run=crew.run,
        rank=crew.rank,
        restart=restart,
        sources=[base / "source"],
        check=lambda: check_target(base / "out", overwrite=overwrite),
    ) as ledger:
        found, records = ledger.found, Found()
        while isinstance(records, Found):
            found |= records
            records = convert_all(
                plan(found, shards),
                supply or supply_of(base),
                ledger,
                crew,
                convert,
                planned=found,
                **options,
            )
        if records is None:
            return None
        with new_folder(base / "out", sources=[base / "source"], overwrite=overwrite) as folder:
            for file, record in records.items():
                facts = {"size": record.size, "sha256": record.sha256}
                folder.take(file, ledger.path(file), facts)
            folder.write_json("config.json", {"seen": [s for r in records.values() for s in r.seen]})
        return records


def main():
    base = Path(sys.argv[1])
    logging.basicConfig(level=logging.INFO)
    crew = meet()
    pause = float(os.environ.get("PAUSE", "0"))
    die = os.environ.get("DIE", "")

    def slowly(plan, supply, target, told):
        time.sleep(pause * (1 + crew.rank))
        (base / f"did.{crew.rank}").open("a").write(f"{plan.file}\n")
        if die == f"{crew.rank}":
            os.kill(os.getpid(), 9)
        return convert(plan, supply, target, told)

    shards = SHARDS * int(os.environ.get("TIMES", "1"))
    records = stream(base, crew=crew, convert=slowly, shards=shards)
    (base / f"end.{crew.rank}").write_text("left" if records is None else "published")


if __name__ == "__main__":
    main()
