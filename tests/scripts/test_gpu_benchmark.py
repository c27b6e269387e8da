"""The benchmark of a GPU, as far as a CPU can tell: it walks through, keeps what it found, and judges by the list."""

import json
import subprocess
import sys
import time

import pytest
import torch
from bench.gpu import sections, tables
from bench.gpu.jobs import Job
from bench.gpu.journal import ERROR, JOURNAL, SKIPPED, Journal, read
from bench.gpu.llama import Decoder, new_llama
from bench.gpu.peers import IntMm
from bench.gpu.sizes import DRY
from bench.gpu.verdicts import verdicts

DEVICE = {"section": "facts", "kind": "device", "name": "a card", "capability": "9.0"}


def layer(rows, depth, tokens, ratio, **more):
    shape = {"N": rows, "K": depth, "M": tokens, "ratio": ratio, "wrong": 0}
    return {
        "section": "layers",
        "kind": "layer",
        "scheme": "int8",
        "bf16_us": 2.0,
        "us": 1.0,
        **shape,
        **more,
    }


def judged(rows):
    return {v.what: (v.found, v.text) for v in verdicts(rows)}


def test_layers_are_judged_by_geometric_means_of_large_ones_and_by_their_worst_point():
    found = judged([
        DEVICE,
        layer(4096, 4096, 1, 1.0),
        layer(14336, 4096, 1, 4.0),
        layer(4096, 4096, 64, 1.2, wrong=3),
        layer(1024, 4096, 1, 0.1),
        layer(4096, 4096, 1, 0.01, section="schemes"),
    ])
    assert found["layers of N, K >= 4096, M = 1, geometric mean"] == (pytest.approx(2.0), "met")
    assert found["layers of N, K >= 4096, M = 4 to 64, geometric mean"] == (pytest.approx(1.2), "missed")
    assert found["layers of N, K >= 4096, M >= 1024, geometric mean"] == (None, "not measured")
    assert found["layers of N, K >= 4096, worst point"] == (1.0, "missed")
    assert found["results of layers that differ from the reference"] == (3, "missed")


def test_a_model_is_judged_by_the_stack_that_the_list_names():
    def row(kind, **values):
        return {"section": "model", "kind": kind, **values}

    found = judged([
        DEVICE,
        row("prefill", what="bf16", tokens=2048, ratio=1.0),
        row("prefill", what="int8", tokens=2048, ratio=1.31),
        row("prefill", what="int8, backend mono_quant", tokens=2048, ratio=1.59),
        row("decode", what="bf16", batch=4, ratio=1.0),
        row("decode", what="int8", batch=4, ratio=1.2),
        row("decode", what="int8, backend mono_quant", batch=4, ratio=1.5),
        row("weights", ratio=0.6, ratio_of_32_layers=0.57),
        row("steps", steps=1000, differ=0),
        row("host", ratio=1.4),
        row("host", ratio=0.9),
    ])
    assert found["prompt of 2048 tokens, eager"] == (1.31, "met")
    assert found["prompt of 2048 tokens, backend"] == (1.59, "missed")
    assert found["decoding in a graph, batch 4"] == (1.5, "met")
    assert found["decoding in a graph, batch 16"][1] == "not measured"
    assert found["bytes of the weights of 32 layers, of bf16's"] == (0.57, "met")
    assert found["steps of 1,000 in a graph that differ from eager mode"] == (0, "met")
    assert found["host time of nn.Linear, of ours"] == (0.9, "missed")


def test_a_walk_through_on_a_cpu_says_nothing_about_the_list():
    rows = [{"section": "facts", "kind": "device", "name": "none"}, layer(4096, 4096, 1, 9.0)]
    assert {v.text for v in verdicts(rows)} == {"not measured"}
    assert tables.markdown(tables.summary(rows)).startswith("# A walk through on a CPU")


