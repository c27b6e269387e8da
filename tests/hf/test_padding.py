"""A batch of unlike texts in parts: every token that is no padding has the bits that it has in the batch as a whole."""

import copy
import itertools
import pickle

import encoders
import pytest
import torch
import transformers as hf
from encoders import BERT, DEEP, ENCODERS, WIDE, transformer
from models import relative_error
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import mono_quant as mq
from mono_quant.hf.padding import _CALL_COST, in_parts, parts_of

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
LENGTHS = (3, 30, 5, 29, 4, 3, 28, 12, 3, 30, 4, 4)
TEXTS = [" ".join(f"w{(7 * i + j) % 900}" for j in range(length)) for i, length in enumerate(LENGTHS)]
# lets batches of these few tokens fall into parts
CHEAP = 4


@pytest.fixture
def calls(monkeypatch):
    """The shapes for which transformers of encoders were called."""
    monkeypatch.setattr("mono_quant.hf.padding._CALL_COST", CHEAP)
    seen = []
    forward = Transformer.forward

    def noted(self, features, **options):
        seen.append(tuple(features["input_ids"].shape))
        return forward(self, features, **options)

    monkeypatch.setattr(Transformer, "forward", noted)
    return seen


def whole(model, features):
    """What the modules give for the batch as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mono_quant.hf.padding._parts_for", lambda *_: None)
        return model(features)


def converted(model):
    return mq.quantize(model, fidelity=False).model


def embedder(make, **options):
    first = transformer(make, **options)
    return SentenceTransformer(modules=[first, Pooling(first.get_embedding_dimension())], device="cpu").eval()


FAMILIES = {
    "bert": lambda: hf.BertModel(BERT),
    "roberta": lambda: hf.XLMRobertaModel(
        hf.XLMRobertaConfig(**WIDE, **DEEP, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    ),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**WIDE, **DEEP, pad_token_id=0)),
    "deberta": lambda: hf.DebertaV2Model(
        hf.DebertaV2Config(
            **WIDE, **DEEP, relative_attention=True, pos_att_type=["c2p", "p2c"], pad_token_id=0
        )
    ),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(**WIDE, **DEEP, pad_token_id=0, global_attn_every_n_layers=2, local_attention=8)
    ),
    "t5": lambda: hf.T5EncoderModel(
        hf.T5Config(vocab_size=1000, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    ),
    "qwen3": lambda: hf.Qwen3Model(hf.Qwen3Config(**WIDE, **DEEP, num_key_value_heads=2, head_dim=16)),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_is_no_padding_keeps_its_bits(name, calls):
    torch.manual_seed(0)
    model = converted(embedder(FAMILIES[name]))
    features = model.preprocess(TEXTS)
    mask = features["attention_mask"].bool()
    expected = whole(model, dict(features))
    assert len(calls) == 1
    found = model(dict(features))
    assert len(calls) > 2 and sum(rows for rows, _ in calls[1:]) == len(TEXTS)
    assert sum(rows * length for rows, length in calls[1:]) < mask.numel() * 0.7
    if name in ("mpnet", "deberta"):
        # attention of torch: another order of sums, and with it now and then the next code of an activation
        assert relative_error(found["token_embeddings"][mask], expected["token_embeddings"][mask]) < 2e-3
        return
    assert torch.equal(found["token_embeddings"][mask], expected["token_embeddings"][mask])
    torch.testing.assert_close(found["sentence_embedding"], expected["sentence_embedding"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_kind_of_encoder_answers_as_in_one_call(name, calls):
    torch.manual_seed(0)
    model = converted(ENCODERS[name]())
    ask = model.predict if isinstance(model, CrossEncoder) else model.encode
    given = [(text, text) for text in TEXTS] if isinstance(model, CrossEncoder) else TEXTS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mono_quant.hf.padding._parts_for", lambda *_: None)
        expected = torch.as_tensor(ask(given, convert_to_tensor=True)).to_dense()
    calls.clear()
    found = torch.as_tensor(ask(given, convert_to_tensor=True)).to_dense()
    # a convolution over tokens sees padding
    assert (len(calls) == 1) == (name == "cnn")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_a_batch_stays_whole_where_parts_would_differ(calls):
    model = embedder(FAMILIES["bert"])
    features = model.preprocess(TEXTS)
    model(dict(features))
    assert len(calls) == 1, "it is not converted"
    model = converted(model)
    behind = dict(features)
    behind["attention_mask"] = features["attention_mask"].flip(1)
    bias = {**features, "attention_mask": features["attention_mask"] * 2}
    more = {**features, "pixels": torch.zeros(len(TEXTS), 3, 4, 4)}
    for given in (behind, bias, {k: v[:1] for k, v in features.items() if torch.is_tensor(v)}):
        model(given)
    model[0](more)
    model.train()(dict(features))
    model.eval()
    model[0].auto_model.config.output_hidden_states = True
    assert "all_layer_embeddings" in model(dict(features))
    model[0].auto_model.config.output_hidden_states = False
    assert {rows for rows, _ in calls} <= {len(TEXTS), 1} and len(calls) == 7
    model(dict(features))
    assert len(calls) > 8

    mixing = converted(
        embedder(lambda: hf.FNetModel(hf.FNetConfig(**WIDE, num_hidden_layers=2, tpu_short_seq_length=32)))
    )
    calls.clear()
    mixing.encode(TEXTS)
    assert len(calls) == 1, "FNet mixes padding into every token"


class LessTheirMean(torch.nn.Module):
    """Somebody's own module behind an encoder, which looks at all texts of a batch."""

    def forward(self, features, **_):
        given = features["sentence_embedding"]
        return {**features, "sentence_embedding": given - given.mean(0)}


