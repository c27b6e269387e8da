"""A manifest that was read has been checked, and what is written is what is read."""

from importlib import metadata
from pathlib import Path

import pytest
import torch
from models import FAMILIES

from mono_quant.artifact.facts import Manifest, StoredCodes, card_facts
from mono_quant.errors import CorruptCheckpointError, FormatVersionError
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.report import QuantReport
from mono_quant.sources.origin import Origin
from mono_quant.sources.source import Subject
from mono_quant.version import __version__

FOLDER = Path("saved")
MANIFEST = Manifest(
    "Tiny",
    "transformers",
    "mono_quant",
    "int8",
    {"a.weight": StoredCodes((3, 4), True, (4, 1))},
    {"c": torch.float64},
    Origin("Tiny", "org/tiny", "0" * 40),
    {"dtype": "int8"},
    {"torch": "2"},
    inputs=("input_ids",),
    generates=True,
    encoder="CrossEncoder",
    built=torch.bfloat16,
    files={"config.json": {"size": 1, "sha256": "0"}},
    narrowed={"b.weight": torch.float32},
)


def test_it_goes_round():
    assert Manifest.parse(MANIFEST.to_dict(), FOLDER) == MANIFEST


def test_a_folder_in_which_nothing_is_narrowed_does_not_speak_of_it():
    data = MANIFEST.to_dict()
    del data["narrowed"]
    parsed = Manifest.parse(data, FOLDER)
    assert parsed.narrowed == {} and parsed.to_dict() == data
    with pytest.raises(CorruptCheckpointError, match="gives b the dtype 'int8'"):
        Manifest.parse(MANIFEST.to_dict() | {"narrowed": {"b": "int8"}}, FOLDER)


@pytest.mark.parametrize("key", ["tensors", "buffers", "source", "settings", "versions", "narrowed"])
@pytest.mark.parametrize("value", [None, [], "x"])
def test_what_should_be_an_object_and_is_none_is_named(key, value):
    with pytest.raises(
        CorruptCheckpointError, match=rf"saved: {key} of mono_quant\.json is .*, not an object; save"
    ):
        Manifest.parse(MANIFEST.to_dict() | {key: value}, FOLDER)


@pytest.mark.parametrize("key", ["class", "kind", "layout", "dtype"])
def test_what_should_be_a_word_and_is_none_is_named(key):
    with pytest.raises(
        CorruptCheckpointError, match=rf"saved: {key} of mono_quant\.json is 3, not a text; save"
    ):
        Manifest.parse(MANIFEST.to_dict() | {key: 3}, FOLDER)


@pytest.mark.parametrize("change", [{"kind": "jax"}, {"layout": "gguf"}])
def test_a_word_of_a_later_version_is_told_with_the_version(change):
    with pytest.raises(FormatVersionError, match=r"does not know; update mono_quant"):
        Manifest.parse(MANIFEST.to_dict() | change, FOLDER)


@pytest.mark.parametrize(
    "facts",
    [
        {"transposed": True, "scale": [4, 1]},
        {"shape": [3, 4], "transposed": True},
        {"shape": [3, 4], "scale": [4, 1]},
        {"shape": 3, "transposed": True, "scale": [4, 1]},
        {"shape": ["x"], "transposed": True, "scale": [4, 1]},
        None,
        [],
    ],
)
def test_codes_that_are_not_described_are_named(facts):
    with pytest.raises(
        CorruptCheckpointError, match=r"mono_quant\.json describes a\.weight in an unknown way"
    ):
        Manifest.parse(MANIFEST.to_dict() | {"tensors": {"a.weight": facts}}, FOLDER)


def test_dtypes_are_float_types():
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        raw = MANIFEST.to_dict() | {"buffers": {"x": dtype}, "built": dtype}
        found = Manifest.parse(raw, FOLDER)
        assert found.buffers == {"x": getattr(torch, dtype)} and found.built == getattr(torch, dtype)
    for key, value, name in (("buffers", {"x": "int8"}, "x"), ("built", "int8", "built")):
        with pytest.raises(
            CorruptCheckpointError, match=rf"gives {name} the dtype 'int8'; save the model again"
        ):
            Manifest.parse(MANIFEST.to_dict() | {key: value}, FOLDER)


def test_an_older_folder_does_not_say_what_its_class_was_built_in():
    raw = MANIFEST.to_dict()
    del raw["built"]
    found = Manifest.parse(raw, FOLDER)
    assert found.built is None and "built" not in found.to_dict()


def test_only_true_is_true_and_only_known_inputs_are_named():
    raw = MANIFEST.to_dict() | {"generates": 1, "inputs": ["input_ids", "rm -rf", 3]}
    raw["tensors"]["a.weight"]["transposed"] = 1
    found = Manifest.parse(raw, FOLDER)
    assert not found.generates and found.inputs == ("input_ids",) and not found.tensors["a.weight"].transposed
    assert Manifest.parse(raw | {"inputs": "input_ids"}, FOLDER).inputs == ()


@pytest.mark.parametrize(
    ("kind", "packages"),
    [
        ("module", {"torch"}),
        ("transformers", {"torch", "transformers"}),
        ("sentence_transformer", {"torch", "transformers", "sentence-transformers"}),
    ],
)
def test_the_packages_that_made_a_model_are_named_with_their_versions(kind, packages):
    subject = Subject(FAMILIES["bert"].build(), kind, origin=MANIFEST.source)
    report = QuantReport("int8", ())
    facts = card_facts(subject, report, QuantizationConfig(skip=["x"]), "mono_quant", True)
    versions = {name: metadata.version(name) for name in packages} | {"mono_quant": __version__}
    assert facts.versions == versions and facts.settings == {"skip": ["x"]}
    assert ("input_ids" in facts.inputs) == (kind == "transformers") and not facts.generates
    assert (facts.kind, facts.layout, facts.has_tokenizer, facts.origin) == (
        kind,
        "mono_quant",
        True,
        MANIFEST.source,
    )
