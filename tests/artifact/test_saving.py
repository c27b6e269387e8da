"""A saved model: what is damaged or foreign is refused with its own error, what is sound comes back bit for bit."""

import errno
import shutil

import pytest
import tokenizers
import torch
import transformers as hf
from models import FAMILIES, Cnn, Lstm, is_plain, relative_error, run, seeded, snapshot, tiny_llama
from safetensors.torch import load_file
from saved import EACH, INDEX, KINDS, MANIFEST, QUIET, WEIGHTS, factory, read, saved_once
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import mono_quant as mq
from mono_quant.artifact import inspection
from mono_quant.errors import (
    ConfigError,
    MonoQuantError,
    OutputExistsError,
    OutputWriteError,
)
from mono_quant.io.disk import disk


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@EACH
def test_shards_come_back_bit_for_bit(base, name, dtype, tmp_path):
    inputs = FAMILIES[name].inputs()
    result = mq.quantize(FAMILIES[name].build(), dtype, **QUIET)
    limit = result.report.bytes_after // 4
    folder = result.save(tmp_path / "out", max_shard_size=limit)
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) > 2 and not (folder / WEIGHTS).exists()
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = read(folder / INDEX)
    tensors = {n: (p, t) for p in shards for n, t in load_file(folder / p).items()}
    assert index["weight_map"] == {n: p for n, (p, _) in tensors.items()}
    assert (
        index["metadata"]["total_size"]
        == sum(t.nbytes for _, t in tensors.values())
        == result.report.bytes_after
    )
    for shard in shards:
        sizes = [t.nbytes for p, t in tensors.values() if p == shard]
        assert sum(sizes) <= limit or len(sizes) == 1
    assert torch.equal(run(mq.load(folder, model=factory(name)), inputs), run(result.model, inputs))
    if name == "llama":
        theirs = hf.LlamaForCausalLM.from_pretrained(folder)
        assert relative_error(run(result.model, inputs), run(theirs, inputs)) < 0.05


