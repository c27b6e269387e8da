"""Blocks: see the room of this name."""

import pytest
import torch
from streams import Made, shard_of, source, supply

from mono_quant.errors import CorruptCheckpointError, OutputError
from mono_quant.stream.blocks import check_plan
from mono_quant.stream.shard import convert_shard
from mono_quant.stream.spec import Piece, ShardPlan


@pytest.fixture
def plan(tmp_path):
    made = [Made("w", torch.randn(6, 4), "int8"), Made("n", torch.randn(3))]
    return shard_of(tmp_path, made, {"t": torch.ones(2)})[0]


def changed(plan, number, **changes):
    jobs = list(plan.jobs)
    jobs[number] = jobs[number]._replace(**changes)
    return ShardPlan(plan.file, plan.size, plan.header, tuple(jobs), plan.constants)


def moved(place, by):
    return place._replace(start=place.start + by)


def test_a_plan_that_covers_its_file_passes(plan):
    assert [job.weight for job in plan.jobs] == ["w", "n"]
    check_plan(plan)


def test_a_plan_that_does_not_cover_its_file_once_is_refused(plan):
    w, n = plan.jobs
    wrong = {
        r"'w_scale' is written up to byte (\d+), not to (?!\1)": changed(plan, 0, scale=None),
        r"'w' is written up to byte (\d+), not to (?!\1)": changed(plan, 0, value=None),
        r"'n' is written up": ShardPlan(plan.file, plan.size, plan.header, (w,), plan.constants),
        r"'t' is written up": ShardPlan(plan.file, plan.size, plan.header, plan.jobs),
        r"'n' is written from byte (\d+), not from (?!\1)": ShardPlan(
            plan.file, plan.size, plan.header, (w, n, n), plan.constants
        ),
        r"'x' is not in the header": changed(plan, 1, value=n.value._replace(name="x")),
        r"'w' is written from byte": changed(plan, 0, value=moved(w.value, 1)),
        r"'w_scale' is written from byte": changed(plan, 0, scale=moved(w.scale, -4)),
        r"'t' has 4 bytes, not 8": ShardPlan(
            plan.file, plan.size, plan.header, plan.jobs, (plan.constants[0]._replace(data=bytes(4)),)
        ),
        r"'w' has 24 bytes, not those of its shape": changed(plan, 0, value=w.value._replace(shape=(4, 7))),
    }
    for words, bad in wrong.items():
        with pytest.raises(OutputError, match=f"the plan of 'wanted.safetensors' is no good: .*{words}"):
            check_plan(bad)


def test_a_tensor_may_be_made_of_parts_that_follow_each_other(tmp_path):
    whole = torch.randn(6, 4)
    found = source(tmp_path / "source", {"a": whole[:2], "b": whole[2:]})
    plan, _, wanted = shard_of(tmp_path, [Made("w", whole, "int8")])
    (job,) = plan.jobs
    first = job._replace(
        source=found["a"],
        value=job.value._replace(shape=(2, 4), nbytes=8),
        scale=job.scale._replace(shape=(2, 1), nbytes=8),
    )
    second = job._replace(
        part=1,
        source=found["b"],
        value=moved(job.value, 8)._replace(shape=(4, 4), nbytes=16),
        scale=moved(job.scale, 8)._replace(shape=(4, 1), nbytes=16),
    )
    plan = ShardPlan(plan.file, plan.size, plan.header, (second, first))
    source(tmp_path / "source", {"a": whole[:2], "b": whole[2:]})
    record = convert_shard(plan, supply(tmp_path / "source"), tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == wanted
    assert [(seen.weight, seen.part) for seen in record.seen] == [("w", 1), ("w", 0)]
    (tmp_path / "out.safetensors").unlink()
    late = second._replace(value=moved(second.value, 1))
    with pytest.raises(OutputError, match="'w' is written from byte"):
        check_plan(ShardPlan(plan.file, plan.size, plan.header, (first, late)))


def test_a_job_that_makes_no_sense_is_refused(plan):
    w, n = plan.jobs
    block = Piece(
        "w",
        "f",
        0,
        "float8_e4m3fn",
        (6, 4),
        24,
        (4, 3),
        Piece("i", "f", 0, "float32", (2, 2), 16),
        "bfloat16",
    )
    inverse = Piece("i", "f", 0, "float32", (1, 2), 8)
    wrong = {
        r"'n' has 12 bytes in 'f', not those": changed(
            plan, 1, source=n.source._replace(file="f", shape=(4,))
        ),
        r"'n' has another number of values": changed(
            plan, 1, source=n.source._replace(shape=(4,), nbytes=16)
        ),
        r"'n' is copied as float32": changed(plan, 1, source=n.source._replace(dtype="int32")),
        r"'n' is no codes, and cannot": changed(plan, 1, scale=w.scale),
        r"'w' has codes in float32": changed(plan, 0, value=w.value._replace(dtype="float32")),
        r"'w' has codes in the shape of its weight": changed(plan, 0, kind="transposed_linear"),
        r"'w' has scales float32 \[6, 1\] for 4 rows": changed(
            plan, 0, kind="transposed_linear", value=w.value._replace(shape=(24,))
        ),
        r"'w' has scales \[1, 2\], not \[2, 2\]": changed(plan, 0, source=block._replace(inverse=inverse)),
        r"'w' is block-quantized, as no transposed_linear is": changed(
            plan, 0, source=block, kind="transposed_linear", value=w.value._replace(shape=(24,))
        ),
    }
    for words, bad in wrong.items():
        with pytest.raises(OutputError, match=words):
            check_plan(bad)


def test_a_header_that_is_none_is_refused(plan):
    with pytest.raises(CorruptCheckpointError, match=r"the header of wanted\.safetensors"):
        check_plan(ShardPlan(plan.file, plan.size, plan.header[:-3] + b"xxx", plan.jobs, plan.constants))
    with pytest.raises(CorruptCheckpointError, match="holds 48 bytes of data, but its header describes 68"):
        check_plan(ShardPlan(plan.file, plan.size - 20, plan.header, plan.jobs, plan.constants))
    with pytest.raises(OutputError, match="the header is followed by 4 bytes"):
        check_plan(ShardPlan(plan.file, plan.size, plan.header + bytes(4), plan.jobs, plan.constants))
