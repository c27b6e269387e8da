"""Many workers share the shards, and the result is that of one; whoever dies costs its shard and no more."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed
from folders import listing, snapshot
from stream_runs import SHARDS, convert, expected, finding, plan, prepare, stream

import mono_quant
from mono_quant.errors import ConfigError, OutputBusyError, OutputError, OutputExistsError
from mono_quant.stream.crew import Crew, largest_first, meet
from mono_quant.stream.spec import Found
from mono_quant.stream.work import Patience

SCRIPT = Path(__file__).parents[1] / "support" / "stream_runs.py"


def environment(**more):
    paths = [str(Path(mono_quant.__file__).parents[1]), str(SCRIPT.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def torchrun(base, count, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [*command, str(SCRIPT), str(base)],
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def weights(base):
    return {
        name: data for name, data in (snapshot(base / "out") or {}).items() if name.endswith(".safetensors")
    }


def did(base):
    return {path.name: path.read_text().split() for path in sorted(base.glob("did.*"))}


def ends(base):
    return sorted(path.read_text() for path in base.glob("end.*"))


def leftovers(base):
    return [name for name in listing(base) if not name.startswith(("did.", "end."))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    base = tmp_path_factory.mktemp("alone")
    prepare(base)
    stream(base)
    return snapshot(base / "out")


def test_ranks_of_torchrun_give_the_bytes_of_one_process(tmp_path, alone):
    prepare(tmp_path)
    count = 2  # four, and killed ones: scripts/kills
    done = torchrun(tmp_path, count, PAUSE="0.05")
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "out") == alone
    everything = [file for files in did(tmp_path).values() for file in files]
    assert sorted(everything) == sorted(expected())  # each once
    assert ends(tmp_path) == ["left"] * (count - 1) + ["published"]
    assert (tmp_path / "end.0").read_text() == "published"
    assert leftovers(tmp_path) == ["out", "source"]
    assert "another one ends the work" in done.stderr


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_without_a_store_a_rank_that_is_killed_is_replaced_by_the_one_that_stays(tmp_path, alone):
    prepare(tmp_path)

    def dies(shard, supply, target, told):
        if list(tmp_path.glob(".out.mq-stream/*.safetensors")):
            os.kill(os.getpid(), signal.SIGKILL)
        return convert(shard, supply, target, told)

    process = os.fork()
    if process == 0:
        try:
            stream(tmp_path, crew=Crew(1, 2, "static"), convert=dies)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    did = []

    def watched(shard, supply, target, told):
        did.append(shard.file)
        return convert(shard, supply, target, told)

    assert stream(tmp_path, crew=Crew(0, 2, "static"), convert=watched) is not None
    assert len(did) == len(SHARDS) - 1
    assert snapshot(tmp_path / "out") == alone and leftovers(tmp_path) == ["out", "source"]


def test_without_a_store_the_last_to_end_publishes_where_rank_0_never_came(tmp_path, alone):
    prepare(tmp_path)
    assert len(stream(tmp_path, crew=Crew(2, 3, "static"))) == len(SHARDS)
    assert snapshot(tmp_path / "out") == alone and leftovers(tmp_path) == ["out", "source"]


def test_rank_0_that_comes_late_leaves_the_end_to_the_one_who_began_it(tmp_path, alone):
    prepare(tmp_path)
    late = []

    def watched(shard, supply, target, told):
        own = [s.file for s in Crew(1, 2, "static").turns(plan(), "")]
        if shard.file not in own and not late:
            late.append("comes")
            late.append(stream(tmp_path, crew=Crew(0, 2, "static")))
        return convert(shard, supply, target, told)

    records = stream(tmp_path, crew=Crew(1, 2, "static"), convert=watched)
    assert late == ["comes", None] and len(records) == len(SHARDS)
    assert snapshot(tmp_path / "out") == alone and leftovers(tmp_path) == ["out", "source"]


def in_threads(base, world, store=None, **options):
    """Workers that share a store, or nothing; returns what each of them got."""
    got = [None] * world

    def work(rank):
        try:
            got[rank] = stream(base, crew=Crew(rank, world, "run", store, "p"), **options)
        except BaseException as error:  # noqa: BLE001  looked at below
            got[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("world", [2, 7])
def test_one_publishes_whatever_the_order_in_which_workers_end(tmp_path, alone, shared, world):
    prepare(tmp_path)
    store = torch.distributed.HashStore() if shared else None

    did = []

    def at_random(shard, supply, target, told):
        did.append(shard.file)
        time.sleep(random.random() * 0.03)
        return convert(shard, supply, target, told)

    # without a store nobody knows of workers that come after the end: they find the finished target
    late = () if shared else (OutputExistsError, OutputBusyError)
    got = in_threads(tmp_path, world, store, convert=at_random)
    assert sum(isinstance(records, dict) for records in got) == 1, got
    assert all(records is None or isinstance(records, (dict, *late)) for records in got), got
    assert sorted(did) == sorted(expected())  # nobody did what another one was at
    assert snapshot(tmp_path / "out") == alone and leftovers(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("shared", [True, False])
def test_what_one_worker_finds_all_plan_with(tmp_path, shared):
    prepare(tmp_path)
    wide = Found(wide=frozenset({"1.0", "4.3"}))
    store = torch.distributed.HashStore() if shared else None
    got = in_threads(tmp_path, 3, store, convert=finding(wide.wide))
    assert sum(isinstance(records, dict) for records in got) == 1, got
    assert weights(tmp_path) == expected(wide) and leftovers(tmp_path) == ["out", "source"]


def test_an_older_result_is_replaced_by_many_workers_too(tmp_path, alone):
    prepare(tmp_path)
    stream(tmp_path, shards=SHARDS[:2])
    assert snapshot(tmp_path / "out") != alone
    got = in_threads(tmp_path, 4, torch.distributed.HashStore(), overwrite=True)
    assert sum(isinstance(records, dict) for records in got) == 1 and got.count(None) == 3, got
    assert snapshot(tmp_path / "out") == alone and leftovers(tmp_path) == ["out", "source"]


def test_a_worker_that_keeps_its_shard_is_not_waited_for_for_ever(tmp_path, alone):
    prepare(tmp_path)
    go = threading.Event()

    def hangs(shard, supply, target, told):
        go.wait(20)
        raise OutputError("was waited for")

    thread = threading.Thread(target=lambda: swallow(tmp_path, hangs))
    thread.start()
    while not list(tmp_path.glob(".out.mq-stream/*.claim")):
        time.sleep(0.01)
    patience = Patience(standstill=0.3, leaving=0.3, pause=0.02)
    records = stream(tmp_path, crew=Crew(0, 2, "run"), patience=patience)
    assert thread.is_alive()
    go.set()
    thread.join()
    assert len(records) == len(SHARDS) and snapshot(tmp_path / "out") == alone


def swallow(base, hangs):
    with pytest.raises(OutputError):
        stream(base, crew=Crew(1, 2, "run"), convert=hangs)


def test_a_run_of_others_is_refused_while_a_worker_of_this_one_lives(tmp_path):
    prepare(tmp_path)
    one, other = Crew(0, 2, "one"), Crew(1, 2, "other")

    def refused(shard, supply, target, told):
        for crew in (other, Crew(0, 2, "one"), Crew()):
            with pytest.raises(OutputBusyError, match=rf"process {os.getpid()} on .*wait for it"):
                stream(tmp_path, crew=crew)
        return convert(shard, supply, target, told)

    stream(tmp_path, crew=one, convert=refused)
    assert weights(tmp_path) == expected()


def test_static_shares_are_all_of_it_and_the_large_ones_come_first():
    shards = plan()
    shares = [list(Crew(rank, 3).turns(shards, "x")) for rank in range(3)]
    assert sorted(shard.file for share in shares for shard in share) == sorted(s.file for s in shards)
    sizes = [shard.size for shard in largest_first(shards)]
    assert sizes[0] == max(sizes) and sizes[-1] == min(sizes)
    assert list(Crew().turns(shards, "x")) == shards


def test_turns_through_a_store_go_to_whoever_asks(tmp_path):
    store = torch.distributed.HashStore()
    shards = plan()
    one, other = (Crew(rank, 2, "run", store, "p") for rank in range(2))
    slow, fast = one.turns(shards, "x"), other.turns(shards, "x")
    taken = [next(slow), *fast]
    assert [s.file for s in taken] == [s.file for s in largest_first(shards)] and list(slow) == []
    # another work, another plan, another attempt: their turns begin anew
    assert len(list(one.turns(shards, "y"))) == len(list(one.turns(shards[:3], "x"))) + 2 == 5
    assert len(list(Crew(0, 2, "run", store, "q").turns(shards, "x"))) == 5


CREWS = {
    "nothing": ({}, (0, 1, "")),
    "torchrun with one": (
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        (0, 1, ""),
    ),
    "static": ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3, "static")),
    "slurm": ({"RANK": "2", "WORLD_SIZE": "3", "SLURM_JOB_ID": "77"}, (2, 3, "SLURM_JOB_ID=77")),
    "array": (
        {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}
        | {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_JOB_ID": "5", "SLURM_JOB_ID": "8"},
        (3, 4, "SLURM_ARRAY_JOB_ID=5"),
    ),
}


@pytest.mark.parametrize("case", CREWS)
def test_the_environment_says_who_this_is(case):
    given, wanted = CREWS[case]
    crew = meet(given)
    assert (crew.rank, crew.world, crew.run) == wanted and crew.store is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x' in the environment; it must be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "this process is number 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "this process is number -1 of 2"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": ""},
            "MASTER_PORT is ''",
        ),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        meet(given)


def test_a_store_that_nobody_serves_is_named(monkeypatch):
    monkeypatch.setattr("mono_quant.stream.crew.STORE_SECONDS", 1)
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    with pytest.raises(OutputError, match=r"does not answer at '127\.0\.0\.1':9 .*unset them to share"):
        meet(given)


def test_a_worker_that_plans_anew_does_not_arrive_for_another_one():
    store = torch.distributed.HashStore()
    first, second = (Crew(rank, 2, "run", store, "prefix") for rank in (0, 1))
    for _ in range(3):
        first.arrive("work")
    assert not first.wait_for_arrivals("work", 0.1)
    second.arrive("work")
    assert first.wait_for_arrivals("work", 0.1) and second.wait_for_arrivals("work", 0.1)
