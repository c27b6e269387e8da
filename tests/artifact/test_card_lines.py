"""The lines of a card that stand there only sometimes: each with the facts that bring it, and not without them."""

from dataclasses import replace

import pytest

from mono_quant.artifact import cards
from mono_quant.artifact.cards import CardFacts
from mono_quant.planning.report import QuantReport, TensorReport
from mono_quant.sources.origin import Origin

FIDELITY = {"output": "logits", "probe": "4 x 32 random tokens", "positions": 1280, "relative_error": 0.0123}
ORIGIN = Origin("TinyModel", "org/tiny", "0" * 40)


def row(name, action="kept", **changes):
    base = {"kind": "linear", "shape": (10, 10), "dtype_before": "float32", "dtype_after": "float32"}
    base |= {
        "bytes_before": 400,
        "bytes_after": 400,
        "is_layer": True,
        "module": name.removesuffix(".weight"),
    }
    return TensorReport(name=name, action=action, **base | changes)


def lines(*rows, dtype="int8", report=None, **changes):
    given = {"kernel": "reference", "fidelity": FIDELITY, **(report or {})}
    report = QuantReport(dtype, rows or (row("fc.weight", "quantized"),), **given)
    base = CardFacts(
        report, ORIGIN, "mono_quant", "transformers", {}, {"torch": "2.13.0"}, False, "me/tiny-int8"
    )
    return cards.render(replace(base, **changes)).splitlines()


def test_sixty_kinds_of_kept_layers_are_listed_and_the_layers_of_the_rest_counted():
    rows = [row(f"n{i}.weight", reason="tiny") for i in range(60)]
    assert sum(line.startswith("| `n") for line in lines(*rows)) == 60
    assert not any("more kinds" in line for line in lines(*rows))
    more = [*rows, *(row(f"x.{i}.weight", reason="tiny") for i in range(3)), row("y.weight", reason="tiny")]
    (rest,) = (line for line in lines(*more) if "more kinds" in line)
    assert rest == "| and 2 more kinds, listed in `mono_quant_report.json` | 4 | | | |"
    assert sum(line.startswith("| `n") for line in lines(*more)) == 60


def test_kept_layers_are_one_kind_where_only_their_number_differs():
    found = lines(
        row("a.0.fc.weight", reason="r"),
        row("a.1.fc.weight", reason="r"),
        row("a.2.fc.weight", reason="r", dtype_after="bfloat16"),
        row("a.3.fc.weight", reason="s"),
        row("b2.weight", reason="r"),
        row("weight", reason="r", module=""),
    )
    assert [line for line in found if line.startswith("| `")] == [
        "| `a.*.fc` | 2 | float32 | 200 | r |",
        "| `a.2.fc` | 1 | bfloat16 | 100 | r |",
        "| `a.3.fc` | 1 | float32 | 100 | s |",
        "| `b2` | 1 | float32 | 100 | r |",
        "| `weight` | 1 | float32 | 100 | r |",
    ]
    assert not any("stay in float" in line for line in lines())


def test_the_measured_output_is_told_with_its_probe_or_the_reason_why_there_is_none():
    found = lines(row("fc.weight", "quantized", sqnr_db=40.04, gap_db=-0.5))
    start = "`logits` of this model against the original, on 4 x 32 random tokens (1,280 positions), measured when "
    assert any(line.startswith(start) and line.endswith("(kernel: reference):") for line in found)
    assert "| relative error | 0.0123 |" in found
    assert (
        "Lowest weight SQNR: 40.0 dB (`fc.weight`), 0.5 dB above what 8 bits reach on Gaussian rows." in found
    )
    assert any(line.startswith("A synthetic probe says") for line in found)
    assert not any("SQNR" in line or "Warning" in line or "zero in float16" in line for line in lines())
    report = QuantReport("int8", (), "auto", "reference", FIDELITY | {"probe": "the given inputs"})
    facts = CardFacts(report, ORIGIN, "mono_quant", "transformers", {}, {}, False)
    assert "synthetic probe" not in cards.render(facts)
    assert "8 bits" not in cards.render(facts)
    without = replace(report, fidelity=None, fidelity_note="it's too large")
    assert "The output was not measured: it's too large." in cards.render(replace(facts, report=without))
    # in the order that a file has
    each = replace(report, fidelity=FIDELITY | {"relative_error_by_scheme": {"int12": 0.004, "int8": 0.02}})
    text = cards.render(replace(facts, report=each))
    assert "| relative error, int8 everywhere | 0.02 |\n| relative error, int12 everywhere | 0.004 |" in text
    assert "Other engines compute with int8; int12 is the most accurate." in text
    hot = replace(report, fidelity=FIDELITY | {"peak_activation": 70_000.0})
    assert "\n\nWarning: activations reach 70000, beyond 65504" in cards.render(replace(facts, report=hot))


