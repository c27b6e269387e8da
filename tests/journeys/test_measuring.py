"""Measuring changes nothing: whatever a forward writes is put back, and a weight that it writes stays in float."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import transformers as hf
from models import relative_error, seeded
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import mono_quant as mq
from mono_quant.artifact.facts import Manifest
from mono_quant.artifact.publishing import check_loads
from mono_quant.errors import ConfigError, FrozenWeightError

DTYPES = ("int8", "fp16")
REASON = "writes into it"
SIZES = {"vocab_size": 200, "d_model": 64}


def rwkv(**changes):
    sizes = {"hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    options = {"vocab_size": 200, "context_length": 64, "rescale_every": 1} | changes
    return hf.RwkvForCausalLM(hf.RwkvConfig(**sizes, **options))


def switch():
    layers = {
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    }
    sizes = {"d_kv": 16, "d_ff": 128, "num_heads": 4, "num_experts": 4, "expert_capacity": 64}
    config = hf.SwitchTransformersConfig(**SIZES, **layers, **sizes, decoder_start_token_id=0)
    return hf.SwitchTransformersForConditionalGeneration(config)


def nllb_moe():
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128), ("sparse_step", 2))
    }
    options = {
        "num_experts": 4,
        "expert_capacity": 64,
        "decoder_start_token_id": 2,
        "max_position_embeddings": 64,
    }
    return hf.NllbMoeForConditionalGeneration(hf.NllbMoeConfig(**SIZES, **sides, **options))


class Plain(nn.Module):
    """Two layers of which the first is written into."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def constrain(self):
        raise NotImplementedError

    def forward(self, x):
        self.constrain()
        return self.second(torch.relu(self.first(x)))


class Clamped(Plain):
    def constrain(self):
        with torch.no_grad():
            self.first.weight.clamp_(-0.05, 0.05)


class ClampedData(Plain):
    def constrain(self):
        self.first.weight.data[:32].clamp_(-0.05, 0.05)


class Renormed(Plain):
    """The constraint of EEGNet."""

    def constrain(self):
        layer = self.first
        layer.weight.data = torch.renorm(layer.weight.data, p=2, dim=0, maxnorm=0.2)


class Shrinking(Plain):
    """Every call halves the weight, through a helper."""

    def constrain(self):
        halve(self.first.weight)


def halve(weight):
    with torch.no_grad():
        weight *= 0.5


class Unforeseen(Plain):
    """What only a run can show."""

    def constrain(self):
        for name in vars(self)["_modules"]:
            if name == "fir" + "st":
                self.get_submodule(name).weight.data.mul_(0.5)


class ActNorm(nn.Module):
    """Takes its scale from the first batch that it sees, and remembers that in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(64)), nn.Parameter(torch.zeros(64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.initialised = False

    def forward(self, x):
        if not self.initialised:
            self.scale.data.copy_(1 / x.std(0))
            self.shift.data.copy_(-x.mean(0))
            self.initialised = True
        self.seen += 1
        return (x + self.shift) * self.scale


class Flow(nn.Module):
    """Everything that a forward may leave behind, beside weights."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.bn = ActNorm(), nn.Linear(64, 64), nn.BatchNorm1d(64)
        self.calls, self.kept, self.table = 0, [], {"a": [1]}
        self.noise = torch.Generator().manual_seed(7)
        self.counts = numpy.zeros(2)
        self.last = torch.zeros(64)

    def forward(self, x):
        self.calls += 1
        self.kept.append(x.sum())
        self.table["a"].append(2)
        self.table["b"] = self.fc.weight
        self.counts += 1
        self.new = self.last.add_(x[0])
        x = x + 0.01 * torch.rand(64, generator=self.noise)
        x = x + 0.01 * (torch.rand(64) + random.random() + numpy.random.rand())  # noqa: NPY002
        # a batch norm that keeps on learning says so in no schema
        x = nn.functional.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)
        self.fc.requires_grad_(False)
        self.bn.train()
        return self.fc(self.norm(x))


@dataclass(frozen=True)
class Case:
    """A model, what it is measured with, and the weights that its forward writes into."""

    make: Callable[[], nn.Module]
    written: tuple[str, ...] = ()
    probed: bool = True

    def build(self):
        return seeded(self.make).eval()

    def probe(self) -> Any:
        return seeded(lambda: torch.randn(16, 64), 1) if self.probed else None


