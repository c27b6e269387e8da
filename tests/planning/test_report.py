"""The report's rows add up to the model, and every number in the table comes from a row."""

import json
from dataclasses import replace

import pytest

from mono_quant.errors import CorruptCheckpointError, OutputError
from mono_quant.planning.report import QuantReport, TensorReport, human_bytes


def row(name, shape, before, after, action="kept", **options):
    after_dtype = "int8" if action == "quantized" else "float32"
    kind = options.pop("kind", "linear")
    module = name.rpartition(".")[0]
    return TensorReport(name, module, kind, shape, "float32", after_dtype, before, after, action, **options)


# fc1: 40 x 20 in int8 with 40 scales; fc2: 10 x 40; a tied head, a norm and a buffer.
ROWS = (
    row("fc1.weight", (40, 20), 3200, 960, "quantized", is_layer=True, sqnr_db=41.5, gap_db=0.25),
    row("fc2.weight", (10, 40), 1600, 440, "quantized", is_layer=True, sqnr_db=39.25, gap_db=1.75),
    row("fc1.bias", (40,), 160, 160, reason="bias"),
    row("emb.weight", (30, 20), 2400, 2400, kind="embedding", is_layer=True, reason="embedding: on request"),
    row("head.weight", (30, 20), 0, 0, "shared", reason="emb.weight"),
    row("norm.running_mean", (40,), 160, 160, kind="BatchNorm1d", reason="norm", is_buffer=True),
)
REPORT = QuantReport(
    "int8", ROWS, "auto", kernel="reference", notes=("scales are fp32",), auto_activations="int8-g128"
)
FIDELITY = {
    "output": "logits",
    "relative_error": 0.0123456,
    "cosine_mean": 0.99987,
    "probe": "4 x 16 tokens",
    "positions": 64,
}


def test_totals_are_the_sums_of_the_rows():
    assert REPORT.parameters == 800 + 400 + 40 + 600  # no buffer, shared memory once
    assert REPORT.quantized_parameters == 1200
    assert REPORT.coverage == 1200 / 1840
    assert (REPORT.bytes_before, REPORT.bytes_after) == (7520, 4120)
    assert [r.name for r in REPORT.quantized] == ["fc1.weight", "fc2.weight"]
    assert [r.name for r in REPORT.skipped] == ["emb.weight"]
    assert REPORT.worst.name == "fc2.weight"
    assert [r.numel for r in ROWS] == [800, 400, 40, 600, 600, 40]


def test_a_kept_layer_is_named_once_and_a_weight_kept_in_a_quantized_layer_by_itself():
    rows = (
        row("mha.in_proj_weight", (12, 4), 192, 192, is_layer=True, reason="by the user"),
        row("mha.out_proj.weight", (4, 4), 64, 64, is_layer=True, reason="by the user"),
        row("lstm.weight_ih_l0", (8, 3), 96, 96, is_layer=True, reason="short rows"),
        row("lstm.weight_hh_l0", (8, 2), 64, 48, "quantized", is_layer=True),
        row("table", (5, 2), 40, 40, is_layer=True, reason="no int8 form"),
        row("lstm.bias_ih_l0", (8,), 32, 32, reason="bias"),
    )
    report = QuantReport("int8", (rows[0], replace(rows[1], module="mha"), *rows[2:]))
    kept = [(layer.name, layer.weights, layer.reason, layer.dtype) for layer in report.kept_layers]
    assert kept == [
        ("mha", 64, "by the user", "float32"),
        ("lstm.weight_ih_l0", 24, "short rows", "float32"),
        ("table", 10, "no int8 form", "float32"),
    ]
    lines = report.table().splitlines()
    assert [line.split() for line in lines[lines.index("layers kept in float") + 1 :][:3]] == [
        ["mha", "64", "by", "the", "user"], ["lstm.weight_ih_l0", "24", "short", "rows"], ["table", "10", "no", "int8", "form"]
    ]  # fmt: skip


def test_the_repr_is_one_short_line():
    assert repr(REPORT) == (
        "<QuantReport: int8, 1,840 parameters, 65.2% of them quantized, 7.5 kB -> 4.1 kB>"
    )
    assert "int8 (plan)" in repr(replace(REPORT, planned=True))


def test_quantized_buffers_do_not_count_as_parameters():
    half = row("b", (5,), 20, 10, "quantized", is_buffer=True)
    report = QuantReport("fp16", (half,))
    assert (report.parameters, report.quantized_parameters, report.coverage) == (0, 0, 0.0)
    assert report.bytes_after == 10


def test_an_empty_report_divides_by_nothing():
    empty = QuantReport("int8", ())
    assert (empty.parameters, empty.coverage, empty.bytes_before, empty.worst) == (0, 0.0, 0, None)
    assert "0 of 0 parameters (0.0%)" in empty.table()


def test_scalars_and_empty_tensors_count_their_values():
    assert row("a", (), 4, 4).numel == 1 and row("a", (0, 5), 0, 0).numel == 0


def test_the_check_passes_for_exactly_the_models_names_in_any_order():
    REPORT.check([r.name for r in reversed(ROWS)])
    REPORT.check(iter([r.name for r in ROWS]))


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        (ROWS[1:], (), r"once: fc1.weight \(1 in all\)"),
        (ROWS, ("new.weight",), r"once: new.weight \(1 in all\)"),
        ((*ROWS, ROWS[0]), (), r"once: fc1.weight \(1 in all\)"),
        (ROWS[3:], ("new",), r"fc1.bias, fc1.weight, fc2.weight, new \(4 in all\)"),
        (
            ROWS,
            tuple("abcdefghij"),
            r"a, b, c, d, e, f, g, h \.\.\. \(10 in all\)\. This is a bug in mono_quant",
        ),
    ],
)
def test_the_check_names_what_is_missing_unknown_or_twice(rows, extra, message):
    with pytest.raises(CorruptCheckpointError, match=message):
        replace(REPORT, rows=rows).check([*(r.name for r in ROWS), *extra])


