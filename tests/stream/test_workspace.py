"""What was finished outlives a kill, belongs to one source and one set of settings, and goes when it is published."""

import errno
import hashlib
import json
import os
import shutil
import signal

import pytest
from folders import WRITES, leftovers, listing, os_error, shimmed, snapshot
from stream_runs import IDENTITY, SHARDS, convert, expected, plan, prepare, stream

from mono_quant.errors import OutputBusyError, OutputExistsError, OutputWriteError, ResumeError
from mono_quant.io.disk import disk
from mono_quant.stream.spec import Found, Seen, ShardRecord
from mono_quant.stream.workspace import open_workspace, workspace_beside


class Stop(BaseException):
    """Stands for anything that is no Exception."""


def stopping_after(count):
    """A converter that is stopped when it did so many shards, and the files that it did."""
    did = []

    def convert_some(shard, supply, target, told):
        if len(did) == count:
            raise Stop
        did.append(shard.file)
        return convert(shard, supply, target, told)

    return convert_some, did


def stopped_run(base, count=3, identity=IDENTITY):
    prepare(base)
    some, _ = stopping_after(count)
    with pytest.raises(Stop) as stop:
        stream(base, identity, convert=some)
    return stop.value


def weights(base):
    return {
        name: data for name, data in (snapshot(base / "out") or {}).items() if name.endswith(".safetensors")
    }


def test_a_stopped_run_says_how_to_go_on_and_the_same_command_does_only_the_rest(tmp_path):
    stop = stopped_run(tmp_path)
    assert leftovers(tmp_path) == [".out.mq-stream"] and not (tmp_path / "out").exists()
    assert stop.__notes__ == [
        f"what is finished stays in '{tmp_path / '.out.mq-stream'}'; the same command goes on from there"
    ]
    rest, did = stopping_after(9)
    stream(tmp_path, convert=rest)
    assert did == [shard.file for shard in plan()[3:]]
    assert weights(tmp_path) == expected()
    assert listing(tmp_path) == ["out", "source"]


def test_the_bytes_are_those_of_a_run_that_nobody_stopped(tmp_path):
    stopped_run(tmp_path / "a")
    stream(tmp_path / "a")
    prepare(tmp_path / "b")
    stream(tmp_path / "b")
    assert snapshot(tmp_path / "a" / "out") == snapshot(tmp_path / "b" / "out")


def test_nothing_is_left_where_nothing_was_finished(tmp_path):
    prepare(tmp_path)
    some, _ = stopping_after(0)
    with pytest.raises(Stop) as stop, open_workspace(tmp_path / "x" / "y" / "out", IDENTITY):
        some(plan()[0], None, None, None)
    assert not hasattr(stop.value, "__notes__")
    with pytest.raises(Stop):
        stream(tmp_path, convert=some)
    assert listing(tmp_path) == ["source"]