def test_the_schemes_of_activations_are_told_with_their_reasons():
    layer = {"dtype_after": "int8", "kind": "linear"}
    rows = (
        row("a.weight", "quantized", **layer),
        row("b.weight", "quantized", **layer, activations="int12", why="asked for: b|c"),
        row("c.weight", "quantized", **layer, activations="int12", why="asked for: b|c"),
        row("table.weight", "quantized", **layer | {"kind": "embedding"}),
    )
    found = lines(*rows, report={"activations": "by pattern", "auto_activations": "int8-g128"})
    start = found.index("| scheme | layers | why |")
    assert found[start + 2 : start + 5] == [
        "| `auto` | 1 | what suits the processor that runs; int8-g128 where it was made |",
        "| `int12` | 2 | asked for: b\\|c |",
        "",
    ]
    # a report of an older version says nothing of them
    assert not any("codes while" in line for line in lines(*rows))


def test_notes_and_values_that_became_zero_are_told():
    rows = (row("a.weight", "quantized", flushed=3), row("b.weight", "quantized", flushed=2))
    found = lines(*rows, dtype="fp16", report={"notes": ("read from *pickle* weights", "and more")})
    assert "5 non-zero weights (2.50%) became zero in float16." in found
    assert found[found.index("Note: read from \\*pickle\\* weights.") + 1 :][:2] == ["", "Note: and more."]