@pytest.mark.parametrize(
    "report",
    [
        REPORT,
        QuantReport("fp16", ()),
        REPORT.with_fidelity(FIDELITY, kernel="native avx2"),
        REPORT.with_fidelity(None, "too large"),
        replace(
            REPORT,
            planned=True,
            rows=(replace(ROWS[0], sqnr_db=None, gap_db=None), replace(ROWS[2], flushed=3)),
        ),
    ],
)
def test_json_goes_round(report):
    text = report.to_json()
    again = QuantReport.from_dict(json.loads(text))
    assert again == report and again.to_json() == text
    assert text.endswith("}\n") and json.loads(text) == report.to_dict()


def test_json_is_canonical_and_carries_totals():
    data = json.loads(REPORT.to_json())
    totals = {"parameters": 1840, "quantized_parameters": 1200, "bytes_before": 7520, "bytes_after": 4120}
    assert data["totals"] == totals
    assert list(data) == sorted(data)
    assert data["rows"][2] == {
        "name": "fc1.bias", "module": "fc1", "kind": "linear", "shape": [40], "dtype_before": "float32",
        "dtype_after": "float32", "bytes_before": 160, "bytes_after": 160, "action": "kept", "reason": "bias",
    }  # fmt: skip
    with pytest.raises(OutputError, match="'the report' cannot be written as JSON"):
        REPORT.with_fidelity({"relative_error": float("nan")}).to_json()


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"dtype": "int8"},
        {"dtype": "int8", "rows": 3},
        {"dtype": "int8", "rows": [3]},
        {"dtype": "int8", "rows": [{"name": "a"}]},
        {"dtype": "int8", "rows": [], "colour": "red"},
        {"rows": []},
        {"dtype": "int8", "rows": [{**REPORT.to_dict()["rows"][0], "shape": 3}]},
        {"dtype": "int8", "rows": [{**REPORT.to_dict()["rows"][0], "odd": 3}]},
        *({**REPORT.to_dict(), "fidelity": odd} for odd in ([], "x", -1, {"a": 1})),
        [],
    ],
)
def test_a_report_of_unexpected_form_is_refused(broken):
    with pytest.raises(
        CorruptCheckpointError, match=r"the report has an unexpected form .*; save the model again"
    ):
        QuantReport.from_dict(broken)


def test_fidelity_is_added_to_a_copy():
    measured = REPORT.with_fidelity(FIDELITY)
    assert (measured.fidelity, measured.kernel) == (FIDELITY, "reference")
    assert REPORT.fidelity is None
    assert REPORT.with_fidelity(None, "too large", "native").fidelity_note == "too large"


def test_the_table_says_what_the_rows_say():
    assert REPORT.table().splitlines() == [
        "1,200 of 1,840 parameters (65.2%) became int8",
        "size    7.5 kB -> 4.1 kB (1.83x smaller)",
        "",
        "           tensors  parameters  before   after  why",
        "quantized        2       1,200  4.8 kB  1.4 kB  linear",
        "kept             1         600  2.4 kB  2.4 kB  embedding: on request",
        "kept             1          40   160 B   160 B  bias",
        "kept             1          40   160 B   160 B  norm",
        "shared           1         600     0 B     0 B  shared with another tensor",
        "",
        "layers kept in float",
        "  emb  600  embedding: on request",
        "",
        "weights lowest SQNR 39.2 dB (fc2.weight), 1.8 dB below what 8 bits reach on Gaussian rows",
        "inputs  auto (here int8-g128) in 2 layers",
        "note    scales are fp32",
    ]


def test_the_table_of_a_plan_says_would():
    assert (
        replace(REPORT, planned=True)
        .table()
        .startswith("1,200 of 1,840 parameters (65.2%) would become int8")
    )


def test_the_table_shows_fidelity_or_why_there_is_none():
    lines = REPORT.with_fidelity(FIDELITY).table().splitlines()
    assert (
        "output  logits against the original: relative error 0.01235, cosine similarity, mean 0.99987"
        in lines
    )
    assert "        on 4 x 16 tokens; kernel: reference" in lines
    assert "output  not measured: too large" in REPORT.with_fidelity(None, "too large").table()
    assert "output" not in REPORT.table()


def test_the_table_of_fp16_shows_the_share_that_became_zero():
    report = QuantReport("fp16", (row("a", (1000,), 4000, 2000, "quantized", flushed=25),))
    assert "weights 25 non-zero values (2.50%) became zero in float16" in report.table()
    assert "activations" not in report.with_fidelity(FIDELITY).table()


def test_a_long_list_of_kept_layers_is_cut_and_says_so():
    rows = tuple(row(f"l{i}.weight", (4, 4), 64, 64, is_layer=True, reason="tiny") for i in range(23))
    text = QuantReport("int8", rows).table()
    assert "  l19  " in text and "l20" not in text
    assert "  ... and 3 more (all of them in the JSON report)" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1.0 kB"), (1049, "1.0 kB"), (86_700_000, "86.7 MB"),
        (1_000_000, "1.0 MB"), (2_500_000_000, "2.5 GB"), (1_234_000_000_000, "1234.0 GB"),
        (999_999, "1.0 MB"), (999_960_000, "1.0 GB"),
    ],
)  # fmt: skip
def test_bytes_are_written_in_decimal_units(count, text):
    assert human_bytes(count) == text
