"""Shards are converted while files come and go, within a bound; whatever stops it keeps what is finished."""

import hashlib
import threading
import time

import pytest
from folders import listing, snapshot
from stream_runs import (
    IDENTITY,
    SHARDS,
    convert,
    expected,
    finding,
    plan,
    prepare,
    stream,
    supply_of,
)

from mono_quant.errors import CorruptCheckpointError, HubError, OutputError
from mono_quant.stream import stages
from mono_quant.stream.spec import Found, Seen, ShardRecord
from mono_quant.stream.work import source_bytes
from mono_quant.stream.workspace import open_workspace


class Stop(BaseException):
    """Stands for anything that is no Exception."""


class Counting:
    """A supply that remembers what happened, and notices what may not happen."""

    def __init__(self, base, broken=None):
        self.supply, self.broken = supply_of(base), broken
        self.here, self.most, self.events = set(), 0, []
        self.lock = threading.Lock()

    def fetch(self, file):
        with self.lock:
            if file not in self.here:
                self.events.append(("fetch", file))
            self.here.add(file)
            self.most = max(self.most, len(self.here))
        if file == self.broken:
            raise CorruptCheckpointError(f"{file} is broken")
        return self.supply.fetch(file)

    def release(self, file):
        with self.lock:
            assert file in self.here, f"{file} was let go twice"
            self.here.remove(file)
            self.events.append(("release", file))


@pytest.mark.parametrize(("room", "most"), [(1, 3), (2, 3), (3, 3), (4, 4), (9, 4)])
def test_so_many_files_are_here_at_once_and_no_more(tmp_path, room, most):
    prepare(tmp_path)
    supply = Counting(tmp_path)
    # the last shard is made of three
    stream(tmp_path, supply=supply, room=room)
    assert supply.most <= most and supply.here == set()
    assert {n: d for n, d in snapshot(tmp_path / "out").items() if n in expected()} == expected()


def test_with_room_for_all_each_file_comes_once_and_goes_when_nobody_needs_it_any_more(tmp_path):
    prepare(tmp_path)
    supply = Counting(tmp_path)
    did = []

    def watched(shard, supply, target, told):
        did.append((shard.file, sorted(supply.here)))
        return convert(shard, supply, target, told)

    shards = ((0,), (0, 1), (1,), (2,), (3,), (3, 2))
    stream(tmp_path, supply=supply, room=9, shards=shards, convert=watched)
    assert sorted(e for e in supply.events if e[0] == "fetch") == [
        ("fetch", f"part{i}.bin") for i in range(4)
    ]
    assert [file for kind, file in supply.events if kind == "release"][:2] == ["part0.bin", "part1.bin"]
    # while the fourth is converted the first two are gone already
    assert not {"part0.bin", "part1.bin"} & set(did[3][1])


def test_files_of_the_next_shard_come_while_this_one_is_converted(tmp_path):
    prepare(tmp_path)
    supply = Counting(tmp_path)
    came = threading.Event()

    class Telling(Counting):
        def fetch(self, file):
            result = super().fetch(file)
            if file == "part3.bin":
                came.set()
            return result

    supply = Telling(tmp_path)

    def first_waits(shard, supply, target, told):
        if shard.jobs[0].source.file == "part0.bin" and len(shard.jobs) == 1:
            assert came.wait(20), "the files of the next shard did not come"
        return convert(shard, supply, target, told)

    stream(tmp_path, supply=supply, room=4, shards=((0,), (3,)), convert=first_waits)


@pytest.mark.parametrize("room", [None, 2, 9])
def test_a_file_that_cannot_be_had_stops_it_and_what_is_finished_stays(tmp_path, room):
    prepare(tmp_path)
    with pytest.raises(CorruptCheckpointError, match=r"part3\.bin is broken") as error:
        stream(tmp_path, supply=Counting(tmp_path, "part3.bin"), room=room)
    assert "the same command goes on from there" in error.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    files = set(listing(tmp_path / ".out.mq-stream"))
    assert {shard.file for shard in plan()[:3]} <= files and not any(file.endswith(".part") for file in files)
    stream(tmp_path, room=room)
    assert listing(tmp_path) == ["out", "source"]


class Away:
    """Where files are sent, which is slow, and may refuse."""

    def __init__(self, refuses=None, forgets=()):
        self.files, self.refuses, self.forgets, self.puts = {}, refuses, forgets, []

    def put(self, record, path):
        self.puts.append(record.file)
        if record.file == self.refuses:
            raise HubError("no")
        self.files[record.file] = path.read_bytes()

    def holds(self, record):
        return record.file in self.files and record.file not in self.forgets


@pytest.mark.parametrize("keep", [True, False])
def test_finished_files_are_sent_in_order_and_kept_only_on_demand(tmp_path, keep):
    prepare(tmp_path)
    away = Away()
    waiting = []

    def watched(shard, supply, target, told):
        names = [n for n in listing(target.parent) if n.endswith(".safetensors")]
        waiting.append(len(names))
        return convert(shard, supply, target, told)

    def run():
        stream(tmp_path, delivery=away, keep=keep, convert=watched, shards=SHARDS)

    if keep:
        run()
    else:  # what is not here cannot be taken into a folder
        with pytest.raises(OutputError, match="No such file"):
            run()
        # one waits, one is on its way
        assert max(waiting) <= 2
    assert away.files == expected() and away.puts == list(expected())


