"""Cards say what the report says, and nothing foreign becomes structure."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from mono_quant.artifact import cards
from mono_quant.artifact.cards import CardFacts
from mono_quant.artifact.facts import read_card_facts, read_report
from mono_quant.io.hub.metadata import CardMetadata
from mono_quant.planning.report import QuantReport, TensorReport
from mono_quant.sources.origin import Origin

GOLDEN = sorted(p for p in (Path(__file__).parents[2] / "model_cards").iterdir() if p.is_dir())
HOSTILE = [
    "x\nlicense: mit",
    "---\nlicense: mit\n---",
    "a: b # c",
    "</td><script>alert(1)</script>",
    "[link](https://evil.example)",
    "![image](https://evil.example/x.png)",
    "`code` | cell ``` fence",
    "{{7*7}} {% import os %}",
    "# heading",
    "\u202egnirts\u202c",
    "\x00\x1b[31m",
    "a" * 5000,
]


def row(name: str, action: str = "kept", **changes: object) -> TensorReport:
    base = {"kind": "linear", "shape": (64, 64), "dtype_before": "float32", "dtype_after": "float32"}
    base |= {"bytes_before": 16384, "bytes_after": 16384, "is_layer": True}
    return TensorReport(name=f"{name}.weight", module=name, action=action, **(base | changes))  # type: ignore[arg-type]


def facts(**changes: object) -> CardFacts:
    rows = (
        row("encoder.0.fc", "quantized", dtype_after="int8", bytes_after=4352, sqnr_db=40.0, gap_db=1.5),
        *(row(f"encoder.{i}.gate", reason="router: kept") for i in range(3)),
        row("lm_head", reason="output head: kept"),
    )
    fidelity = {"output": "logits", "probe": "4 x 32 random tokens", "positions": 128}
    fidelity |= {"relative_error": 0.0123, "cosine_mean": 0.9998, "cosine_min": 0.999, "kl_mean": 1e-4}
    report = QuantReport("int8", rows, "auto", "reference", fidelity)
    origin = Origin(
        "TinyModel",
        "org/tiny",
        "0" * 40,
        False,
        False,
        card=CardMetadata(license="mit", language=("en",), pipeline_tag="fill-mask"),
    )
    base = CardFacts(
        report, origin, "compressed-tensors", "transformers", {}, {"torch": "2.13.0"}, True, "me/tiny-int8"
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_golden_cards_render_again_byte_for_byte(folder: Path) -> None:
    text = cards.render(read_card_facts(folder, f"example/{folder.name}"))
    assert (folder / "README.md").read_bytes() == text.encode(), (
        "the template changed: run scripts/render_model_cards.py and look at the difference"
    )


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_golden_metadata_says_what_report_and_manifest_say(folder: Path) -> None:
    data = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data.to_dict()
    manifest = json.loads((folder / "mono_quant.json").read_text())
    assert data.get("base_model") == manifest["source"]["repo_id"]
    assert data.get("base_model_relation") == ("quantized" if manifest["source"]["repo_id"] else None)
    assert data.get("license") == manifest["source"]["license"]
    assert manifest["dtype"] in data["tags"]
    vanilla = (
        manifest["layout"] != "mono_quant" and manifest["kind"] == "transformers" and "moe" not in folder.name
    )
    is_encoder = manifest["kind"] == "sentence_transformer"
    library = "sentence-transformers" if is_encoder else "transformers" if vanilla else "mono_quant"
    assert data["library_name"] == library


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_every_kept_layer_is_on_the_card_with_its_reason(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    report = read_report(folder)
    for kept in report.skipped:
        name = kept.module or kept.name
        starred = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        line = next((x for x in text.splitlines() if f"`{name}`" in x or f"`{starred}`" in x), None)
        assert line is not None, name
        assert cards._escape(kept.reason) in line
    assert f"{report.quantized_parameters:,} of {report.parameters:,} parameters" in text


def test_layers_are_grouped_by_number_and_counted() -> None:
    line = next(x for x in cards.render(facts()).splitlines() if "`encoder.*.gate`" in x)
    assert line.split("|")[2].strip() == "3"
    assert line.split("|")[4].strip() == f"{3 * 64 * 64:,}"


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["name", "license", "license_name", "pipeline_tag", "language"])
def test_foreign_strings_stay_values_in_the_head(text: str, field: str) -> None:
    value = (text,) if field == "language" else text
    origin = facts().origin
    if field == "name":
        origin = replace(origin, name=value)
    else:
        origin = replace(origin, card=replace(origin.card, **{field: value}))
    card = cards.render(facts(origin=origin))
    head, body = card.split("\n---\n", 1)
    data = yaml.safe_load(head.removeprefix("---\n"))
    expected = cards.metadata(facts(origin=origin)).to_dict()
    assert data == expected
    assert data["base_model"] == "org/tiny"
    assert set(data) <= {
        "base_model", "base_model_relation", "language", "library_name", "license", "license_name", "pipeline_tag", "tags",
    }  # fmt: skip
    assert [x for x in body.splitlines() if x.startswith("## ")] == [
        x for x in cards.render(facts()).splitlines() if x.startswith("## ")
    ]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["module", "reason", "kind"])
def test_foreign_strings_stay_text_in_the_body(text: str, field: str) -> None:
    base = facts()
    action = "quantized" if field == "kind" else "kept"
    changed = replace(row("x", action, reason="r"), **{field: text})
    plain = replace(row("x", action, reason="r"), **{field: "plain"})
    body = cards.render(replace(base, report=replace(base.report, rows=(changed,))))
    same = cards.render(replace(base, report=replace(base.report, rows=(plain,))))
    assert len(body.splitlines()) == len(same.splitlines())
    # the last line is a mark of ours, with the hash of all others
    for line, reference in list(zip(body.splitlines(), same.splitlines(), strict=True))[:-1]:
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)
        assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", reference))
        if line != reference:
            assert not re.search(r"(?<!\\)[<>\[\]{}]", outside), line
            assert line.isprintable()


def test_base_model_is_never_the_repository_itself() -> None:
    own = facts(repo_id="Org/Tiny")
    assert "base_model" not in cards.metadata(own).to_dict()


def test_licence_is_absent_when_the_source_has_none() -> None:
    unknown = facts(origin=Origin("TinyModel", "org/tiny", "0" * 40))
    assert "license" not in cards.metadata(unknown).to_dict()


def test_lint_accepts_what_render_wrote_and_added_text() -> None:
    text = cards.render(facts())
    assert cards.lint(text, facts()) == []
    assert cards.lint(text + "\n## Our notes\n\nWorks well.\n", facts()) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("base_model: org/tiny", "base_model: me/tiny-int8", "the repository itself"),
        ("license: mit", "license: apache-2.0", "license is 'apache-2.0', but the model's is 'mit'"),
        ("base_model_relation: quantized\n", "", "base_model_relation is None"),
        ("| relative error | 0.0123 |", "| relative error | 0.0001 |", "this line is missing or differs"),
        ("| `lm_head` |", "| `lm_heads` |", "this line is missing or differs"),
        ('mono_quant.load("me/tiny-int8")', 'mono_quant.load("org/tiny")', "this line is missing or differs"),
        (
            "**4,096 of 20,480 parameters (20.0%)**",
            "**20,480 of 20,480 parameters (100.0%)**",
            "this line is missing",
        ),
        ("0" * 40 + "`", "1" * 40 + "`", "this line is missing or differs"),
        ("- w8a8\n", "", "the tags lack w8a8"),
        ("| relative error |", "| relative error | 0 |\n| relative error |", "other lines in the block"),
        ("import mono_quant\n", "import mono_quant\nimport os\n", "other lines in the block"),
        (
            "| relative error | 0.0123 |",
            "<!--\n| relative error | 0.0123 |\n-->",
            "this line is missing or differs",
        ),
    ],
)
def test_lint_finds_a_false_claim(old: str, new: str, problem: str) -> None:
    text = cards.render(facts())
    assert old in text
    assert any(problem in line for line in cards.lint(text.replace(old, new), facts()))


def test_lint_accepts_other_forms_of_the_same_and_what_only_the_owner_knows() -> None:
    text = cards.render(facts())
    assert cards.lint(text.replace("language:\n- en", "language: en").replace("|\n", "| \r\n"), facts()) == []
    local = facts(origin=Origin("TinyModel"))
    text = cards.render(local).replace("library_name:", "license: mit\nbase_model: org/tiny\nlibrary_name:")
    assert cards.lint(text, local) == []


@pytest.mark.parametrize("address", ["https://evil.example/x", "www.evil.example", "~~struck~~"])
def test_a_bare_address_is_no_link(address: str) -> None:
    assert address not in cards.render(facts(report=replace(facts().report, notes=(f"left out: {address}",))))


def test_origin_survives_the_manifest() -> None:
    card = CardMetadata(extra_gated={"extra_gated_prompt": "Please"}, datasets=("a/b",))
    origin = replace(facts().origin, card=card)
    assert Origin.from_dict(json.loads(json.dumps(origin.to_dict()))) == origin


def test_the_card_names_as_many_architectures_as_the_list_of_what_was_run():
    listed = (Path(__file__).parents[2] / "docs" / "interop.md").read_text().partition("\n## transformers")[0]
    ran = {line.split("|")[2].strip() for line in listed.splitlines() if line.split("|")[3:4] == [" ok "]}
    version = re.search(r"^## vLLM ([\d.]+)", listed, re.MULTILINE)[1]
    text = cards.render(facts(layout="compressed-tensors", kind="transformers"))
    assert f"vLLM {version} ran tiny models of {len(ran)} architectures from files of this layout" in text
    assert "`docs/interop.md`" in text and "vLLM" not in cards.render(facts(layout="mono_quant"))
