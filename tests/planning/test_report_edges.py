"""The report where its text changes: the last name that is listed, the first value that does not fit."""

import pytest

from mono_quant.errors import CorruptCheckpointError
from mono_quant.planning.report import QuantReport, TensorReport, gap_text, human_bytes, number


def row(name, action="kept", size=16, **options):
    options = {"reason": "tiny" if action == "kept" else "", **options}
    return TensorReport(
        name,
        name.rpartition(".")[0],
        "linear",
        (size,),
        "float32",
        "float32",
        4 * size,
        4 * size,
        action,
        **options,
    )


@pytest.mark.parametrize(("count", "more"), [(8, ""), (9, " ...")])
def test_eight_names_are_listed_and_more_are_counted(count, more):
    names = [f"n{i}" for i in range(count)]
    listed = ", ".join(names[:8])
    with pytest.raises(
        CorruptCheckpointError, match=rf"once: {listed}{more} \({count} in all\)\. This is a bug"
    ):
        QuantReport("int8", ()).check(names)


def test_twenty_kept_layers_are_listed_without_a_word_about_more():
    rows = tuple(row(f"l{i}.weight", is_layer=True) for i in range(20))
    text = QuantReport("int8", rows).table()
    assert "  l19  16  tiny" in text and "more" not in text


def test_groups_are_quantized_kept_and_shared_and_in_each_the_largest_first():
    rows = (
        row("s", "shared", reason="k1"),
        row("k1", reason="b", size=5),
        row("k2", reason="a", size=5),
        row("k3", reason="c", size=4),
        row("k4", reason="c", size=4),
        row("q", "quantized", size=1),
    )
    groups = QuantReport("int8", rows).groups()
    assert [(action, label, len(found)) for action, label, found in groups] == [
        ("quantized", "linear", 1),
        ("kept", "c", 2),
        ("kept", "a", 1),
        ("kept", "b", 1),
        ("shared", "shared with another tensor", 1),
    ]


def test_positions_that_are_not_finite_are_told_with_the_measures():
    report = QuantReport("fp16", ()).with_fidelity({
        "output": "logits",
        "probe": "it",
        "relative_error": 0.0,
        "cosine_min": None,
        "non_finite_positions": 3,
    })
    assert report.measured() == [("relative error", "0"), ("positions with NaN or infinity", "3")]
    assert "relative error 0, positions with NaN or infinity 3" in report.table()
    assert QuantReport("fp16", ()).measured() == []


@pytest.mark.parametrize(
    ("peak", "words"), [(65504.0, ""), (65536.0, "activations reach 65536, beyond 65504")]
)
def test_activations_beyond_float16_are_a_warning(peak, words):
    facts = {"output": "logits", "probe": "it", "relative_error": 0.1, "peak_activation": peak}
    report = QuantReport("fp16", ()).with_fidelity(facts)
    assert report.overflow_warning[: len(words)] == words and bool(report.overflow_warning) == bool(words)
    assert (f"warning {words}" in report.table()) == bool(words)
    assert ("warning" in report.table()) == bool(words)


def test_the_worst_tensor_is_the_one_with_the_lowest_measured_sqnr():
    rows = (
        row("a", "quantized", sqnr_db=30.0, gap_db=-0.5),
        row("b", "quantized", sqnr_db=-2.0, gap_db=0.0),
        row("c", "quantized"),
    )
    report = QuantReport("int8", rows)
    assert report.worst is rows[1] and QuantReport("int8", rows[2:]).worst is None
    assert "weights lowest SQNR -2.0 dB (b), 0.0 dB below what 8 bits reach" in report.table()
    assert gap_text(rows[0]) == "0.5 dB above what 8 bits reach on Gaussian rows"


def test_a_report_without_a_kernel_keeps_the_one_it_had():
    report = QuantReport("int8", (), kernel="reference")
    assert (
        report.with_fidelity({}).kernel == "reference"
        and report.with_fidelity({}, "", "avx2").kernel == "avx2"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (0.8999999, "0.9"),
        (0.9, "0.9"),
        (0.99987654, "0.999877"),
        (-0.99987654, "-0.999877"),
    ],
)
def test_four_digits_and_six_near_one(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999_949, "999.9 kB"), (999_950, "1.0 MB"), (999_949_000, "999.9 MB"), (999_950_000, "1.0 GB"), (10**15, "1000000.0 GB")],
)  # fmt: skip
def test_bytes_never_read_1000_of_a_smaller_unit(count, text):
    assert human_bytes(count) == text