def test_what_was_sent_is_not_sent_again_unless_the_other_end_lost_it(tmp_path):
    prepare(tmp_path)
    away = Away(refuses=plan()[3].file)
    with pytest.raises(HubError):
        stream(tmp_path, delivery=away)
    assert away.puts == [shard.file for shard in plan()[:4]]
    away.refuses, away.forgets, away.puts = None, {plan()[1].file}, []
    stream(tmp_path, delivery=away)
    assert sorted(away.puts) == sorted([plan()[1].file, *(shard.file for shard in plan()[3:])])
    assert away.files == expected() and listing(tmp_path) == ["out", "source"]


def test_a_file_that_was_sent_and_removed_counts_while_the_other_end_has_it(tmp_path):
    prepare(tmp_path)
    away = Away(refuses=plan()[3].file)
    with pytest.raises(HubError):
        stream(tmp_path, delivery=away, keep=False)
    left = [n for n in listing(tmp_path / ".out.mq-stream") if n.endswith("safetensors")]
    # the next one was converted while that was refused, or not
    assert left in ([plan()[3].file], [plan()[3].file, plan()[4].file])
    away.refuses, away.puts, did = None, [], []

    def watched(shard, supply, target, told):
        did.append(shard.file)
        return convert(shard, supply, target, told)

    with pytest.raises(OutputError, match="No such file"):
        stream(tmp_path, delivery=away, keep=False, convert=watched)
    assert did == ([] if len(left) == 2 else [plan()[4].file]) and away.puts == [
        plan()[3].file,
        plan()[4].file,
    ]


def test_ctrl_c_stops_all_stages_within_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE_SECONDS", 0.2)
    prepare(tmp_path)
    gone = threading.Event()

    class Slow(Away):
        def put(self, record, path):
            gone.wait(20)

    def stops(shard, supply, target, told):
        if shard.file == plan()[1].file:
            raise KeyboardInterrupt
        return convert(shard, supply, target, told)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as stop:
        stream(tmp_path, delivery=Slow(), room=2, convert=stops)
    assert time.monotonic() - start < 5
    gone.set()
    assert "the same command goes on from there" in stop.value.__notes__[0]
    away = Away()
    stream(tmp_path, delivery=away)
    assert away.files == expected()


def test_what_is_found_is_planned_with_at_once_in_the_next_run_and_other_shards_stay_done(tmp_path):
    prepare(tmp_path)
    wide = Found(wide=frozenset({"1.0", "4.3"}))
    did = []

    def watched(shard, supply, target, told):
        did.append(shard.file)
        if len(did) == 5:
            raise Stop
        return finding(wide.wide)(shard, supply, target, told)

    with pytest.raises(Stop):
        stream(tmp_path, convert=watched)
    first, second, third, fourth, fifth = (shard.file for shard in plan())
    # the second is planned anew with what it found, the first stays
    assert did == [first, second, second, third, fourth]
    away = Away()
    stream(tmp_path, convert=watched, delivery=away)
    assert did[5:] == [fourth, fifth, fifth] and away.files == expected(wide)
    files = snapshot(tmp_path / "out")
    assert {name: files[name] for name in expected()} == expected(wide)
    assert expected(wide) != expected() and listing(tmp_path) == ["out", "source"]


def test_what_was_seen_of_what_was_found_adds_up_over_parts_and_counts_no_part_twice(tmp_path):
    prepare(tmp_path)

    def note():
        with open_workspace(tmp_path / "out", IDENTITY) as ledger:
            for file, part in (("a", 0), ("b", 1), ("c", 1)):
                seen = (Seen("w", part, unfinite=3 + part), Seen("other", 0, unfinite=9))
                record = ShardRecord(file, file, 0, "", seen, Found(unfinite=frozenset("w")))
                ledger.keep(record, tmp_path)
            # what is only found is no work to be kept
            part = ledger.new_part("d")
            part.write_bytes(b"d")
            ledger.keep(ShardRecord("d", "d", 1, hashlib.sha256(b"d").hexdigest(), ()), part)
            raise Stop

    with pytest.raises(Stop):
        note()
    with open_workspace(tmp_path / "out", IDENTITY) as ledger:
        assert {name: seen.unfinite for name, seen in ledger.seen.items()} == {"w": 7}
        assert ledger.found == Found(unfinite=frozenset("w"))


def test_a_shard_that_finds_what_it_was_planned_with_ends_and_does_not_go_on_for_ever(tmp_path):
    prepare(tmp_path)

    def stubborn(shard, supply, target, told):
        return finding({"0.0"})(plan()[0], supply, target, told)

    with pytest.raises(
        OutputError, match=r"model-00001-of-00005\.safetensors' found .*'wide': \['0\.0'\].*planned with"
    ):
        stream(tmp_path, convert=stubborn)


def test_progress_counts_bytes_of_sources_up_to_all_of_them(tmp_path):
    prepare(tmp_path)
    told = []
    total = sum(source_bytes(shard) for shard in plan())
    stream(tmp_path, progress=lambda done, of: told.append((done, of)))
    assert {of for _, of in told} == {total} == {32 * sum(map(len, SHARDS))}
    done = [count for count, _ in told]
    assert done == sorted(done) and done[-1] == total and set(done) == set(range(32, total + 1, 32))


def test_a_supply_is_asked_for_no_file_of_shards_that_are_done(tmp_path):
    prepare(tmp_path)
    with pytest.raises(CorruptCheckpointError):
        stream(tmp_path, supply=Counting(tmp_path, "part3.bin"), room=2)
    supply = Counting(tmp_path)
    stream(tmp_path, supply=supply, room=2, shards=SHARDS)
    assert supply.events[0] == ("fetch", "part3.bin")
