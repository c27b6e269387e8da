"""What tests of artifact share."""

import functools
import json

import pytest
from models import FAMILIES

import mono_quant as mq

QUIET = {"fidelity": False}
WEIGHTS, MANIFEST, INDEX = "model.safetensors", "mono_quant.json", "model.safetensors.index.json"

# one of each layout and kind
KINDS = {"llama": "standard", "mixtral": "standard, experts", "gpt2": "own", "cnn": "plain module"}
EACH = pytest.mark.parametrize("name", KINDS)


@functools.cache
def saved_once(base, name):
    return mq.quantize(FAMILIES[name].build(), **QUIET).save(base / name)


def factory(name):
    return FAMILIES[name].build if name == "cnn" else None


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))
