"""One recipe from a source to a folder and a repository: looked at first, then worked, and a failure says what is there."""

from pathlib import Path

import pytest
from models import tiny_llama

import mono_quant
from mono_quant.api.delivery import after_saving
from mono_quant.errors import ConfigError, HubConflictError, Option
from mono_quant.sources.opening import preview
from mono_quant.sources.source import Access


@pytest.fixture(scope="module")
def result() -> mono_quant.QuantizedModel:
    return mono_quant.quantize(tiny_llama(), fidelity=False)


@pytest.fixture(scope="module")
def saved(result: mono_quant.QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("saved") / "model")


def test_an_option_that_no_push_has_is_named(result: mono_quant.QuantizedModel) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown option 'overwite' of a push; the options are private, overwrite"
    ):
        result.push_to_hub("ann/x", overwite=True)
    with pytest.raises(ConfigError, match=r"The commit message is empty"):
        result.push_to_hub("ann/x", commit_message=" \n ")


def test_a_push_that_fails_after_saving_says_where_the_model_is_and_keeps_its_options() -> None:
    with pytest.raises(HubConflictError) as caught, after_saving(Path("out"), "ann/x"):
        raise HubConflictError("No; pass ", Option("overwrite", True), ".")
    assert str(caught.value) == (
        "No; pass overwrite=True. The model itself is saved in out; push it from there: mono-quant push out ann/x"
    )
    assert caught.value.options == (Option("overwrite", True),)
    with pytest.raises(HubConflictError, match=r"^No$"), after_saving(None, "ann/x"):
        raise HubConflictError("No")


@pytest.mark.parametrize(
    ("folder", "notes"), [(None, []), (Path("out"), ["the model is saved in out"])], ids=["unsaved", "saved"]
)
def test_an_interrupted_push_is_noted(folder: Path | None, notes: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, after_saving(folder, "ann/x"):
        raise KeyboardInterrupt
    assert caught.value.__notes__ == [*notes, "look at ann/x on the Hub: its files are all new or all old"]


def test_what_is_known_of_a_folder_before_its_weights_are_read(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "LICENSE").write_text("terms\n")
    (tmp_path / "llama" / "README.md").write_text("---\nlicense: mit\n---\n")
    known = preview(str(tmp_path / "llama"))
    assert known.origin.repo_id is None
    assert known.origin.card.license == "mit"
    assert set(known.side_files) == {"LICENSE"}
    # as `git hash-object` says
    assert known.side_files["LICENSE"].blob_id == "e57d9e0d37e35129576d79759c7d7219466764ae"
    assert known.rewritten == ("config.json",)
    assert preview(model).side_files == {}
    assert preview(tmp_path / "nowhere").side_files == {}
    with pytest.raises(
        ConfigError, match="is a local folder, which has no revision 'main'; leave it out, or give a Hub id"
    ):
        preview(tmp_path / "llama", Access("main"))
    with pytest.raises(ConfigError, match="the source is a model in memory, which has no revision 'main'"):
        mono_quant.quantize(model, revision="main")


def test_a_saved_folder_is_inspected_and_verified_by_public_verbs(
    result: mono_quant.QuantizedModel, saved: Path
) -> None:
    seen = mono_quant.inspect(saved)
    assert seen.quantized == {row.name: row.shape for row in result.report.quantized}
    assert seen.reasons["lm_head.weight"].startswith("output head")
    assert mono_quant.inspect(str(saved)).to_dict() == seen.to_dict()
    assert mono_quant.verify(saved)[-1] == "loads as LlamaForCausalLM"
    with pytest.raises(ConfigError, match="which has no revision 'main'"):
        mono_quant.inspect(saved, revision="main")
    with pytest.raises(ConfigError, match="which has no revision 'main'"):
        mono_quant.load(saved, revision="main")