ROUTED = ("switch", "nllb_moe")
CASES = {
    "rwkv": Case(
        rwkv,
        tuple(
            f"rwkv.blocks.{i}.{name}.weight"
            for i in range(3)
            for name in ("attention.output", "feed_forward.value")
        ),
        probed=False,
    ),
    "switch": Case(
        switch,
        (
            "encoder.block.1.layer.1.mlp.router.classifier.weight",
            "decoder.block.1.layer.2.mlp.router.classifier.weight",
        ),
        probed=False,
    ),
    "nllb_moe": Case(
        nllb_moe,
        tuple(f"model.{side}.layers.1.ffn.router.classifier.weight" for side in ("encoder", "decoder")),
        probed=False,
    ),
    "clamped": Case(Clamped, ("first.weight",)),
    "data": Case(ClampedData, ("first.weight",)),
    "renormed": Case(Renormed, ("first.weight",)),
    "shrinking": Case(Shrinking, ("first.weight",)),
    "unforeseen": Case(Unforeseen, ("first.weight",)),
    "flow": Case(Flow),
}
EVERY = pytest.mark.parametrize("name", CASES)
BOTH = pytest.mark.parametrize("dtype", DTYPES)


def held(model):
    """Everything that a model holds, by value and by identity; tensors as bytes."""
    return {
        name: {key: plain(value) for key, value in vars(module).items() if key != "_modules"}
        for name, module in model.named_modules()
    }


def plain(value):
    if isinstance(value, torch.Tensor):
        raw = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), value.requires_grad, raw
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, numpy.ndarray):
        return value.tolist()
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        # hooks, by the numbers of their handles
        return [type(v) for v in value.values()]
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, set, type(None))) else type(value)


def identities(model):
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(t), t.data_ptr(), t.dtype) for name, t in tensors], [
        (n, id(m)) for n, m in model.named_modules()
    ]


def random_states():
    kind, keys, *rest = numpy.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), *rest)


@functools.cache
def measured(name, dtype, inplace=False):
    """A measured conversion, with what was there before and after it."""
    case = CASES[name]
    model = case.build()
    before, same, states = held(model), identities(model), random_states()
    result = mq.quantize(model, dtype, probe=case.probe(), inplace=inplace)
    assert result.report.fidelity is not None, result.report.fidelity_note
    after = held(model), identities(model), random_states()
    return SimpleNamespace(**locals())


@functools.cache
def unmeasured(name, dtype):
    # what only a run shows is not known here
    skip = ["first"] if name == "unforeseen" else []
    return mq.quantize(CASES[name].build(), dtype, fidelity=False, skip=skip)


@BOTH
@EVERY
def test_the_original_and_the_random_states_are_as_before(name, dtype):
    m = measured(name, dtype)
    assert m.after == (m.before, m.same, m.states)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@BOTH
@EVERY
def test_a_measured_result_is_the_one_that_was_not_measured(name, dtype, inplace):
    assert held(measured(name, dtype, inplace).result.model) == held(unmeasured(name, dtype).model)


@BOTH
def test_a_forward_that_fails_leaves_nothing_behind(dtype):
    class Failing(Flow):
        def forward(self, x):
            super().forward(x)
            self.fc.weight.data.zero_()
            raise ValueError("in the middle")

    model = seeded(Failing).train()
    probe = seeded(lambda: torch.randn(16, 64))
    before, same, states = held(model), identities(model), random_states()
    with pytest.raises(ConfigError, match="in the middle"):
        mq.quantize(model, dtype, probe=probe)
    assert (held(model), identities(model), random_states()) == (before, same, states)


@BOTH
@EVERY
def test_a_weight_that_the_forward_writes_into_stays_in_float(name, dtype):
    report = measured(name, dtype).result.report
    rows = {row.name: row for row in report.rows}
    for weight in CASES[name].written:
        assert rows[weight].action == "kept" and rows[weight].dtype_after == "float32", weight
        # where int8 keeps a router anyway, that is the reason it names
        assert REASON in rows[weight].reason or (name in ROUTED and dtype == "int8")
    assert report.quantized


@BOTH
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.written and n != "unforeseen"])
def test_what_the_code_shows_is_known_without_a_run(name, dtype):
    reports = (
        mq.plan(CASES[name].build(), dtype),
        unmeasured(name, dtype).report,
        measured(name, dtype).result.report,
    )
    kept = [{(row.name, row.reason) for row in report.rows if row.action == "kept"} for report in reports]
    assert kept[0] == kept[1] == kept[2]
    assert set(CASES[name].written) <= {row for row, _ in kept[0]}


@BOTH
def test_the_verb_without_a_report_keeps_the_weight_too(dtype):
    model, probe = CASES["shrinking"].build(), CASES["shrinking"].probe()
    converted, skipped = mq.dynamic_quantize(model, dtype)
    assert "first" in skipped
    expected = [model(probe) for _ in range(3)]
    assert all(relative_error(y, converted(probe)) < 0.02 for y in expected)