CHANGES = {
    "a setting": (
        {"settings": {"dtype": "fp16", "skip": []}},
        r"settings\.dtype was 'int8' and is 'fp16'; give",
    ),
    "a setting that is new": (
        {"settings": {"dtype": "int8", "skip": [], "more": 1}},
        r"settings\.more was not there and is '1'",
    ),
    "a setting that is gone": (
        {"settings": {"skip": []}},
        r"settings\.dtype was 'int8' and is not there",
    ),
    "one size of many": (
        {"source": {"path": "source", "sizes": [1, 3]}},
        r"source\.sizes\[1\] was '2' and is '3'",
    ),
    "a list": (
        {"settings": {"dtype": "int8", "skip": ["a"]}},
        r"settings\.skip was '\[\]' and is '\[\"a\"\]'",
    ),
    "all of it": (
        {"source": 1, "settings": 2, "a": 3, "b": 4, "c": 5, "d": 6},
        r"a was not there and is '3'; .* and 1 more; give those again to go on with it, or pass restart=True to discard it",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_or_source_is_refused_by_its_name_and_discarded_on_demand(tmp_path, change):
    stopped_run(tmp_path)
    before = snapshot(tmp_path)
    changed, words = CHANGES[change]
    with pytest.raises(ResumeError, match=words) as refusal:
        stream(tmp_path, {**IDENTITY, **changed})
    assert [(option.name, option.value) for option in refusal.value.options] == [("restart", True)]
    after = snapshot(tmp_path)
    assert {name: data for name, data in after.items() if not name.endswith(".lock")} == {
        name: data for name, data in before.items() if not name.endswith(".lock")
    }
    everything, did = stopping_after(9)
    stream(tmp_path, {**IDENTITY, **changed}, restart=True, convert=everything)
    assert len(did) == len(SHARDS) and listing(tmp_path) == ["out", "source"]


def test_work_that_replaces_an_equal_result_is_not_taken_for_that_of_the_old_one(tmp_path):
    prepare(tmp_path)
    stream(tmp_path)
    some, did = stopping_after(2)
    with pytest.raises(Stop):
        stream(tmp_path, overwrite=True, convert=some)
    told = []

    def stop_at_the_end(done, total):
        told.append(done)
        if told[-2:] == [total, total]:
            raise Stop

    rest, did = stopping_after(9)
    with pytest.raises(Stop):
        stream(tmp_path, overwrite=True, convert=rest, progress=stop_at_the_end)
    assert did == [shard.file for shard in plan()[2:]]
    none, did = stopping_after(9)
    stream(tmp_path, overwrite=True, convert=none)
    assert did == [] and weights(tmp_path) == expected() and listing(tmp_path) == ["out", "source"]


def test_restart_discards_what_has_the_same_settings_too(tmp_path):
    stopped_run(tmp_path)
    everything, did = stopping_after(9)
    stream(tmp_path, restart=True, convert=everything)
    assert len(did) == len(SHARDS) and weights(tmp_path) == expected()


def damage_of(name):
    def cut(path):
        path.write_bytes(path.read_bytes()[:-1])

    def flip(path):
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)

    def link(path):
        shutil.copy(path, path.with_name("elsewhere"))
        path.unlink()
        path.symlink_to(path.with_name("elsewhere"))

    return {
        "gone": os.unlink,
        "cut": cut,
        "flipped": flip,
        "a link": link,
        "longer": lambda p: p.write_bytes(b"x" * 999),
    }[name]


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "a link", "longer"])
def test_a_file_that_is_not_as_it_was_written_is_done_again(tmp_path, damage):
    stopped_run(tmp_path)
    second = plan()[1].file
    damage_of(damage)(tmp_path / ".out.mq-stream" / second)
    rest, did = stopping_after(9)
    stream(tmp_path, convert=rest)
    assert did == [second, *(shard.file for shard in plan()[3:])]
    assert weights(tmp_path) == expected()


RECORDS = {
    "cut": lambda text: (text[:-30], 1),
    "cut before its end": lambda text: (text[:-1], 0),
    "empty": lambda text: (b"", 3),
    "garbage between": lambda text: (text.replace(b"\n", b"\n\xff{\n[1]\n{}\nnull\n", 1), 0),
    "of another plan": lambda text: (text.replace(b'"digest": "', b'"digest": "0'), 3),
    "another sha256": lambda text: (text.replace(b'"sha256": "', b'"sha256": "0', 1), 1),
    "another size": lambda text: (text.replace(b'"size": ', b'"size": 1', 1), 1),
}


@pytest.mark.parametrize("harm", RECORDS)
def test_a_record_that_does_not_fit_counts_for_nothing(tmp_path, harm):
    stopped_run(tmp_path)
    records = tmp_path / ".out.mq-stream" / "records.0.jsonl"
    text, again = RECORDS[harm](records.read_bytes())
    records.write_bytes(text)
    # what a run writes behind a torn line is read by the next
    rest, did = stopping_after(again + 1)
    with pytest.raises(Stop):
        stream(tmp_path, convert=rest)
    assert len(did) == again + 1
    last, more = stopping_after(9)
    stream(tmp_path, convert=last)
    assert len(did) + len(more) == len(SHARDS) - 3 + again
    assert weights(tmp_path) == expected()