@pytest.mark.parametrize("size", [0, -1, "many", "", "5XB"])
def test_a_shard_size_that_is_none_is_refused_and_nothing_is_written(size, tmp_path):
    result = mq.quantize(seeded(Lstm), **QUIET)
    with pytest.raises(ConfigError, match="max_shard_size is"):
        result.save(tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_a_save_replaces_the_whole_old_folder_or_nothing(tmp_path):
    result = mq.quantize(tiny_llama(), **QUIET)
    folder = result.save(tmp_path / "out", max_shard_size=30_000)
    old = snapshot(folder)
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        result.save(folder)
    assert snapshot(folder) == old
    result.save(folder, overwrite=True)
    assert [p.name for p in folder.glob("*.safetensors*")] == [WEIGHTS]
    assert mq.load(folder)


def test_a_loaded_model_is_not_saved_over_what_it_was_loaded_from(base, tmp_path):
    folder = shutil.copytree(saved_once(base, "llama"), tmp_path / "saved")
    before = snapshot(folder)
    loaded = mq.QuantizedModel.from_folder(folder)
    with pytest.raises(MonoQuantError):
        loaded.save(folder, overwrite=True)
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["llama"])
def test_save_pretrained_writes_what_save_writes(folder, name, tmp_path):
    mq.load(folder).save_pretrained(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(folder)


WRITES = [name for name in vars(disk._Ops) if not name.startswith("_")]


class Failing(disk._Ops):
    """Counts the operations and lets the k-th one fail; without real fsync, which would take minutes."""

    def __init__(self, fail_at=0, error=None):
        self.calls, self.fail_at, self.error = [], fail_at, error
        for name in WRITES:
            setattr(self, name, self._wrap(name, getattr(super(), name)))

    def _wrap(self, name, real):
        def call(*arguments):
            self.calls.append(name)
            strikes = len(self.calls) == self.fail_at
            if strikes and name != "close":
                raise self.error
            result = None if name == "fsync" else real(*arguments)
            if strikes:
                raise self.error
            return result

        return call


def small_bert():
    """With a tokenizer in memory, so that somebody else's writing is among the operations."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "a", "b"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
    return mq.quantize(FAMILIES["bert"].build(), processor=tokenizer, **QUIET)


def small_module():
    return mq.quantize(seeded(Lstm), **QUIET)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("old", [False, True], ids=["fresh", "overwrite"])
@pytest.mark.parametrize("make", [small_module, small_bert])
def test_a_save_that_fails_anywhere_leaves_nothing_the_old_or_the_new(
    tmp_path, monkeypatch, make, old, error
):
    monkeypatch.setattr(disk, "_ops", Failing())
    result, older = make(), mq.quantize(seeded(Cnn), **QUIET)
    new = snapshot(result.save(tmp_path / "new", max_shard_size=40_000))
    out = tmp_path / "base" / "out"
    out.parent.mkdir()

    def prepare():
        shutil.rmtree(out, ignore_errors=True)
        if old:
            older.save(out)

    prepare()
    before = snapshot(out)
    ops = Failing()
    monkeypatch.setattr(disk, "_ops", ops)
    result.save(out, max_shard_size=40_000, overwrite=True)
    total = len(ops.calls)
    assert total > 30
    for k in range(1, total + 1):
        monkeypatch.setattr(disk, "_ops", Failing())
        prepare()
        ops = Failing(k, error)
        monkeypatch.setattr(disk, "_ops", ops)
        failed = False
        try:
            result.save(out, max_shard_size=40_000, overwrite=True)
        except (OutputWriteError, KeyboardInterrupt):
            failed = True
        where = f"operation {k}, {ops.calls[k - 1]}"
        assert snapshot(out) in ((before, new) if failed else (new,)), where
        assert [p.name for p in out.parent.iterdir() if p != out] == [], where
        assert failed or ops.calls[k - 1] == "remove_tree", where
    monkeypatch.setattr(disk, "_ops", Failing())
    prepare()
    assert snapshot(result.save(out, max_shard_size=40_000, overwrite=True)) == new


def test_a_save_that_fails_leaves_the_result_usable(tmp_path, monkeypatch):
    result = small_bert()
    inputs = FAMILIES["bert"].inputs()
    expected = run(result.model, inputs)
    monkeypatch.setattr(disk, "_ops", Failing(9, OSError(errno.ENOSPC, "full")))
    with pytest.raises(OutputWriteError, match=r"full|space"):
        result.save(tmp_path / "out")
    monkeypatch.undo()
    assert torch.equal(run(result.model, inputs), expected)
    assert torch.equal(run(mq.load(result.save(tmp_path / "out")), inputs), expected)


def test_every_family_is_of_one_of_the_kinds_tested_here():
    assert {is_plain(FAMILIES[n].build()) for n in KINDS} == {True, False}
    assert {f.layout for f in FAMILIES.values()} == {FAMILIES[n].layout for n in KINDS}


MOE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
SHARED = {"intermediate_size": 128, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def granite():
    """Its experts lie in one tensor in the file too, under another name."""
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**MOE, **SHARED, num_local_experts=4))


def qwen2_moe():
    """Its experts are one tensor in memory and one matrix each in the file."""
    sizes = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 64, "num_experts": 4}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**MOE, **SHARED, **sizes))


def llama4():
    """Its experts are of a layout that stays in float."""
    sizes = {"intermediate_size_mlp": 128, "num_local_experts": 4, "head_dim": 16}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**MOE, **SHARED | {"num_experts_per_tok": 1}, **sizes))


def dinov2():
    """transformers splits one tensor of the file into two layers."""
    sizes = {k: v for k, v in MOE.items() if k != "vocab_size"}
    return hf.Dinov2Model(hf.Dinov2Config(**sizes, image_size=32, patch_size=8, use_swiglu_ffn=True))


@pytest.mark.parametrize(
    ("make", "skip"),
    [(granite, []), (qwen2_moe, ["experts"]), (llama4, []), (dinov2, [])],
    ids=["granite", "qwen2 without experts", "llama4", "dinov2"],
)
def test_what_transformers_cannot_load_beside_int8_is_written_in_our_own_layout(
    make, skip, tmp_path, monkeypatch
):
    model = seeded(make).eval()
    result = mq.quantize(model, skip=skip, disable_defaults=["small"], **QUIET)
    folder = result.save(tmp_path / "out")
    assert inspection.verify(folder) and read(folder / MANIFEST)["layout"] == "mono_quant"
    assert "library_name: mono_quant" in (folder / "README.md").read_text()
    loaded = mq.load(folder)
    if make is dinov2:
        x = {"pixel_values": seeded(lambda: torch.randn(2, 3, 32, 32))}
    else:
        x = {"input_ids": torch.arange(12).view(2, 6)}
    with torch.no_grad():
        ours, theirs, original = (m(**x)[0] for m in (result.model, loaded, model))
    assert torch.equal(ours, theirs) and relative_error(original, ours) < 0.05
    # with mono_quant imported, transformers itself can; without, it stops at the shape
    with torch.no_grad():
        at_home = type(model).from_pretrained(folder)(**x)[0]
    torch.testing.assert_close(at_home, theirs, rtol=0, atol=1e-6)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "mono_quant")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        type(model).from_pretrained(folder)
