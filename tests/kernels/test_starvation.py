"""Starvation: see the room of this name."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mono_quant import kernels
from mono_quant.kernels import starvation

GROUPS = {
    "version 2": ("0::/app\n", {"app/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, seen from inside a container": ("0::/docker/1\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "version 2, a quota above": (
        "0::/a/b\n",
        {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "70000 100000"},
        0.7,
    ),
    "version 1": (
        "4:memory:/x\n3:cpu,cpuacct:/x\n",
        {"cpu,cpuacct/x/cpu.cfs_quota_us": "25000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "50000\n"},
        0.5,
    ),
    "version 1, at another name": (
        "3:cpuacct,cpu:/x\n",
        {"cpu/cpu.cfs_quota_us": "60000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        0.6,
    ),
}
# One neighbour for each processor, because a machine with many would have one left for the threads.
TOLD = """
import os, subprocess, sys, time, torch
from mono_quant.kernels import starvation
torch.set_num_threads(2)
everywhere = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(everywhere)})
print(starvation.starved())
os.sched_setaffinity(0, everywhere)
starvation.processors = lambda: 2.0
neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in everywhere]
time.sleep(0.3)
# a fifth of a second can fall between the turns of a neighbour
def told():
    return next((found for _ in range(10) if (found := starvation.starved())), None)
print(told())
os.environ["OMP_WAIT_POLICY"] = "passive"
print(told())
torch.set_num_threads(1)
print(starvation.starved())
for neighbour in neighbours:
    neighbour.kill()
"""


@pytest.mark.parametrize("name", GROUPS)
def test_a_quota_is_read_from_the_control_groups(name: str, tmp_path: Path) -> None:
    membership, files, quota = GROUPS[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert starvation.processors(tmp_path, tmp_path / "membership") == quota


@pytest.mark.parametrize("text", ["max 100000", "", "garbage", "-1 100000", "100000 0", "1 2 3"])
def test_a_group_without_a_quota_allows_all_processors(text: str, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    (tmp_path / "membership").write_text("0::/\nno colons\n1:cpu:/../x\n")
    assert starvation.processors(tmp_path, tmp_path / "membership") == len(os.sched_getaffinity(0))
    assert starvation.processors(tmp_path / "none", tmp_path / "none") == len(os.sched_getaffinity(0))


def test_more_threads_than_processors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starvation, "processors", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert "4 threads wait for each other on 1.5 processors" in str(kernels.starved())
    assert "OMP_NUM_THREADS=1," in str(kernels.starved())


def test_a_busy_neighbour_is_noticed_and_one_thread_is_not_disturbed() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP")}
    done = subprocess.run(
        [sys.executable, "-c", TOLD], env=environment, capture_output=True, text=True, check=True
    )
    narrow, busy, asleep, single = done.stdout.splitlines()
    assert narrow.startswith("2 threads wait for each other on 1 processors")
    assert busy.startswith("something else keeps a processor busy: 2 threads take")
    assert busy.endswith(
        "start it with OMP_WAIT_POLICY=passive, so that threads sleep while they wait, or with OMP_NUM_THREADS=1"
    )
    assert asleep.endswith("as one alone; start it with OMP_NUM_THREADS=1")
    assert single == "None"


def test_measuring_is_short_and_leaves_the_threads_as_they_are() -> None:
    before, start = torch.get_num_threads(), time.process_time()
    assert starvation.slowdown(0.02) > 0
    assert torch.get_num_threads() == before
    assert time.process_time() - start < 1
