"""The doors: what cannot be converted gives its own error that names the remedy, and leaves nothing behind."""

import re
import shutil
from functools import partial

import pytest
import torch
from sources import QUIET, SINGLE, VERBS, fails
from torch import nn

import mono_quant as mq
from mono_quant import errors
from mono_quant.api.delivery import Order, deliver
from mono_quant.errors import (
    ConfigError,
    HubOfflineError,
    MonoQuantError,
    PickleOnlyError,
    SourceNotFoundError,
    StateDictError,
    UnsupportedModelError,
)
from mono_quant.sources.source import Access

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


SAID = "'org/model' is a folder here, so it is not looked up on the Hub; pass origin='hub' for that"


@pytest.fixture
def shadow(checkpoint, tmp_path, monkeypatch):
    """The current folder has a folder of the form of an id; there is no network."""
    shutil.copytree(checkpoint, tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_folder_that_is_here_wins_over_an_id_and_a_warning_says_so(shadow, caplog):
    for verb in (mq.plan, mq.inspect, partial(mq.quantize, **QUIET)):
        verb("org/model")
        assert [record.getMessage() for record in caplog.records] == [SAID]
        caplog.clear()
    for source in ("./org/model", shadow / "org" / "model", str(shadow / "org" / "model")):
        assert mq.plan(source).planned
    assert mq.plan("org/model", origin="local").planned
    assert caplog.records == []


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_what_was_saved_under_the_form_of_an_id_loads_from_there(shadow, caplog, dtype):
    result = mq.quantize("./org/model", dtype, **QUIET)
    result.save("out/model")
    assert caplog.records == []
    loaded = mq.load("out/model")
    state = result.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert mq.verify("out/model")
    assert [record.getMessage() for record in caplog.records] == [SAID.replace("org", "out")] * 2


def test_delivery_says_it_once(shadow, caplog):
    order = Order(mq.QuantizationConfig(fidelity=False), shadow / "result")
    assert deliver("org/model", Access(), order).folder == shadow / "result"
    assert [record.getMessage() for record in caplog.records] == [SAID]


def test_a_file_that_has_the_form_of_an_id_is_called_a_file(shadow, caplog):
    (shadow / "org" / SINGLE).touch()
    with pytest.raises(StateDictError, match="without an architecture"):
        mq.plan(f"org/{SINGLE}")
    assert [record.getMessage() for record in caplog.records] == [
        f"'org/{SINGLE}' is a file here, so it is not looked up on the Hub; pass origin='hub' for that"
    ]


def test_what_is_meant_to_be_on_the_hub_is_not_looked_for_here(shadow, caplog):
    hub = {"origin": "hub"}
    for verb in (
        mq.quantize_from_hub,
        *(partial(v, **hub) for v in (mq.quantize, mq.plan, mq.load, mq.inspect, mq.verify)),
    ):
        with pytest.raises(HubOfflineError, match="'org/model' on the Hub: not in the cache") as caught:
            verb("org/model")
        assert "here" not in str(caught.value)
    assert caplog.records == []
    with pytest.raises(ConfigError, match="origin is 'cloud'; use 'hub' or 'local'"):
        mq.quantize("org/model", origin="cloud")


def test_an_id_that_the_hub_does_not_have_may_be_a_path_with_a_slip(shadow):
    for verb in (mq.quantize, mq.plan, mq.load, mq.inspect, mq.verify):
        with pytest.raises(HubOfflineError, match="There is no folder 'org/modle' here either"):
            verb("org/modle")


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
