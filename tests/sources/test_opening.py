"""The doors: what cannot be converted gives its own error that names the remedy, and leaves nothing behind."""

import re
import shutil

import pytest
import torch
from sources import SINGLE, VERBS, fails
from torch import nn

import mono_quant as mq
from mono_quant import errors
from mono_quant.errors import (
    AmbiguousSourceError,
    ConfigError,
    MonoQuantError,
    PickleOnlyError,
    SourceNotFoundError,
    StateDictError,
    UnsupportedModelError,
)

# peft asks transformers for an attribute that was renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@VERBS
@pytest.mark.parametrize("text", ["/nowhere/at/all", "", "a b", "org/model/more", "./org/nothing"])
def test_a_text_that_is_nothing_names_what_it_could_be(text, verb):
    with pytest.raises(SourceNotFoundError, match=r"no folder here and no Hub id.*org/model"):
        verb(text)


def test_a_path_that_is_nothing_is_not_looked_up_on_the_hub(tmp_path):
    fails(tmp_path / "in", SourceNotFoundError, "does not exist; check the path")


def test_a_token_is_not_a_model():
    with pytest.raises(ConfigError, match="pass it as token=") as caught:
        mq.quantize("hf_" + "a" * 34)
    assert "aaaa" not in str(caught.value)


def test_a_folder_that_shadows_an_id_must_be_meant(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    for verb in (mq.quantize, mq.plan, mq.load):
        with pytest.raises(AmbiguousSourceError, match=r"'\./org/model' for the folder.*origin='hub'"):
            verb("org/model")
    (tmp_path / "org" / SINGLE).touch()
    with pytest.raises(AmbiguousSourceError, match=rf"is a file here.*'\./org/{SINGLE}' for the file"):
        mq.plan(f"org/{SINGLE}")
    for source in ("./org/model", tmp_path / "org" / "model", str(tmp_path / "org" / "model")):
        assert mq.plan(source).planned
    assert mq.plan("org/model", origin="local").planned
    asked = []
    monkeypatch.setattr(
        "mono_quant.sources.remote.resolve", lambda *a, **k: asked.append(a[0]) or pytest.skip.Exception
    )
    with pytest.raises(AttributeError):
        mq.quantize_from_hub("org/model")
    assert asked == ["org/model"]
    with pytest.raises(ConfigError, match="origin is 'cloud'; use 'hub' or 'local'"):
        mq.quantize("org/model", origin="cloud")


@VERBS
def test_a_weight_file_is_not_a_model(folder, verb):
    with pytest.raises(StateDictError, match=r"without an architecture; pass the folder.*config\.json"):
        verb(folder / SINGLE)
    for name in ("pytorch_model.bin", "a.pt", "b.bin"):
        torch.save({}, folder / name)
        with pytest.raises(PickleOnlyError, match=r"is a pickle.*pass the model object"):
            verb(folder / name)
    with pytest.raises(UnsupportedModelError, match="pass a model folder"):
        verb(folder / "config.json")


def test_every_error_class_is_documented():
    names = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, MonoQuantError)}
    assert all(re.search(rf"\b{n}\b", errors.__doc__) for n in names)


def test_a_revision_of_something_that_has_none_is_refused(folder):
    for source in (folder, str(folder), nn.Linear(4, 4)):
        with pytest.raises(ConfigError, match=r"has no revision 'main'; leave it out"):
            mq.quantize(source, revision="main")
    with pytest.raises(ConfigError, match=r"has no revision 'main'; leave it out"):
        mq.load(str(folder), revision="main")