def test_what_was_not_measured_is_in_the_table_beside_what_was():
    rows = [
        DEVICE,
        layer(4096, 4096, 1, 1.75),
        {"section": "model", "kind": ERROR, "where": "prefill int8", "what": "a | b\nc"},
        {"section": "model_peers", "kind": "absent", "what": "torchao"},
    ]
    text = tables.markdown(tables.summary(rows))
    assert "| 4096 x 4096 | 1 | int8 | 2.0 | 1.0 | 1.75 | 0 |" in text
    assert "| model | prefill int8 | a / b c |" in text
    assert "| model_peers |  | not installed: torchao |" in text


def test_rows_before_a_cut_are_kept(tmp_path):
    journal = Journal("layers", tmp_path / JOURNAL, 60)
    journal.row("layer", M=1)
    with journal.path.open("a") as file:
        file.write('{"section": "layers", "ki')
    assert read(journal.path) == [{"section": "layers", "kind": "layer", "M": 1}]
    sections.write_results(tmp_path)
    assert json.loads((tmp_path / sections.SUMMARY).read_text())["rows"] == read(journal.path)


def test_a_lost_device_ends_a_section_and_nothing_else_does(tmp_path):
    journal = Journal("model", tmp_path / JOURNAL, 60)
    journal.error("prefill", ValueError("a shape"))
    journal.error("prefill", RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    with pytest.raises(SystemExit, match="context is lost"):
        journal.error("decode", RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert [(row["kind"], row["where"]) for row in read(journal.path)] == [
        (ERROR, "prefill"),
        (ERROR, "prefill"),
        (ERROR, "decode"),
    ]


def test_what_there_is_no_time_for_is_written_down(tmp_path):
    journal = Journal("model", tmp_path / JOURNAL, 5)
    assert journal.enough("prefill", 1) and not journal.enough("decode", 60)
    assert [(row["kind"], row["where"]) for row in read(journal.path)] == [(SKIPPED, "decode")]


def test_a_job_that_hangs_is_ended_with_what_it_started(tmp_path):
    child = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    log = tmp_path / "log"
    job = Job([sys.executable, "-c", parent], {}, log)
    deadline = time.monotonic() + 20
    while not log.read_text().strip() and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = log.read_text().strip()
    assert job.wait(0.1) is None
    while time.monotonic() < deadline:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", pid], check=False, capture_output=True, text=True
        ).stdout.strip()
        if not state or state.startswith("Z"):
            break
        time.sleep(0.02)
    assert not state or state.startswith("Z")


@pytest.mark.parametrize("name", ["facts", "layers", "schemes", "host", "experts", "steps", "outliers"])
def test_sections_walk_through_on_a_cpu(name, tmp_path):
    """The others take minutes, since they compile: `scripts/check_gpu --dry`."""
    with torch.no_grad():
        sections.run_section(name, tmp_path, 60, 1, "reference")
    rows = read(tmp_path / JOURNAL)
    assert rows and not [row for row in rows if row["kind"] in (ERROR, SKIPPED)]
    assert all(row["wrong"] == 0 for row in rows if row["kind"] == "layer")
    assert all(row["differ"] == 0 for row in rows if row["kind"] == "steps")
    tables.markdown(tables.summary(rows))


def test_decoding_starts_again_where_it_began():
    with torch.no_grad():
        model = new_llama(DRY, 1, torch.device("cpu"))
        decoder = Decoder(model, model, 2, DRY.filled, DRY.room)
        first, second = [], []
        for held in (first, second):
            for _ in range(3):
                decoder.step()
                held.append(decoder.logits.clone())
            decoder.rewind()
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_the_peer_in_plain_torch_is_close_to_the_float_layer(tokens):
    torch.manual_seed(0)
    float_layer = torch.nn.Linear(72, 24)
    x = torch.randn(tokens, 72)
    with torch.no_grad():
        expected, found = float_layer(x), IntMm(float_layer)(x)
    # half a step of each code, 72 of them, as if they were independent
    bound = x.abs().max() / 127 * float_layer.weight.abs().max() * 72**0.5
    assert (found - expected).abs().max() < bound