def test_a_plan_that_cannot_be_read_is_refused_and_one_that_is_missing_begins_anew(tmp_path):
    stopped_run(tmp_path)
    path = tmp_path / ".out.mq-stream" / "plan.json"
    path.write_text("{")
    with pytest.raises(ResumeError, match=r"is damaged.*pass restart=True"):
        stream(tmp_path)
    path.unlink()
    everything, did = stopping_after(9)
    stream(tmp_path, convert=everything)
    assert len(did) == len(SHARDS) and listing(tmp_path) == ["out", "source"]


def test_a_second_run_is_refused_while_the_first_is_at_work(tmp_path):
    prepare(tmp_path)

    def second(shard, supply, target, told):
        words = rf"process {os.getpid()} on '.+' is writing '.*\.out\.mq-stream' at this moment; wait for it or choose another folder"
        with pytest.raises(OutputBusyError, match=words):
            stream(tmp_path)
        return convert(shard, supply, target, told)

    stream(tmp_path, convert=second)
    assert weights(tmp_path) == expected()


def test_a_folder_of_somebody_else_with_that_name_stays(tmp_path):
    prepare(tmp_path)
    mine = tmp_path / ".out.mq-stream" / "sub" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(OutputExistsError, match="is not of mono_quant"):
        stream(tmp_path)
    assert mine.read_text() == "years of work"


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff\x00"])
def test_a_damaged_plan_is_called_so_and_discarded_on_demand(tmp_path, damage):
    stopped_run(tmp_path)
    (tmp_path / ".out.mq-stream" / "plan.json").write_bytes(damage)
    with pytest.raises(ResumeError, match=r"plan.json' is damaged.*restart=True"):
        stream(tmp_path)
    stream(tmp_path, restart=True)
    assert weights(tmp_path) == expected()


