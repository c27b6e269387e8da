"""What the files of a sentence-transformers model may say, and that nothing of them is imported or run."""

import json
import pickle
import shutil
import sys

import pytest
import transformers as hf
from encoders import BERT, transformer
from models import seeded
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling

import mono_quant as mq
from mono_quant.errors import (
    AdapterAttachedError,
    CorruptCheckpointError,
    MissingDependencyError,
    PickleOnlyError,
    RemoteCodeError,
    UnsafeInputError,
    UnsupportedModelError,
)
from mono_quant.hf.encoders import Encoder, encoder_of
from mono_quant.hf.sentence import core_class


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "model"
    modules = [transformer(lambda: hf.BertModel(BERT)), Pooling(64), seeded(lambda: Dense(64, 48))]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


def entry(index, **changed):
    def spoil(folder):
        modules = json.loads((folder / "modules.json").read_text())
        modules[index] |= changed
        (folder / "modules.json").write_text(json.dumps(modules))

    return spoil


def put(name, **values):
    def spoil(folder):
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(known | values))

    return spoil


def linked(name, outside="elsewhere"):
    def spoil(folder):
        shutil.move(folder / name, folder.parent / outside)
        (folder / name).symlink_to(folder.parent / outside)

    return spoil


class Trap:
    def __reduce__(self):
        return (sys.exit, ("the pickle was run",))


def pickled(folder):
    (folder / "2_Dense" / "model.safetensors").unlink()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def own_code(folder):
    (folder / "trap.py").write_text("import sys; sys.exit('the code was run')")
    entry(1, type="trap.Pooling")(folder)


