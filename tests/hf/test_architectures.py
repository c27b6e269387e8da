"""config.json has to name one class of transformers, as a list of words."""

from pathlib import Path

import pytest
import transformers as hf
from models import transformer

from mono_quant.errors import UnsupportedModelError
from mono_quant.hf.models import model_class

LLAMA = {"model_type": "llama", **transformer}


@pytest.mark.parametrize(
    "names", [None, [], "LlamaForCausalLM", ("LlamaForCausalLM",), [3], ["LlamaForCausalLM", 3]]
)
def test_anything_else_names_no_class(names):
    with pytest.raises(
        UnsupportedModelError, match=r"saved: config\.json names no architecture \(architectures is "
    ):
        model_class(LLAMA | {"architectures": names}, Path("saved"), trust_remote_code=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["LlamaConfig"]},
        {"model_type": "no_such_type"},
        {"model_type": None},
        {"model_type": ["llama"]},
    ],
)
def test_a_class_or_a_type_that_transformers_does_not_know_is_named(changes):
    raw = LLAMA | {"architectures": ["LlamaForCausalLM"]} | changes
    with pytest.raises(
        UnsupportedModelError, match=rf"has no model class {raw['architectures'][0]} \(model_type "
    ):
        model_class(raw, Path("saved"), trust_remote_code=False)


def test_the_first_one_counts():
    raw = LLAMA | {"architectures": ["LlamaModel", "LlamaForCausalLM"]}
    cls, config = model_class(raw, Path("saved"), trust_remote_code=False)
    assert cls is hf.LlamaModel and config.vocab_size == transformer["vocab_size"]
