"""A model whose weights stay in its files: the same bits, and memory that the system can take back."""

import os
import re
from pathlib import Path

import pytest
import torch
from models import FAMILIES, seeded
from torch import nn
from transformers import BertConfig, BertModel

import mono_quant as mq
from mono_quant import kernels
from mono_quant.errors import ConfigError, CorruptCheckpointError
from mono_quant.io.tensors.checkpoint import open_checkpoint

LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = seeded(lambda: BertModel(BertConfig(**LARGE, vocab_size=2000))).eval()
    return mq.quantize(model, fidelity=False).save(tmp_path_factory.mktemp("mapped") / "int8")


def file_bytes(folder: Path) -> int:
    """Resident bytes of the weight file in this process."""
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    found = re.findall(
        rf"^\S+-\S+ \S+ \S+ \S+ \d+ +{re.escape(str(folder))}/\S+\n(?:\w+:.*\n)*?Rss: +(\d+)",
        smaps,
        re.MULTILINE,
    )
    return sum(map(int, found)) * 1024


def anonymous() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


@torch.no_grad()
def test_it_has_the_bits_of_one_in_memory_and_its_weights_take_no_memory(folder):
    expected = mq.load(folder)
    before = anonymous()
    model = mq.load(folder, mmap=True)
    size = (folder / "model.safetensors").stat().st_size
    assert anonymous() - before < size / 4
    assert all(
        torch.equal(a, b)
        for a, b in zip(expected.state_dict().values(), model.state_dict().values(), strict=True)
    )
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids)[0], expected(ids)[0])


@torch.no_grad()
def test_pages_of_packed_codes_go_back(folder):
    if kernels.environment()["path"] not in ("avx512vnni", "avxvnni"):
        pytest.skip("this processor reads weights as they are")
    model = mq.load(folder, mmap=True)
    if file_bytes(folder) > (folder / "model.safetensors").stat().st_size / 4:
        pytest.skip("this system or file system keeps pages that it is asked to take back")
    ids = torch.arange(1000, 1040).view(2, 20)
    first = model(ids)[0]
    touched = file_bytes(folder)
    held = kernels.bytes_held()
    assert torch.equal(model(ids)[0], first)
    codes = sum(p.nbytes for p in model.state_dict().values() if p.dtype is torch.int8)
    assert kernels.bytes_held() - held >= codes
    assert touched > codes / 2 and file_bytes(folder) < touched - codes / 4
    # they come back when somebody wants them
    again = mq.load(folder)
    for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_writes_stay_in_the_process_and_survive_packing(folder):
    model = mq.load(folder, mmap=True)
    layer = model.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        layer.stored("weight").fill_(3)
        model.embeddings.word_embeddings.weight.zero_()
        x = torch.randn(8, 768, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            layer(x)
    assert (layer.stored("weight") == 3).all()
    untouched = mq.load(folder)
    assert untouched.embeddings.word_embeddings.weight.any()
    assert (untouched.encoder.layer[0].intermediate.dense.stored("weight") != 3).any()
    assert mq.verify(folder)


def test_a_folder_that_is_saved_anew_leaves_the_model_as_it_was(tmp_path):
    make = lambda seed: seeded(lambda: nn.Sequential(nn.Linear(1500, 1500)), seed)
    first = mq.quantize(make(0), fidelity=False)
    folder = first.save(tmp_path / "int8")
    loaded = mq.load(folder, make(1), mmap=True)
    mq.quantize(make(2), fidelity=False).save(folder, overwrite=True)
    x = torch.randn(3, 1500)
    assert torch.equal(loaded(x), first.model(x))


def test_a_file_that_changes_while_it_is_opened_is_refused(folder, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((folder / "model.safetensors").read_bytes())
    with open_checkpoint(tmp_path_only(tmp_path, copy)) as checkpoint:
        name = max(checkpoint.headers, key=lambda name: checkpoint.headers[name].nbytes)
        os.utime(tmp_path / "model.safetensors", (1, 1))
        with pytest.raises(CorruptCheckpointError, match="changed while it was read"):
            checkpoint.mapped(name)


def tmp_path_only(tmp_path: Path, file: Path) -> Path:
    file.rename(tmp_path / "model.safetensors")
    return tmp_path


def test_an_option_that_is_no_bool_is_refused(folder):
    with pytest.raises(ConfigError, match="mmap is 'yes'"):
        mq.load(folder, mmap="yes")


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_families_whose_codes_lie_otherwise_have_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.setattr("mono_quant.io.tensors.checkpoint._OWN_MAPPING", 64)
    family = FAMILIES[name]
    folder = mq.quantize(seeded(family.make).eval(), fidelity=False).save(tmp_path / "int8")
    torch.manual_seed(0)
    inputs = family.inputs()
    with torch.no_grad():
        expected, found = mq.load(folder)(**inputs)[0], mq.load(folder, mmap=True)(**inputs)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_loaded_in_inference_mode_is_a_model_like_any_other(folder, mmap):
    with torch.inference_mode():
        model = mq.load(folder, mmap=mmap)
    # those would not be packed, as a change of them could not be seen, and not be trained
    assert not any(p.is_inference() for p in (*model.parameters(), *model.buffers()))
