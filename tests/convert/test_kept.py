"""What an int8 conversion leaves in float, stored in half precision: which tensors, with which values, and what runs with them."""

import copy
import json

import pytest
import torch
import transformers as hf
from models import FAMILIES, is_plain, relative_error, run, seeded, transformer
from safetensors.torch import load_file
from torch import nn

import mono_quant as mq
from mono_quant.convert.half_layers import HalfEmbedding, HalfLinear, HalfModule
from mono_quant.errors import Fp16RangeError

QUIET = {"fidelity": False}
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
EACH = pytest.mark.parametrize("kept", HALVES)
# one of each way: tables and heads, ties, shared tables with declarations, convolutions, routers, own layout, plain modules
NAMES = ["bert", "llama_tied", "t5", "whisper", "qwen3_moe", "gpt2", "lstm", "cnn"]


def stored(folder):
    return load_file(folder / "model.safetensors")


def rounded(model, names, dtype):
    """A copy of a float model whose named tensors have the values that `dtype` holds."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in twin.named_parameters():
            if name in names:
                tensor.copy_(tensor.to(dtype))
    return twin


def matrices(model, report):
    """The names of what stays float and is more than a vector, as the report has it."""
    kept = {row.name for row in report.rows if row.action == "kept" and not row.is_buffer}
    return {n for n, p in model.named_parameters() if n in kept and p.dim() > 1 and p.numel() > max(p.shape)}


@EACH
@pytest.mark.parametrize("name", NAMES)
def test_matrices_that_stay_are_stored_in_half_precision_and_computed_with_as_before(name, kept, tmp_path):
    family, dtype = FAMILIES[name], HALVES[kept]
    model = family.build()
    plain = mq.quantize(model, **QUIET)
    result = mq.quantize(model, kept=kept, **QUIET)
    narrowed = {row.name for row in result.report.rows if row.narrowed}
    untouched = {
        n for n in model.state_dict() if n.endswith(".wo.weight") and kept == "fp16"
    }  # T5 declares them
    untouched |= {n for n in model.state_dict() if n.endswith("mlp.gate.weight")}
    assert narrowed == matrices(model, plain.report) - untouched and narrowed

    # bytes: others as in the plain file, those rounded once, and the report counts them
    before, after = stored(plain.save(tmp_path / "plain")), stored(result.save(tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {n for n, t in after.items() if t.dtype != before[n].dtype}
    assert changed == narrowed & after.keys()
    for n, tensor in after.items():
        assert torch.equal(tensor, before[n].to(dtype) if n in changed else before[n]), n
    assert result.report.bytes_after == sum(t.nbytes for t in after.values())
    assert plain.report.bytes_after - result.report.bytes_after == sum(
        t.nbytes for n, t in after.items() if n in changed
    )

    # outputs: of the model with rounded weights, in the dtype of the model; loading gives the same bits
    inputs = family.inputs()
    expected = run(mq.quantize(rounded(model, narrowed, dtype), **QUIET).model, inputs)
    out = run(result.model, inputs)
    assert out.dtype == torch.float32 and relative_error(expected, out) < 2e-6
    if kept == "bf16":
        assert torch.equal(out, expected)  # nothing but the tables is computed in another way
    loaded = mq.load(tmp_path / "out", **({"model": family.build} if is_plain(model) else {}))
    assert torch.equal(run(loaded, inputs), out)
    for ours, theirs in zip(result.model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and ours[1].dtype == theirs[1].dtype and torch.equal(ours[1], theirs[1])


@EACH
@pytest.mark.parametrize("name", ["bert", "t5", "whisper"])
def test_the_plan_says_the_same(name, kept):
    model = FAMILIES[name].build()
    for options in ({}, {"embeddings": True}):
        rows = [
            r.to_dict()["rows"]
            for r in (
                mq.plan(model, kept=kept, **options),
                mq.quantize(model, kept=kept, **options, **QUIET).report,
            )
        ]
        known = [
            [{k: v for k, v in row.items() if k not in ("sqnr_db", "gap_db", "flushed")} for row in r]
            for r in rows
        ]
        assert known[0] == known[1] and any(row.get("narrowed") for row in known[0])


def test_the_report_keeps_the_reason_and_says_what_was_done():
    report = mq.quantize(FAMILIES["bert"].build(), kept="fp16", **QUIET).report
    (row,) = [r for r in report.rows if r.name == "bert.embeddings.word_embeddings.weight"]
    assert (row.action, row.dtype_before, row.dtype_after) == ("kept", "float32", "float16")
    assert row.reason == "embedding: int8 only on request (embeddings=True); stored in float16 on request"
    assert (row.bytes_before, row.bytes_after) == (200 * 64 * 4, 200 * 64 * 2)
    again = type(report).from_dict(json.loads(report.to_json()))
    assert again == report


def test_what_is_narrow_already_stays_as_it_is():
    for dtype in (torch.bfloat16, torch.float16):
        model = seeded(lambda d=dtype: hf.LlamaForCausalLM(hf.LlamaConfig(**transformer)).to(d)).eval()
        for kept in HALVES:
            result = mq.quantize(model, kept=kept, **QUIET)
            assert result.report.rows == mq.quantize(model, **QUIET).report.rows
            assert not any(isinstance(m, HalfModule) for m in result.model.modules())


def test_what_lies_in_half_precision_in_memory():
    model = FAMILIES["bert"].build()
    types = {
        kept: {type(m) for m in mq.quantize(model, kept=kept, **QUIET).model.modules()} for kept in HALVES
    }
    assert {HalfEmbedding, HalfLinear} <= types["fp16"] and nn.Embedding not in types["fp16"]
    assert HalfEmbedding in types["bf16"] and HalfLinear not in types["bf16"]
    result = mq.quantize(model, kept="fp16", **QUIET)
    assert sum(p.nbytes for p in result.model.parameters()) == result.report.bytes_after
    wide = mq.quantize(FAMILIES["whisper"].build(), kept="fp16", **QUIET)
    assert any("in memory" in note and "Conv1d" in note for note in wide.report.notes)


def test_a_model_in_float64_answers_in_float64(tmp_path):
    model = FAMILIES["bert"].build().double()
    result = mq.quantize(model, kept="fp16", **QUIET)
    loaded = mq.load(result.save(tmp_path / "out"))
    out = result.model(**FAMILIES["bert"].inputs()).logits
    assert out.dtype == torch.float64 and torch.equal(loaded(**FAMILIES["bert"].inputs()).logits, out)


class Net(nn.Module):
    """A table, a layer that becomes int8, and a head."""

    def __init__(self):
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50)

    def forward(self, x):
        return self.head(self.middle(self.table(x)))


def net(value=None):
    model = seeded(Net).eval()
    if value is not None:
        with torch.no_grad():
            model.table.weight[3, 5] = value
    return model


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("value", [7e4, float("nan"), float("inf")])
def test_a_matrix_that_does_not_fit_stays_as_it_is_and_says_why(value, tmp_path):
    model = net(value)
    result = mq.quantize(model, kept="fp16", **QUIET)
    rows = {row.name: row for row in result.report.rows}
    table, head = rows["table.weight"], rows["head.weight"]
    why = "has values up to 7e+04, which float16 cannot hold" if value == 7e4 else "holds NaN or infinity"
    assert (table.dtype_after, table.narrowed, head.dtype_after) == ("float32", False, "float16")
    assert "not stored in float16" in table.reason and why in table.reason
    file = stored(result.save(tmp_path / "out"))
    assert file["table.weight"].view(torch.int32).equal(model.table.weight.detach().view(torch.int32))
    # bfloat16 has the range of float32
    wide = {row.name: row for row in mq.quantize(model, kept="bf16", **QUIET).report.rows}["table.weight"]
    assert wide.dtype_after == ("bfloat16" if value == 7e4 else "float32")


def test_on_overflow_error_names_the_tensor_and_changes_nothing():
    model = net(1e5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(
        Fp16RangeError, match=r"table\.weight: 1 values do not fit float16 \(largest 100000, limit 65504"
    ):
        mq.quantize(model, kept="fp16", on_overflow="error", inplace=True, **QUIET)
    assert type(model.middle) is nn.Linear
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_becomes_zero_is_counted():
    report = mq.quantize(net(1e-9), kept="fp16", **QUIET).report
    assert {row.name: row.flushed for row in report.rows if row.flushed} == {"table.weight": 1}


class Writer(Net):
    """Its forward writes into its table."""

    def forward(self, x):
        self.table.weight.data[0] += 1
        return super().forward(x)


def test_what_a_forward_writes_into_stays_as_it_is():
    rows = {row.name: row for row in mq.quantize(seeded(Writer).eval(), kept="fp16", probe=IDS).report.rows}
    assert (rows["table.weight"].dtype_after, rows["head.weight"].dtype_after) == ("float32", "float16")


def test_a_lifted_declaration_is_lifted_here_too():
    model = FAMILIES["t5"].build()
    for lifted, dtype in ((["keep_in_fp32", "small"], "int8"), ([], "float32")):
        report = mq.quantize(model, kept="fp16", disable_defaults=lifted, **QUIET).report
        found = {row.dtype_after for row in report.rows if row.name.endswith(".wo.weight")}
        assert found == {dtype}
    report = mq.quantize(model, kept="fp16", skip=["wo"], disable_defaults=["keep_in_fp32"], **QUIET).report
    assert {row.dtype_after for row in report.rows if row.name.endswith(".wo.weight")} == {"float16"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_was_cast_afterwards_is_saved_as_it_is(dtype, tmp_path):
    result = mq.quantize(FAMILIES["bert"].build(), kept="fp16", **QUIET)
    result.model.to(dtype)
    out = run(result.model, FAMILIES["bert"].inputs())
    loaded = mq.load(result.save(tmp_path / "out"))
    assert out.dtype == dtype and torch.equal(run(loaded, FAMILIES["bert"].inputs()), out)


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path):
    for name in ("bert", "whisper", "llama_tied"):
        first = mq.quantize(FAMILIES[name].build(), kept="fp16", embeddings=True, **QUIET).save(
            tmp_path / name
        )
        second = mq.QuantizedModel.from_folder(first).save(tmp_path / f"{name}-again")
        for file in ("model.safetensors", "config.json", "mono_quant.json", "mono_quant_report.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes(), (name, file)


def test_in_place_from_a_folder_and_on_load_as_from_memory(tmp_path):
    model = FAMILIES["bert"].build()
    model.save_pretrained(tmp_path / "float")
    results = [
        mq.quantize(model, kept="fp16", **QUIET),
        mq.quantize(tmp_path / "float", kept="fp16", **QUIET),
        mq.quantize(copy.deepcopy(model), kept="fp16", inplace=True, **QUIET),
    ]
    loaded = type(model).from_pretrained(
        tmp_path / "float", quantization_config=mq.MonoQuantConfig(kept="fp16")
    )
    made = [(r.model, r.report) for r in results] + [(loaded, loaded.mono_quant_report)]
    expected = results[0].model.state_dict()
    for other, report in made:
        assert report.rows == results[0].report.rows
        state = other.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in state.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_narrow_in_the_file_loads_in_another_dtype(dtype, tmp_path):
    family = FAMILIES["bert"]
    result = mq.quantize(family.build(), kept="fp16", **QUIET)
    out = run(mq.load(result.save(tmp_path), dtype=dtype), family.inputs())
    assert out.dtype == dtype
    assert relative_error(run(result.model, family.inputs()), out) <= {torch.float32: 1e-6}.get(dtype, 0.02)


def test_fp16_with_kept_fp16_is_fp16():
    model = FAMILIES["bert"].build()
    assert (
        mq.quantize(model, "fp16", kept="fp16", **QUIET).report == mq.quantize(model, "fp16", **QUIET).report
    )