def test_a_plain_checkpoint_tells_how_many_tensors_do_not_fit():
    kept = "fc.weight has values up to 1e6, which float16 cannot hold"
    rows = (row("a.weight", reason=kept), row("b.weight", reason=kept), row("c.weight", reason="other"))
    found = lines(*rows, row("d.weight", "quantized"), dtype="fp16", layout="plain")
    assert any(line.startswith("2 tensors do not fit float16") for line in found)
    found = lines(rows[2], dtype="fp16", layout="plain")
    assert not any("do not fit float16" in line for line in found)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, f'result = mono_quant.quantize_from_hub("org/tiny", "int8", revision="{"0" * 40}")'),
        (
            {"settings": {"skip": ("b",), "embeddings": True}},
            f'result = mono_quant.quantize_from_hub("org/tiny", "int8", revision="{"0" * 40}", embeddings=True, skip=(\'b\',))',
        ),
        ({"origin": Origin("TinyModel")}, "model = ...  # the original TinyModel"),
        ({"origin": Origin("Tiny Model")}, "model = ...  # the original YourModel"),
        ({"origin": Origin("class")}, "model = ...  # the original YourModel"),
        (
            {"origin": Origin("TinyModel", files={"model.safetensors": "0" * 64})},
            "model = ...  # the original TinyModel, or its folder",
        ),
        ({"origin": Origin("TinyModel")}, 'result = mono_quant.quantize(model, "int8")'),
    ],
)
def test_the_recipe_can_be_run_again(changes, line):
    found = lines(**changes)
    start = found.index("import mono_quant", found.index('result.save("output-folder")') - 5)
    assert found[start - 1 : start + 2][::2] == ["```python", ""] and line in found[start:]
    assert found[found.index('result.save("output-folder")') + 1] == "```"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, ['model = mono_quant.load("me/tiny-int8")']),
        ({"repo_id": None}, ['model = mono_quant.load("path/to/this/folder")']),
        (
            {"inputs": ("input_ids", "pixel_values")},
            ['model = mono_quant.load("me/tiny-int8")  # takes input_ids and pixel_values'],
        ),
        (
            {"kind": "module"},
            ['model = mono_quant.load("me/tiny-int8", model=TinyModel(...))  # your own class'],
        ),
        (
            {"kind": "sentence_transformer"},
            ['model = mono_quant.load("me/tiny-int8")', 'embedding = model.encode("Hello, world.")'],
        ),
        (
            {"has_tokenizer": True, "inputs": ("input_ids",)},
            [
                'model = mono_quant.load("me/tiny-int8")',
                'tokenizer = AutoTokenizer.from_pretrained("me/tiny-int8")',
                'inputs = tokenizer("Hello, world.", return_tensors="pt")',
                "output = model(**inputs)",
            ],
        ),
        (
            {"has_tokenizer": True, "inputs": ("input_ids",), "generates": True},
            [
                'model = mono_quant.load("me/tiny-int8")',
                'tokenizer = AutoTokenizer.from_pretrained("me/tiny-int8")',
                'inputs = tokenizer("Hello, world.", return_tensors="pt")',
                "output = model.generate(**inputs, max_new_tokens=20)",
                "print(tokenizer.decode(output[0], skip_special_tokens=True))",
            ],
        ),
    ],
)
def test_the_first_code_of_a_card_loads_this_very_model(changes, code):
    found = lines(**changes)
    block = found[found.index("```python") + 1 : found.index("```")]
    head = ["import mono_quant"]
    head += ["from transformers import AutoTokenizer"] if changes.get("has_tokenizer") else []
    assert block == [*head, "", *code]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a", "`a`"),
        ("a`b", "``a`b``"),
        ("``a", "``` ``a ```"),
        ("a`", "`` a` ``"),
        ("a|b", "`a\\|b`"),
        ("a\nb", "`a b`"),
    ],
)
def test_foreign_names_cannot_leave_their_code_span(text, code):
    found = lines(row(f"{text}.weight", reason="r", module=text))
    assert f"| {code} | 1 | float32 | 100 | r |" in found


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b*c", r"a\_b\*c"),
        ("<b>|#", r"\<b\>\|\#"),
        ("https://a.b", ":\\//a.b"),
        ("see WWW.a.b", "see WWW\\.a.b"),
        ("x" * 500, "x" * 399 + "…"),
    ],
)
def test_foreign_sentences_have_no_structure(text, shown):
    (line,) = (line for line in lines(row("a.weight", reason=text)) if line.startswith("| `a`"))
    assert line.endswith(f"{shown} |")


@pytest.mark.parametrize(
    ("kind", "layout", "library"),
    [
        ("sentence_transformer", "plain", "sentence-transformers"),
        ("sentence_transformer", "compressed-tensors", "sentence-transformers"),
        ("sentence_transformer", "mono_quant", "mono_quant"),
        ("transformers", "plain", "transformers"),
        ("transformers", "compressed-tensors", "transformers"),
        ("transformers", "mono_quant", "mono_quant"),
        ("module", "plain", "mono_quant"),
    ],
)
def test_the_library_is_the_one_whose_own_loader_loads_it(kind, layout, library):
    assert f"library_name: {library}" in lines(kind=kind, layout=layout)


def test_experts_in_int8_are_loaded_by_mono_quant_alone():
    for action, library in (("quantized", "mono_quant"), ("kept", "transformers")):
        found = lines(row("e.weight", action, kind="experts"), layout="compressed-tensors")
        assert f"library_name: {library}" in found


@pytest.mark.parametrize(("count", "more"), [(4, ""), (5, " and 1 more files"), (7, " and 3 more files")])
def test_four_weight_files_are_named_with_their_hash_and_the_others_counted(count, more):
    files = {f"model-{i}.safetensors": f"{i}" * 64 for i in range(count)}
    (line,) = (line for line in lines(origin=Origin("TinyModel", files=files)) if "model-0" in line)
    assert [f"model-{i}" in line for i in range(count)] == [i < 4 for i in range(count)]
    assert f"`{'3' * 64}`{more})" in line
