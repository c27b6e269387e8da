"""Shard: see the room of this name."""

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from folders import os_error, shimmed
from safetensors.torch import save_file
from streams import Made, expected_of, plan_of, shard_of, source, supply

from mono_quant import kernels
from mono_quant.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    OutputWriteError,
)
from mono_quant.kernels.weights import quantize_rows
from mono_quant.stream import blocks
from mono_quant.stream.shard import convert_shard
from mono_quant.stream.spec import Found, ShardPlan

KINDS = {
    "linear": (13, 17),
    "transposed_linear": (17, 13),
    "conv1d": (7, 5, 3),
    "conv2d": (6, 3, 2, 5),
    "embedding": (29, 8),
    "experts": (3, 5, 7),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def values(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def everything():
    """Tensors of every kind and dtype, odd ones among them."""
    made = [
        Made(f"{kind}.{str(dtype)[6:]}.weight", values(shape, dtype), "int8", kind, flat=len(shape) > 3)
        for kind, shape in KINDS.items()
        for dtype in DTYPES
    ]
    zeros = values((5, 9), torch.bfloat16)
    zeros[2] = 0
    return [
        *made,
        Made("a.zeros", zeros, "int8"),
        Made("a.one", values((1, 1), torch.float32), "int8"),
        Made("b.empty", torch.empty(0, 7), "copy"),
        Made("b.empty_codes", torch.empty(0, 7), "int8"),
        Made("b.no_depth", torch.empty(4, 0, dtype=torch.float16), "int8"),
        Made("b.scalar", torch.tensor(3.5, dtype=torch.bfloat16)),
        Made("b.count", torch.arange(11)),
        Made("b.byte", values((3, 5), torch.float8_e4m3fn)),
        Made("b.flag", torch.tensor([True, False, True])),
        Made("b.long", values((3, 301), torch.float32)),
        Made("c.down", values((9, 33), torch.float32), "cast", dtype=torch.float16),
        Made("c.brain", values((9, 33), torch.float32), "cast", dtype=torch.bfloat16),
        Made("c.up", values((9, 33), torch.float16), "cast", dtype=torch.float32),
        Made("c.narrow", values((9, 33), torch.float64), "cast", dtype=torch.float32),
    ]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("block", [1, 17, 40, 1 << 20])
def test_a_file_has_the_bytes_of_the_official_writer(tmp_path, block, threads):
    constants = {"z.inv_freq": torch.arange(4.0), "z.empty": torch.empty(0)}
    plan, supply, wanted = shard_of(tmp_path, everything(), constants)
    target = tmp_path / "out.safetensors"
    record = convert_shard(plan, supply, target, threads=threads, block=block)
    assert target.read_bytes() == wanted
    assert (record.size, record.sha256) == (len(wanted), hashlib.sha256(wanted).hexdigest())
    assert (record.file, record.digest, bool(record.found)) == (plan.file, plan.digest(), False)
    assert [seen.weight for seen in record.seen] == [job.weight for job in plan.jobs]


def test_two_files_share_codes_and_scale(tmp_path):
    made = [
        Made("w", values((40, 24), torch.bfloat16), "int8"),
        Made("v", values((17, 8), torch.float32), "int8"),
    ]
    found = source(tmp_path / "source", {m.name: m.tensor for m in made})
    wanted = {name: tensor for m in made for name, tensor in expected_of(m).items()}
    records = []
    for number, names in enumerate((("w", "v_scale"), ("w_scale", "v"))):
        path = tmp_path / f"wanted-{number}.safetensors"
        save_file({name: wanted[name] for name in names}, path, {"format": "pt"})
        plan, out = plan_of(made, found, path), tmp_path / f"out-{number}.safetensors"
        records.append(convert_shard(plan, supply(tmp_path / "source"), out, block=100))
        assert out.read_bytes() == path.read_bytes()
    for m in made:
        rows = quantize_rows(m.tensor)
        one, other = [seen for record in records for seen in record.seen if seen.weight == m.name]
        assert one == other
        assert one.signal == pytest.approx(rows.signal, rel=1e-6)
        assert one.noise == pytest.approx(rows.noise, rel=1e-3)


def dequantized(stored, inverse, block, dtype):
    """Return float8 values times the scales of their blocks, by definition."""
    height, width = block
    wide = inverse.float().repeat_interleave(height, -2).repeat_interleave(width, -1)
    return (stored.float() * wide[..., : stored.shape[-2], : stored.shape[-1]]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inverse_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_float8_is_multiplied_with_its_scales_first(tmp_path, dtype, inverse_dtype, block):
    shapes = {
        "w": ((13, 17), (4, 5)),
        "even": ((8, 6), (4, 3)),
        "experts": ((3, 7, 5), (2, 2)),
        "large": ((3, 4), (9, 9)),
    }
    stored, inverses, listed = {}, {}, []
    for name, (shape, size) in shapes.items():
        stored[name] = values(shape, torch.float32).to(torch.float8_e4m3fn)
        outer = [-(-side // step) for side, step in zip(shape[-2:], size, strict=True)]
        inverses[f"{name}_scale_inv"] = values((*shape[:-2], *outer), torch.float32).exp().to(inverse_dtype)
    found = source(tmp_path / "source", stored, "one.safetensors")
    scales = source(tmp_path / "source", inverses, "two.safetensors")
    for name, (_, size) in shapes.items():
        inverse = scales[f"{name}_scale_inv"]
        piece = found[name]._replace(block=size, inverse=inverse, read_as=str(dtype).removeprefix("torch."))
        tensor = dequantized(stored[name], inverses[inverse.name], size, dtype)
        kind = "experts" if len(tensor.shape) == 3 else "linear"
        listed += [
            Made(f"{name}.codes", tensor, "int8", kind, piece=piece),
            Made(f"{name}.copy", tensor, piece=piece),
            Made(f"{name}.cast", tensor.clone(), "cast", dtype=torch.float16, piece=piece),
        ]
    path, target = tmp_path / "wanted.safetensors", tmp_path / "out.safetensors"
    save_file({k: t for m in listed for k, t in expected_of(m).items()}, path, {"format": "pt"})
    plan = plan_of(listed, {}, path)
    assert plan.files == ("one.safetensors", "two.safetensors")
    convert_shard(plan, supply(tmp_path / "source"), target, block=block)
    assert target.read_bytes() == path.read_bytes()


def test_the_definition_of_codes_writes_the_same_bytes(tmp_path):
    plan, files, wanted = shard_of(tmp_path, everything())
    with kernels.using("reference"):
        convert_shard(plan, files, tmp_path / "out.safetensors", block=40)
    assert (tmp_path / "out.safetensors").read_bytes() == wanted


MEMORY = """
import re, sys
import torch
from pathlib import Path
from streams import Made, plan_of, pieces, supply
from mono_quant.io.disk import disk
from mono_quant.stream.shard import convert_shard

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

root = Path(sys.argv[1])
made = [Made("w", torch.zeros(1)), Made("t", torch.zeros(1)), Made("c", torch.zeros(1))]
made = [made[0]._replace(action="int8"), made[1]._replace(action="int8", kind="transposed_linear"), made[2]]
plan = plan_of(made, pieces(root / "source" / "model.safetensors"), root / "wanted.safetensors")
files = supply(root / "source")
disk._ops.fsync = lambda descriptor: None
before, most = anonymous(), [0]
def told(count):
    most[0] = max(most[0], anonymous())
convert_shard(plan, files, root / "out.safetensors", threads=2, told=told)
print(most[0] - before)
"""


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """Sparse files: their zeros cost no disk, and any of these tensors with what is made of it is larger than what is allowed."""
    rows, depth = 8 << 10, 4 << 10
    sizes = {"c": (rows, depth), "t": (depth, rows), "w": (rows, depth)}
    sparse(
        tmp_path / "source" / "model.safetensors", {name: ("BF16", shape) for name, shape in sizes.items()}
    )
    codes = {"t": ("I8", (rows * depth,)), "w": ("I8", (rows, depth))}
    scales = {"t_scale": ("BF16", (rows, 1)), "w_scale": ("BF16", (rows, 1))}
    sparse(tmp_path / "wanted.safetensors", {"c": ("BF16", sizes["c"]), **scales, **codes})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert 1 << 20 < int(done.stdout) < 80 << 20


def sparse(path, tensors):
    """Make a file of zeros with a header; the order is that of its tensors."""
    path.parent.mkdir(exist_ok=True)
    header, reached = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, reached = reached, reached + math.prod(shape) * {"BF16": 2, "I8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, reached]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + reached)


def bad(shape, dtype, *places):
    tensor = values(shape, dtype)
    for place, value in places:
        tensor.view(-1)[place] = value
    return tensor


NAN, INF = float("nan"), float("inf")


def test_what_only_values_say_is_found_and_leaves_no_file(tmp_path):
    small = values((6, 4), torch.float16)
    small[4] *= 2.0**-11
    listed = [
        Made("good", values((5, 7), torch.bfloat16), "int8"),
        Made("wide", small, "int8"),
        Made("nan", bad((8, 5), torch.bfloat16, (3, NAN), (39, INF)), "int8"),
        Made("double", bad((3, 5), torch.float64, (3, 1e39)), "int8"),
        Made(
            "large",
            bad((8, 5), torch.float32, (3, 70000.0), (4, 65510.0), (5, 1e-9)),
            "cast",
            dtype=torch.float16,
        ),
        Made("lost", bad((8, 5), torch.float32, (7, -INF)), "cast", dtype=torch.float16),
        Made("kept", bad((8, 5), torch.bfloat16, (7, -INF), (8, NAN), (9, NAN))),
        Made("masked", bad((40,), torch.float16, (7, -INF))),
        Made("up", bad((40,), torch.float16, (7, INF)), "cast", dtype=torch.float32),
    ]
    finite = [m._replace(tensor=values(m.tensor.shape, m.tensor.dtype)) for m in listed]
    plan, _, _ = shard_of(tmp_path, finite)
    source(tmp_path / "source", {m.name: m.tensor for m in listed})
    target = tmp_path / "out.safetensors"
    record = convert_shard(plan, supply(tmp_path / "source"), target, block=10)
    assert not target.exists()
    assert (record.size, record.sha256) == (0, "")
    assert record.found == Found({"wide_scale"}, {"nan", "double", "lost"}, {"large"})
    seen = {s.weight: s for s in record.seen}
    assert {n: (s.unfinite, s.nan) for n, s in seen.items() if s.unfinite} == {
        "nan": (2, 1),
        "double": (1, 0),
        "lost": (1, 0),
        "kept": (3, 2),
        "masked": (1, 0),
        "up": (1, 0),
    }
    assert seen["large"][4:] == (1, 1, 1, 0, 70000.0, 0)


def test_what_a_copy_holds_is_no_reason_to_fail(tmp_path):
    listed = [
        Made("byte", bad((8, 5), torch.float32, (7, NAN)).to(torch.float8_e4m3fn)),
        Made("kept", bad((8, 5), torch.bfloat16, (7, -INF), (8, NAN))),
        Made("x", torch.full((9,), 3e38)),
    ]
    plan, files, wanted = shard_of(tmp_path, listed)
    target = tmp_path / "out.safetensors"
    record = convert_shard(plan, files, target)
    assert target.read_bytes() == wanted
    # a sum of finite values may be infinite
    assert {s.weight: (s.unfinite, s.nan) for s in record.seen} == {
        "byte": (1, 1),
        "kept": (2, 1),
        "x": (0, 0),
    }


def test_a_copy_that_would_be_cast_is_looked_at_like_a_cast(tmp_path):
    listed = [
        Made("fits", bad((8, 5), torch.float32, (3, 65504.0), (5, 1e-9))),
        Made("large", bad((8, 5), torch.bfloat16, (3, 70144.0), (9, -65536.0))),
        Made("lost", bad((8, 5), torch.float32, (7, -INF), (8, NAN))),
        Made("free", bad((8, 5), torch.float32, (7, -INF), (8, 1e9))),
    ]
    plan, files, wanted = shard_of(tmp_path, listed)
    target = tmp_path / "out.safetensors"
    asked = replace(
        plan, jobs=tuple(j._replace(fits="float16" if j.weight != "free" else "") for j in plan.jobs)
    )
    assert ShardPlan.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    record = convert_shard(asked, files, target, block=10)
    assert record.found == Found(unfinite={"lost"}, overflowed={"large"}) and not target.exists()
    seen = {s.weight: (s.overflowed, s.unfinite, s.largest) for s in record.seen}
    assert seen == {"fits": (0, 0, 0), "large": (2, 0, 70144), "lost": (0, 2, 0), "free": (0, 1, 0)}
    known = tuple(j._replace(fits="float16" if j.weight == "fits" else "") for j in plan.jobs)
    assert convert_shard(replace(plan, jobs=known), files, target).found == Found()
    assert target.read_bytes() == wanted


def test_wide_scales_are_written_where_they_are_expected(tmp_path):
    small = values((6, 4), torch.float16)
    small[4] *= 2.0**-11
    plan, files, wanted = shard_of(tmp_path, [Made("w", small, "int8")])
    assert plan.jobs[0].scale.dtype == "float32"
    convert_shard(plan, files, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == wanted


def test_a_source_that_changes_is_refused(tmp_path):
    plan, files, _ = shard_of(tmp_path, everything())
    path, target = tmp_path / "source" / "model.safetensors", tmp_path / "out.safetensors"

    def touch(_):
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")

    for told in (touch, lambda _: None, lambda _: os.truncate(path, 2000)):
        with pytest.raises(
            CorruptCheckpointError, match=r"model.safetensors .*(changed while|became shorter)"
        ):
            convert_shard(plan, files, target, told=told, threads=2, block=100)
        assert not target.exists()
    heard = []
    with pytest.raises(CorruptCheckpointError, match="changed while"):
        convert_shard(plan, files, target, told=heard.append)
    assert heard == []
    path.unlink()
    with pytest.raises(MissingFileError, match=r"model\.safetensors"):
        convert_shard(plan, files, target)
    assert not target.exists()


def test_a_boolean_that_is_none_is_refused(tmp_path):
    plan, _, _ = shard_of(tmp_path, [Made("flag", torch.tensor([True, False]))])
    path = tmp_path / "source" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with pytest.raises(CorruptCheckpointError, match="boolean tensor 'flag' holds another byte"):
        convert_shard(plan, supply(tmp_path / "source"), tmp_path / "out.safetensors")
    assert list(tmp_path.glob("out*")) == []


def test_a_row_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_ROW_BYTES", 100)
    plan, files, wanted = shard_of(tmp_path, [Made("w", values((2, 25), torch.float32), "int8")])
    convert_shard(plan, files, tmp_path / "out.safetensors", block=1)
    assert (tmp_path / "out.safetensors").read_bytes() == wanted
    plan, files, _ = shard_of(tmp_path, [Made("w", values((2, 26), torch.float32), "int8")])
    with pytest.raises(LimitExceededError, match=r"a row of 'w' has 104 bytes, more than 100"):
        convert_shard(plan, files, tmp_path / "other.safetensors")


def test_who_listens_hears_every_byte_of_the_source_and_may_stop(tmp_path):
    plan, files, _ = shard_of(tmp_path, everything())
    heard = []
    convert_shard(plan, files, tmp_path / "out.safetensors", told=heard.append, block=1 << 20)
    assert sum(heard) == sum(job.source.nbytes for job in plan.jobs)

    calls = []

    def stop(count):
        calls.append(count)
        # not in the thread that is waited for first
        if threading.current_thread().name.endswith("_1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_shard(plan, files, tmp_path / "other.safetensors", told=stop, threads=2, block=1)
    assert not (tmp_path / "other.safetensors").exists()
    # the others end with the block that they are at
    assert len(calls) < len(list(blocks.blocks_of(plan, 1))) / 2


def interrupt():
    raise KeyboardInterrupt


FAULTS = {
    "ENOSPC": (os_error(errno.ENOSPC), False),
    "EIO after": (os_error(errno.EIO), True),
    "interrupt": (interrupt, False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_single_fault_leaves_nothing(tmp_path, monkeypatch, fault):
    plan, files, wanted = shard_of(
        tmp_path, [Made("w", values((9, 5), torch.bfloat16), "int8"), Made("n", torch.arange(9))]
    )
    target = tmp_path / "out.safetensors"
    total = shimmed(monkeypatch)
    convert_shard(plan, files, target, threads=1, block=20)
    assert target.read_bytes() == wanted
    assert {"open", "allocate", "write_at", "fsync", "close"} <= set(total.calls)
    error, after = FAULTS[fault]
    for k in range(1 + after, total.count + 1):
        target.unlink(missing_ok=True)
        ops = shimmed(monkeypatch, fail_at=k, error=error, after=after)
        with pytest.raises((OutputWriteError, KeyboardInterrupt)):
            convert_shard(plan, files, target, threads=1, block=20)
        assert not target.exists(), ops.calls[k - 1]


def test_a_removal_that_fails_is_tried_again(tmp_path, monkeypatch):
    plan, files, _ = shard_of(tmp_path, [Made("n", torch.arange(9))])
    ops = shimmed(monkeypatch)
    ops.write_at = lambda *_: os_error(errno.ENOSPC)()
    real, tries = ops.unlink, []

    def unlink(path):
        tries.append(path)
        if len(tries) < 3:
            raise OSError(errno.EBUSY, "busy")
        real(path)

    ops.unlink = unlink
    with pytest.raises(OutputWriteError, match=r"No space left on device; needed \d+ bytes, available"):
        convert_shard(plan, files, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_there_stays(tmp_path):
    plan, files, _ = shard_of(tmp_path, [Made("n", torch.arange(9))])
    (tmp_path / "out.safetensors").write_text("mine")
    with pytest.raises(OutputWriteError, match="File exists"):
        convert_shard(plan, files, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_text() == "mine"