@torch.no_grad()
def test_a_batch_stays_whole_for_modules_that_nobody_knows(calls):
    model = converted(SentenceTransformer(modules=[*embedder(FAMILIES["bert"]), LessTheirMean()]).eval())
    features = model.preprocess(TEXTS)
    found = model(dict(features))["sentence_embedding"]
    assert len(calls) == 1
    torch.testing.assert_close(found.mean(0), torch.zeros(64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool])
@torch.no_grad()
def test_a_mask_may_have_another_dtype(dtype, calls):
    model = converted(embedder(FAMILIES["bert"]))
    features = model.preprocess(TEXTS)
    expected = model(dict(features))["sentence_embedding"]
    assert len(calls) > 1
    calls.clear()
    found = model({**features, "attention_mask": features["attention_mask"].to(dtype)})
    assert len(calls) > 1
    torch.testing.assert_close(found["sentence_embedding"].float(), expected, rtol=1e-3, atol=1e-3)


def test_copies_pickles_and_compiled_encoders_do_it_too(calls):
    model = converted(encoders._embedder(Pooling(64)))
    expected = model.encode(TEXTS, convert_to_tensor=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(twin.encode(TEXTS, convert_to_tensor=True), expected)
        assert len(calls) > 1


def test_a_compiled_encoder_runs_parts_in_one_graph(tmp_path, monkeypatch):
    monkeypatch.setattr("mono_quant.hf.padding._CALL_COST", CHEAP)
    mq.quantize(encoders._embedder(Pooling(64)), fidelity=False).save(tmp_path / "int8")
    model = mq.load(tmp_path / "int8")
    expected = model.encode(TEXTS, convert_to_tensor=True)
    torch.compiler.reset()
    compiled = mq.load(tmp_path / "int8", compile=True)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        torch.testing.assert_close(
            compiled.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5
        )
    # sizes of two kinds: those of the first call, and any
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_parts_are_those_that_compute_least():
    generator = torch.Generator().manual_seed(5)
    for count in (2, 3, 7, 10):
        for longest in (3, 40, 300):
            lengths = sorted(torch.randint(1, longest, (count,), generator=generator).tolist(), reverse=True)
            found = parts_of(lengths)
            assert [i for part in found for i in range(*part)] == list(range(count))

            def cost(parts, lengths=lengths):
                return sum((end - first) * lengths[first] + _CALL_COST for first, end in parts)

            cuts = [
                list(itertools.pairwise((0, *inside, count)))
                for size in range(count)
                for inside in itertools.combinations(range(1, count), size)
            ]
            allowed = [c for c in cuts if all(end - first > 1 for first, end in c)]
            assert cost(found) == min(map(cost, allowed))


def test_a_batch_of_equal_texts_is_called_once_and_untouched():
    seen = []

    def call(self, features):
        seen.append(features)
        return features

    features = {
        "input_ids": torch.ones(4, 8, dtype=torch.long),
        "attention_mask": torch.ones(4, 8, dtype=torch.long),
    }
    module = torch.nn.Identity().eval()
    assert in_parts(call)(module, features) is features
    assert seen == [features] and seen[0] is features
