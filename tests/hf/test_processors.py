"""A folder has a processor when one of its files says so, and a pipeline gets the parts that it is made of."""

import pytest
import transformers
from models import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers

from mono_quant.hf.processors import load_processor, pipeline

FILES = """tokenizer.json tokenizer_config.json preprocessor_config.json processor_config.json vocab.txt vocab.json
spiece.model tokenizer.model sentencepiece.bpe.model"""


@pytest.mark.parametrize("name", FILES.split())
def test_each_of_these_files_is_reason_enough_to_ask_transformers(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(
        transformers.AutoProcessor,
        "from_pretrained",
        lambda *args, **kwargs: asked.append((args, kwargs)) or "it",
    )
    (tmp_path / "config.json").write_text("{}")
    assert load_processor(tmp_path) is None and asked == []
    (tmp_path / name).write_text("{}")
    assert load_processor(tmp_path) == "it"
    assert asked == [((tmp_path,), {"trust_remote_code": False})]


def test_a_processor_that_transformers_cannot_read_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("no JSON")
    assert load_processor(tmp_path) is None


def tokenizer():
    words = {f"w{i}": i for i in range(200)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0")


def test_a_pipeline_gets_the_task_the_model_and_the_tokenizer():
    model, words = FAMILIES["bert"].build(), tokenizer()
    pipe = pipeline("text-classification", model, words)
    assert (pipe.task, pipe.model, pipe.tokenizer) == ("text-classification", model, words)
    assert pipe("w5 w6")[0]["label"] in model.config.id2label.values()