HOSTILE = {
    "code of the repository": (own_code, RemoteCodeError, r"'trap\.Pooling'.*Nothing of it was\s+imported"),
    "another package": (entry(1, type="os.system"), RemoteCodeError, "none of sentence-transformers'"),
    "no class": (entry(1, type="sentence_transformers.base.model.pickle"), UnsafeInputError, "is no module"),
    "a function": (entry(1, type="sentence_transformers.util.cos_sim"), UnsafeInputError, "is no module"),
    "no such class": (entry(1, type="sentence_transformers.models.Soup"), UnsupportedModelError, "update it"),
    "up": (entry(1, path="../x"), UnsafeInputError, r"path of module '1' is '\.\./x'"),
    "absolute": (entry(1, path="/etc"), UnsafeInputError, "has to be a folder beside it"),
    "deep": (entry(1, path="1_a/2_b"), UnsafeInputError, "has to be a folder beside it"),
    "no path": (entry(1, path=None), UnsafeInputError, "path of module '1' is 'None'"),
    "linked folder": (linked("2_Dense"), UnsafeInputError, "2_Dense is a symbolic link"),
    "linked weights": (linked("2_Dense/model.safetensors"), UnsafeInputError, "is a symbolic link"),
    "linked settings": (linked("1_Pooling/config.json"), UnsafeInputError, "is a symbolic link"),
    "linked list": (linked("modules.json"), UnsafeInputError, r"modules\.json' is a symbolic link"),
    "pickle": (pickled, PickleOnlyError, r"2_Dense has only pickle weights.*save_pretrained wrote"),
    "two of a name": (entry(1, name="2"), CorruptCheckpointError, "give each a name of its own"),
    "a name with a dot": (entry(1, name="a.b"), CorruptCheckpointError, "of letters and digits"),
    "no list": (lambda f: (f / "modules.json").write_text("{}"), CorruptCheckpointError, "no list of modules"),
    "an empty list": (lambda f: (f / "modules.json").write_text("[]"), CorruptCheckpointError, "no list of mod"),
    "another encoder": (put("config_sentence_transformers.json", model_type="Soup"), UnsupportedModelError, "'Soup'"),
    "a tokenizer elsewhere": (
        put("sentence_bert_config.json", tokenizer_name_or_path="/etc"), UnsafeInputError, "tokenizer_name_or_path is '/etc'"),
    "a vocabulary elsewhere": (
        put("sentence_bert_config.json", tokenizer_args={"vocab_file": "x"}), UnsafeInputError, r"tokenizer_args\.vocab_file"),
    "a folder elsewhere": (
        put("sentence_bert_config.json", model_args={"cache": "../x"}), UnsafeInputError, r"model_args\.cache is '\.\./x'"),
    "another config": (
        put("sentence_bert_config.json", config_args={"hidden_size": 8}), UnsupportedModelError, "write it into"),
    "a function that is called": (
        put("config_sentence_transformers.json", model_type="CrossEncoder", activation_fn="torch.hub.list"),
        UnsafeInputError, r"activation is 'torch\.hub\.list'"),
    "a dense function": (
        put("2_Dense/config.json", activation_function="torch.cuda.empty_cache"), UnsafeInputError, "none of torch.nn"),
    "an adapter": (put("adapter_config.json", base_model_name_or_path="org/x"), AdapterAttachedError, "merge_and_unload"),
    "a second transformer": (
        entry(1, type="sentence_transformers.models.Transformer"), UnsupportedModelError, "a second transformer"),
    "a transformer in a folder": (entry(0, path="0_Transformer"), UnsupportedModelError, "lies in 0_Transformer"),
    "a router first": (entry(0, type="sentence_transformers.models.Asym"), UnsupportedModelError, "convert each in"),
    "no transformer": (entry(0, type="sentence_transformers.models.BoW"), UnsupportedModelError, "holds no transformer"),
    "settings of another module": (put("2_Dense/config.json", out_features=7), (CorruptCheckpointError, UnsupportedModelError), "Dense"),
    "weights that are no file": (
        lambda f: (f / "2_Dense/model.safetensors").write_bytes(b"x" * 20), CorruptCheckpointError, "not a whole safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_the_files_may_not_say(folder, case):
    spoil, error, message = HOSTILE[case]
    spoil(folder)
    known = set(sys.modules)
    with pytest.raises(error, match=message):
        mq.plan(folder)
    assert "trap" not in sys.modules.keys() - known


@pytest.mark.parametrize(
    "case", ["code of the repository", "pickle", "no class", "settings of another module"]
)
def test_what_a_plan_refuses_is_not_converted_either(folder, case):
    spoil, error, message = HOSTILE[case]
    spoil(folder)
    with pytest.raises(error, match=message):
        mq.quantize(folder, fidelity=False)


def test_old_names_of_modules_are_known(folder):
    entry(0, type="sentence_transformers.models.Transformer")(folder)
    entry(1, type="sentence_transformers.models.Pooling")(folder)
    entry(2, type="sentence_transformers.models.Dense")(folder)
    shutil.rmtree(folder / "1_Pooling")
    put("1_Pooling.json")(folder)
    (folder / "1_Pooling").mkdir()
    put("1_Pooling/config.json", word_embedding_dimension=64, pooling_mode_cls_token=True)(folder)
    result = mq.quantize(folder, fidelity=False)
    assert result.model[1].pooling_mode == "cls"


def test_a_module_without_files_needs_no_folder(folder):
    modules = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.models.Normalize"
    modules.append({"idx": 3, "name": "3", "path": "3_Normalize", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))
    found = mq.quantize(folder, fidelity=False).model.encode(["w1"], convert_to_tensor=True)
    assert found.norm() == pytest.approx(1.0, abs=1e-6)


def test_a_head_that_the_encoder_does_not_use_is_left_out(folder):
    seeded(lambda: hf.BertForMaskedLM(BERT)).save_pretrained(folder)
    heads = [n for n in load_file(folder / "model.safetensors") if n.startswith("cls.")]
    assert heads
    with pytest.raises(CorruptCheckpointError, match=r"BertModel are missing: pooler\.dense"):
        mq.plan(folder)


def test_without_the_library_it_is_asked_for(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    for verb in (mq.plan, mq.quantize):
        with pytest.raises(
            MissingDependencyError, match=r"is a SentenceTransformer.*pip install sentence-transformers"
        ):
            verb(folder)


def test_the_encoder_decides_which_class_it_has_inside(folder):
    put("config.json", architectures=["BertForMaskedLM"])(folder)
    assert type(mq.quantize(folder, fidelity=False).model[0].auto_model) is hf.BertModel


@pytest.mark.parametrize(
    ("config", "task", "named", "expected"),
    [
        (hf.T5Config(), "feature-extraction", hf.T5ForConditionalGeneration, hf.T5EncoderModel),
        (hf.BartConfig(), "feature-extraction", hf.BartForConditionalGeneration, hf.BartModel),
        (hf.FunnelConfig(), "feature-extraction", hf.FunnelBaseModel, hf.FunnelBaseModel),
        (hf.BertConfig(), "fill-mask", hf.BertModel, hf.BertForMaskedLM),
        (hf.BertConfig(), "sequence-classification", hf.BertModel, hf.BertForSequenceClassification),
        (hf.Qwen3Config(), "text-generation", hf.Qwen3ForCausalLM, hf.Qwen3ForCausalLM),
        (hf.BertConfig(), "retrieval", hf.BertForPreTraining, hf.BertForPreTraining),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_task_has_a_class(config, task, named, expected):
    """The choice of sentence-transformers, in the room `base.modules.transformer`."""
    assert core_class(config, Encoder("SentenceTransformer", task, ()), named) is expected


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "CrossEncoder"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, "CrossEncoder"),
        ({}, None),
    ],
)
def test_a_reranker_of_an_older_release_is_known_by_its_config(said, kind, tmp_path):
    raw = {"architectures": ["BertForSequenceClassification"], **said}
    found = encoder_of(tmp_path, raw)
    assert (found and found.kind) == kind
    assert encoder_of(tmp_path, raw | {"architectures": ["BertModel"]}) is None
