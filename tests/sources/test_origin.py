"""Where a model came from survives the manifest; what cannot be true of an origin is refused."""

import json

import pytest

from mono_quant.errors import CorruptCheckpointError
from mono_quant.io.hub.metadata import CardMetadata
from mono_quant.sources.origin import Origin

CARD = CardMetadata(
    license="other",
    license_name="acme",
    license_link="https://example.org/license",
    language=("en", "de"),
    datasets=("a/b",),
    pipeline_tag="fill-mask",
    extra_gated={"extra_gated_prompt": "Please", "extra_gated_fields": {"Name": "text"}},
)
FULL = Origin(
    "Model",
    "org/model",
    "0" * 40,
    True,
    False,
    CARD,
    {"model.safetensors": "0" * 64},
    ("allow_pickle",),
    "fp8 (e4m3, blocks of 128 x 128)",
)


@pytest.mark.parametrize("origin", [FULL, Origin("Net")], ids=["full", "bare"])
def test_an_origin_comes_back_from_json(origin: Origin) -> None:
    assert Origin.from_dict(json.loads(json.dumps(origin.to_dict()))) == origin


def test_the_manifest_lists_the_fields_of_the_card_beside_the_others() -> None:
    assert set(FULL.to_dict()) == {
        "name", "repo_id", "sha", "private", "gated", "license", "license_name", "license_link", "language", "datasets",
        "pipeline_tag", "extra_gated", "files", "access", "stored",
    }  # fmt: skip
    assert "stored" not in Origin("Net").to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"repo_id": "../x"},
        {"sha": "main"},
        {"license": 3},
        {"license_link": ["x"]},
        {"language": "en"},
        {"language": [1]},
        {"datasets": {"a": "b"}},
        {"extra_gated": "x"},
        {"extra_gated": {"license": "mit"}},
        {"files": {"model.safetensors": "x"}},
        {"access": ["eval"]},
        {"access": 1},
        {"stored": 8},
        {"stored": "[x](http://x)"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CorruptCheckpointError, match="save again"):
        Origin.from_dict(FULL.to_dict() | change)