@BOTH
def test_a_write_that_nothing_showed_is_an_error_and_not_lost(dtype):
    converted, _ = mq.dynamic_quantize(CASES["unforeseen"].build(), dtype)
    with pytest.raises(FrozenWeightError, match="what is written into it would be lost"):
        converted(CASES["unforeseen"].probe())


# --- RWKV, which divides weights when it is first run in evaluation mode and multiplies them back for training

IDS = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(1))
WRITTEN = [weight.removesuffix(".weight") for weight in CASES["rwkv"].written]


def already_run(model):
    model(input_ids=torch.tensor([[1, 2, 3]]))
    return model


def trained_between(model):
    model.eval()(input_ids=torch.tensor([[1, 2, 3]]))
    model.train()(input_ids=torch.tensor([[1, 2, 3]]))
    return model.eval()


convert = functools.partial(mq.quantize, fidelity=False)


def saved(model, dtype, folder):
    convert(model, dtype).save(folder)
    return mq.load(folder)


def saved_after_a_run(model, dtype, folder):
    result = convert(model, dtype)
    already_run(result.model)
    result.save(folder)
    return mq.load(folder)


def from_a_folder(model, dtype, folder):
    model.save_pretrained(folder)
    return convert(folder, dtype).model


ROADS = {
    "quantize": lambda model, dtype, folder: mq.quantize(model, dtype).model,
    "unmeasured": lambda model, dtype, folder: convert(model, dtype).model,
    "inplace": lambda model, dtype, folder: mq.quantize(model, dtype, inplace=True).model,
    "dynamic": lambda model, dtype, folder: mq.dynamic_quantize(model, dtype)[0],
    "run before": lambda model, dtype, folder: convert(already_run(model), dtype).model,
    "run before, saved": lambda model, dtype, folder: saved(already_run(model), dtype, folder),
    "switched": lambda model, dtype, folder: trained_between(convert(model, dtype).model),
    "in training": lambda model, dtype, folder: convert(model.train(), dtype).model.eval(),
    "saved": saved,
    "saved after a run": saved_after_a_run,
    "folder": from_a_folder,
}


@functools.cache
def without_rescaling(dtype):
    model, twin = seeded(rwkv), seeded(lambda: rwkv(rescale_every=0)).eval()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with torch.no_grad():
        return mq.quantize(twin, dtype, skip=WRITTEN, fidelity=False).model(input_ids=IDS).logits


# float16 goes the roads that int8 goes; the file is another
TRIED = [(road, "int8") for road in ROADS] + [
    (road, "fp16") for road in ("dynamic", "saved after a run", "folder")
]


@pytest.mark.parametrize(("road", "dtype"), TRIED, ids=["-".join(t) for t in TRIED])
def test_rwkv_answers_as_if_it_never_rescaled(road, dtype, tmp_path):
    """Powers of two change no code: without rescaling the same layers give the same answer, but for a norm's epsilon."""
    with torch.no_grad():
        output = ROADS[road](seeded(rwkv).eval(), dtype, tmp_path / "model")(input_ids=IDS).logits
    assert relative_error(without_rescaling(dtype), output) < 1e-3


@BOTH
def test_a_saved_rwkv_loads_as_what_it_is_in_memory(tmp_path, dtype):
    result = convert(seeded(rwkv).eval(), dtype)
    already_run(result.model)
    before = held(result.model)
    result.save(tmp_path / "model")
    # what a push compares
    check_loads(tmp_path / "model", Manifest.read(tmp_path / "model"), result.model)
    assert held(result.model) == before
    loaded = already_run(mq.load(tmp_path / "model"))
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in result.model.state_dict().items())


@pytest.mark.parametrize("name", ["switch", "nllb_moe"])
def test_a_router_that_casts_itself_is_saved_as_it_is_loaded(name, tmp_path):
    result = measured(name, "fp16").result
    result.save(tmp_path / "model")
    loaded, expected = mq.load(tmp_path / "model").state_dict(), result.model.state_dict()
    assert {n: t.dtype for n, t in loaded.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(t, loaded[n]) for n, t in expected.items())


# --- what is measured with


def words():
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "the": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=48, pad_id=0, pad_token="[PAD]")
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def test_the_tokenizer_is_as_before():
    tokenizer = words()
    before = tokenizer.backend_tokenizer.to_str()
    model = seeded(
        lambda: hf.BertModel(
            hf.BertConfig(
                vocab_size=200,
                hidden_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=128,
            )
        )
    )
    report = mq.quantize(model, processor=tokenizer).report
    assert report.fidelity["probe"] == "12 built-in sentences"
    assert tokenizer.backend_tokenizer.to_str() == before