def test_what_has_the_name_of_the_workspace_and_is_none_is_refused(tmp_path):
    prepare(tmp_path)
    (tmp_path / ".out.mq-stream").write_text("mine")
    with pytest.raises(OutputExistsError, match="is not of mono_quant"):
        stream(tmp_path)
    (tmp_path / ".out.mq-stream").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.mq-stream").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError, match="is not of mono_quant"):
        stream(tmp_path)
    assert listing(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("inside", ["source", "source/out", "."])
def test_a_target_that_touches_the_source_is_refused_before_anything_is_made(tmp_path, inside):
    prepare(tmp_path / "x")
    before = snapshot(tmp_path)
    with (
        pytest.raises(OutputExistsError, match="the source"),
        open_workspace(tmp_path / "x" / inside, IDENTITY, sources=[tmp_path / "x" / "source"]),
    ):
        pass
    assert snapshot(tmp_path) == before and leftovers(tmp_path) == []


def in_child(work):
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


FEW = ((0,), (3, 0))


def count_operations(base, monkeypatch):
    with monkeypatch.context() as patch:
        ops = shimmed(patch)
        prepare(base)
        stream(base, shards=FEW)
        assert (
            set(ops.calls)
            >= {"open_shared", "replace", "link", "write", "fsync", "rename", "remove_tree"}
            <= set(WRITES)
        )
        return ops.count


def end_it(base, whole, where):
    """Give the same command again, which is refused where the target was complete."""
    assert snapshot(base / "out") in (None, whole), where
    if (base / "out").exists():
        with pytest.raises(OutputExistsError):
            stream(base, shards=FEW)
    else:
        stream(base, shards=FEW)
    assert snapshot(base / "out") == whole, where
    assert listing(base) == ["out", "source"], where
    shutil.rmtree(base)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_operation_the_target_is_absent_or_complete_and_a_rerun_ends_it(tmp_path, monkeypatch):
    total = count_operations(tmp_path / "count", monkeypatch)
    whole = snapshot(tmp_path / "count" / "out")
    assert weights(tmp_path / "count") == expected(shards=FEW) and total > 50
    # before and after the last ones, which publish and clear away; scripts/kills does all of them both ways
    kills = [(k, k % 2 == 1) for k in range(1, total + 1)]
    kills += [(k, k % 2 == 0) for k in range(total - 5, total + 1)]
    for k, after in kills:
        base = tmp_path / f"{k}"
        prepare(base)
        shimmed(monkeypatch, fail_at=k, error=lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)
        assert in_child(lambda base=base: stream(base, shards=FEW)) == -signal.SIGKILL, k
        shimmed(monkeypatch)
        end_it(base, whole, k)


def test_refused_at_any_operation_the_error_is_typed_and_a_rerun_ends_it(tmp_path, monkeypatch):
    total = count_operations(tmp_path / "count", monkeypatch)
    whole = snapshot(tmp_path / "count" / "out")
    for k in range(1, total + 1):
        base = tmp_path / f"{k}"
        prepare(base)
        ops = shimmed(
            monkeypatch, fail_at=k, error=os_error((errno.EIO, errno.ENOSPC)[k % 2]), after=k % 3 == 0
        )
        failed = False
        try:
            stream(base, shards=FEW)
        except OutputWriteError:
            failed = True
        where = f"{k}, {ops.calls[k - 1]}"
        # only a removal may fail in silence: it is tried again, or by the next run
        assert failed or ops.calls[k - 1] in ("remove_tree", "rmdir"), where
        shimmed(monkeypatch)
        end_it(base, whole, where)


def test_a_full_disk_is_seen_before_the_first_byte_and_the_previous_output_stays(tmp_path, monkeypatch):
    prepare(tmp_path)
    stream(tmp_path)
    before = snapshot(tmp_path / "out")
    need = sum(shard.size for shard in plan())
    real = os.statvfs(tmp_path)
    small = os.statvfs_result([1, 1, *real[2:4], need - 1, *real[5:]])
    monkeypatch.setattr(disk.os, "statvfs", lambda path: small)
    words = (
        rf"'.*\.out\.mq-stream' has no room: needed {need} bytes, available {need - 1} bytes; free some space"
    )
    with pytest.raises(OutputWriteError, match=words):
        stream(tmp_path, overwrite=True)
    assert snapshot(tmp_path / "out") == before and listing(tmp_path) == ["out", "source"]


def test_only_what_is_missing_needs_room(tmp_path, monkeypatch):
    stopped_run(tmp_path)
    need = sum(shard.size for shard in plan()[3:])
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(
        disk.os, "statvfs", lambda path: os.statvfs_result([1, 1, *real[2:4], need, *real[5:]])
    )
    stream(tmp_path)
    assert weights(tmp_path) == expected()


def test_a_folder_without_links_gets_the_files_themselves(tmp_path, monkeypatch):
    class NoLinks(disk._Ops):
        def link(self, old, new):
            raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(disk, "_ops", NoLinks())
    prepare(tmp_path)
    stream(tmp_path)
    assert weights(tmp_path) == expected() and listing(tmp_path) == ["out", "source"]


def test_the_records_are_one_line_each_and_read_back_equal(tmp_path):
    stopped_run(tmp_path)
    lines = (tmp_path / ".out.mq-stream" / "records.0.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"]["file"] for line in lines] == [shard.file for shard in plan()[:3]]
    with open_workspace(tmp_path / "out", IDENTITY) as ledger:
        assert ledger.folder == workspace_beside(tmp_path / "out")
        for shard, line in zip(plan(), lines, strict=False):
            record = ledger.finished(shard.digest())
            assert record.to_dict() == json.loads(line)["record"]
            assert record.sha256 == hashlib.sha256(expected()[shard.file]).hexdigest()


def test_what_was_only_found_is_no_work_that_other_settings_would_lose(tmp_path):
    """Values that a request refuses are found, and then the request is changed as the refusal says."""
    found = ShardRecord("a", "a", 0, "", (Seen("w", 0, unfinite=1),), Found(unfinite=frozenset("w")))

    def refused():
        with open_workspace(tmp_path / "out", IDENTITY) as ledger:
            ledger.keep(found, tmp_path)
            raise Stop

    with pytest.raises(Stop):
        refused()
    assert listing(tmp_path) == []
    # nor does it stay in the way where a kill left it
    child = os.fork()
    if child == 0:
        with open_workspace(tmp_path / "out", IDENTITY) as ledger:
            ledger.keep(found, tmp_path)
            os._exit(0)
    os.waitpid(child, 0)
    assert listing(tmp_path) == [".out.mq-stream"]
    with open_workspace(tmp_path / "out", {**IDENTITY, "settings": {}}) as ledger:
        assert ledger.is_empty and ledger.found == Found()
