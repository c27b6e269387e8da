"""Allowed: see the room of this name."""

import pytest
from folders import BAD, listing

from mono_quant.errors import (
    OutputError,
)
from mono_quant.io.disk.allowed import is_allowed
from mono_quant.io.disk.output import new_folder

GOOD_NAMES = """config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
added_tokens.json vocab.txt vocab.json merges.txt spiece.model tokenizer.model sentencepiece.bpe.model
qwen.tiktoken normalizer.json preprocessor_config.json processor_config.json video_preprocessor_config.json
chat_template.jinja chat_template.json additional_chat_templates/tool_use.jinja modules.json
config_sentence_transformers.json sentence_bert_config.json sentence_xlnet_config.json 1_Pooling/config.json
2_Dense/config.json 2_Dense/model.safetensors LICENSE LICENSE.txt LICENSE.md license NOTICE NOTICE.txt
USE_POLICY.md README.md mono_quant.json mono_quant_report.json model.safetensors
model-00001-of-00003.safetensors model.safetensors.index.json"""


@pytest.mark.parametrize("name", GOOD_NAMES.split())
def test_model_files_are_allowed(name):
    assert is_allowed(name)


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused(name, tmp_path):
    assert not is_allowed(name)
    with (
        pytest.raises(
            OutputError,
            match=r"may not be written: it is not a model file; see mono_quant\.io\.disk\.allowed",
        ),
        new_folder(tmp_path / "out") as folder,
    ):
        folder.write_bytes(name, b"")
    assert listing(tmp_path) == []
