"""A model of sentence-transformers goes in by folder or id, and comes out as one, with its modules and its answers."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from bench import sentences as bench
from encoders import ENCODERS, answers, tokenizer_into
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from models import relative_error, snapshot
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import BoW
from torch import nn

import mono_quant as mq
from mono_quant import kernels
from mono_quant.convert.int8_layers import Int8Module
from mono_quant.errors import FrozenWeightError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Made = Callable[[str], tuple[Any, Path]]
KINDS = pytest.mark.parametrize("name", ENCODERS)
QUIET = {"fidelity": False}
ANN = "hf_" + "AnnsCanaryToken" * 2 + "xyz1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Give encoders and their folders, as sentence-transformers writes them."""
    known: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in known:
            model, folder = ENCODERS[name](), tmp_path_factory.mktemp(name) / "float"
            model.save_pretrained(str(folder), create_model_card=False)
            known[name] = model, folder
        return known[name]

    return make


def int8_layers(model: nn.Module) -> int:
    return sum(isinstance(m, Int8Module) for m in model.modules())


def told(report: Any) -> list[tuple[Any, ...]]:
    return [
        (r.name, r.module, r.kind, r.shape, r.dtype_before, r.dtype_after, r.action, r.reason)
        for r in report.rows
    ]


def around(folder: Path) -> dict[str, bytes]:
    """What lies around the transformer: lists, settings and weights of modules."""
    own = ("config.json", "model.safetensors", "README.md", "mono_quant.json", "mono_quant_report.json")
    return {name: data for name, data in snapshot(folder).items() if name not in own}


@KINDS
def test_an_encoder_comes_back_as_what_it_was(made: Made, name: str, tmp_path: Path) -> None:
    model, folder = made(name)
    result = mq.quantize(folder, **QUIET)
    assert type(result.model) is type(model)
    assert [type(m) for m in result.model.children()] == [type(m) for m in model.children()]
    assert told(mq.plan(folder)) == told(result.report)
    expected = answers(result.model)
    assert torch.equal(expected, answers(mq.quantize(model, **QUIET).model))

    out = result.save(tmp_path / "out")
    back = mq.load(out)

    assert type(back) is type(model)
    assert int8_layers(back) == len({row.module for row in result.report.quantized})
    assert torch.equal(answers(back), expected)
    # the transformer in bfloat16 makes sentence-transformers cast what lies behind it; here that was so in the files
    assert around(out) == around(folder)
    assert snapshot(mq.QuantizedModel.from_folder(out).save(tmp_path / "again")) == snapshot(out)


@pytest.mark.parametrize(
    ("name", "request_", "layout"),
    [
        ("dense", {"dtype": "fp16"}, "plain"),
        ("half_core", {"dtype": "fp16"}, "plain"),
        ("csr", {"dtype": "fp16"}, "plain"),
        ("dense", {"embeddings": True}, None),
        ("reranker", {"embeddings": True}, None),
    ],
)
def test_other_requests_come_back_too(
    made: Made, name: str, request_: dict[str, Any], layout: str | None, tmp_path: Path
) -> None:
    _, folder = made(name)
    result = mq.quantize(folder, **request_, **QUIET)
    assert told(mq.plan(folder, **request_)) == told(result.report)
    out = result.save(tmp_path / "out")
    assert torch.equal(answers(mq.load(out)), answers(result.model))
    assert layout in (None, mq.inspect(out).facts["layout"])


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_modules_of_another_dtype_run_as_sentence_transformers_runs_them(
    made: Made, dtype: str, tmp_path: Path
) -> None:
    _, folder = made("half_core")
    mixed = tmp_path / "mixed"
    for file in folder.rglob("*"):
        if file.is_file():
            (mixed / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (mixed / file.relative_to(folder)).write_bytes(file.read_bytes())
    weights = mixed / "2_Dense" / "model.safetensors"
    save_file({n: t.float() + 1e-4 for n, t in load_file(weights).items()}, weights)
    result = mq.quantize(mixed, dtype, **QUIET)
    theirs = SentenceTransformer(str(mixed), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    found, same = result.model[2].state_dict(), theirs[2].state_dict()
    assert all(torch.equal(found[n], same[n]) and found[n].dtype == same[n].dtype for n in same)
    back = mq.load(result.save(tmp_path / "out"))
    assert torch.equal(answers(back), answers(result.model))


def test_a_reranker_of_an_older_release_needs_no_list_of_modules(made: Made, tmp_path: Path) -> None:
    model, folder = made("reranker")[0], tmp_path / "old"
    core = copy.deepcopy(model[0].auto_model)
    core.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    core.save_pretrained(folder)
    tokenizer_into(folder)
    result = mq.quantize(folder, **QUIET)
    back = mq.load(result.save(tmp_path / "out"))
    assert type(back) is CrossEncoder and type(back.activation_fn) is nn.Identity
    assert torch.equal(answers(back), answers(result.model))
    assert back.rank("w1 w2", ["w3 w4", "w1 w2", "w9"]) == result.model.rank(
        "w1 w2", ["w3 w4", "w1 w2", "w9"]
    )
    assert not (tmp_path / "out" / "modules.json").exists()


def test_what_is_changed_after_reading_is_saved(made: Made, tmp_path: Path) -> None:
    result = mq.quantize(made("dense")[1], **QUIET)
    result.model.max_seq_length = 7
    result.model.prompts = {"query": "w3 "}
    with torch.no_grad():
        result.model[2].linear.weight.mul_(2)
    back = mq.load(result.save(tmp_path / "out"))
    assert (back.max_seq_length, back.prompts["query"]) == (7, "w3 ")
    assert torch.equal(back[2].linear.weight, result.model[2].linear.weight)
    assert torch.equal(answers(back), answers(result.model))


def test_settings_of_the_encoder_and_of_a_call(made: Made, tmp_path: Path) -> None:
    model, folder = made("mean")
    back = mq.load(mq.quantize(folder, **QUIET).save(tmp_path / "out"))
    assert (back.prompts, back.truncate_dim) == (model.prompts, 32)
    assert back.similarity_fn_name == model.similarity_fn_name
    texts = ["w1 w2 w3", "w4"]
    plain = back.encode([f"w1 w2 {text}" for text in texts], convert_to_tensor=True)
    prompted = back.encode(texts, prompt_name="query", convert_to_tensor=True, normalize_embeddings=True)
    assert prompted.shape == (2, 32)
    assert torch.allclose(prompted, torch.nn.functional.normalize(plain, dim=1), atol=1e-6)
    assert torch.allclose(back.similarity(prompted, prompted).diagonal(), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("name", ["mean", "reranker", "splade"])
def test_a_loaded_encoder_is_copied_pickled_and_saved_by_its_own_methods(
    made: Made, name: str, tmp_path: Path
) -> None:
    out = mq.quantize(made(name)[1], **QUIET).save(tmp_path / "out")
    model = mq.load(out)
    expected = answers(model)
    # a pool of processes gets the model as a pickle
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and torch.equal(answers(other), expected)
    model.save_pretrained(str(tmp_path / "one"))
    model.save(str(tmp_path / "two"))
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two") == snapshot(out)
    assert relative_error(expected, answers(copy.deepcopy(model).half()).float()) < 0.01


def test_an_int8_checkpoint_of_others_is_the_encoder_that_it_describes(made: Made, tmp_path: Path) -> None:
    result = mq.quantize(made("dense")[1], **QUIET)
    out = result.save(tmp_path / "out")
    for name in ("mono_quant.json", "mono_quant_report.json"):
        (out / name).unlink()
    model = mq.load(out)
    assert type(model) is SentenceTransformer and int8_layers(model) == 12
    assert torch.equal(answers(model), answers(result.model))
    with pytest.raises(UnsupportedModelError, match="was not converted here"):
        model.save_pretrained(str(tmp_path / "more"))
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("name", ["dense", "reranker", "splade"])
def test_sentence_transformers_by_itself_computes_with_the_weights_that_the_codes_stand_for(
    made: Made, name: str, tmp_path: Path
) -> None:
    model, folder = made(name)
    out = mq.quantize(folder, **QUIET).save(tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    expected = copy.deepcopy(model)
    for key, tensor in expected[0].auto_model.state_dict().items():
        if f"{key}_scale" in stored:
            tensor.copy_(stored[key].float() * stored[f"{key}_scale"].float().view(-1, 1))
    theirs = type(model)(str(out), device="cpu")
    assert int8_layers(theirs) == 0
    assert relative_error(answers(expected), answers(theirs)) < 1e-5
    assert relative_error(answers(model), answers(theirs)) > 1e-7


@pytest.mark.parametrize("name", ["dense", "reranker", "splade"])
def test_plain_calls_of_sentence_transformers_run_int8_after_the_opt_in(
    made: Made, name: str, tmp_path: Path
) -> None:
    model, folder = made(name)
    result = mq.quantize(folder, **QUIET)
    out = result.save(tmp_path / "out")
    expected = answers(result.model)
    with mq.enable():
        theirs = type(model)(str(out), device="cpu")
    on_load = type(model)(
        str(folder), device="cpu", model_kwargs={"quantization_config": mq.MonoQuantConfig()}
    )
    for number, found in enumerate((theirs, on_load)):
        assert int8_layers(found) == int8_layers(result.model)
        assert torch.equal(answers(found), expected)
        found.save_pretrained(str(tmp_path / f"again{number}"))
        back = mq.load(tmp_path / f"again{number}")
        assert type(back) is type(model) and torch.equal(answers(back), expected)


def test_the_old_loop_of_training_refuses_too(made: Made, tmp_path: Path) -> None:
    model = mq.load(mq.quantize(made("mean")[1], **QUIET).save(tmp_path / "out"))
    with pytest.raises(FrozenWeightError, match=r"SentenceTransformer holds int8.*LoRA"):
        model.old_fit([])


def test_an_encoder_without_a_transformer_says_what_can_be_converted() -> None:
    bag = SentenceTransformer(modules=[BoW(["w1", "w2"])], device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"\(BoW\) holds no transformer.*dynamic_quantize"):
        mq.quantize(bag)
    routed = SentenceTransformer(modules=[Router({"query": [BoW(["w1"])]}, default_route="query")])
    with pytest.raises(UnsupportedModelError, match=r"\(Router\).*sub_modules\['query'\]\[0\]"):
        mq.quantize(routed)


@pytest.fixture(scope="module")
def server(made: Made, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running, pytest.MonkeyPatch.context() as patch:
        running.add_user("ann", ANN)
        running.add_repo("org/minilm", snapshot(minilm))
        running.add_repo("org/tiny", snapshot(made("dense")[1]) | {"README.md": b"# Words of the owner\n"})
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", running.endpoint)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_TOKEN", ANN)
        yield running
        huggingface_hub.close_session()


@pytest.mark.skipif(kernels.environment()["path"] == "reference", reason="the native library is not built")
def test_minilm_by_id_keeps_its_embeddings_and_their_neighbours(
    server: LoopbackHub, minilm: Path, tmp_path: Path
) -> None:
    """`python scripts/benchmark.py sentences` does it with 2000 texts."""
    mq.quantize_from_hub("org/minilm", output=tmp_path / "out", push_to="ann/minilm", **QUIET)
    model: Any = mq.load("ann/minilm")
    texts = bench.texts(60)
    expected = bench.embeddings(SentenceTransformer(str(minilm), device="cpu"), texts)
    for scheme, mean in (("int8", 0.997), ("int12", 0.999)):
        with kernels.using(activations=scheme):
            found = bench.embeddings(model, texts)
        assert float(bench.cosines(expected, found).mean()) >= mean
        assert bench.recall(expected, found) >= 0.99
    with kernels.using(activations="int12"):
        assert torch.equal(found, bench.embeddings(mq.load(tmp_path / "out"), texts))


def test_the_plan_of_an_id_reads_headers_and_small_files(server: LoopbackHub) -> None:
    start = len(server.requests)
    planned = mq.plan("org/tiny")
    read = [r for r in server.requests[start:] if r.method == "GET" and ".safetensors" in r.path]
    # of the transformer, and of the two modules with weights behind it
    assert len(read) == 3 and all(r.headers["range"].startswith("bytes=0-") for r in read)
    assert told(planned) == told(mq.quantize("org/tiny", **QUIET).report)


def test_a_pull_request_to_the_model_itself_is_tried_before_it_is_merged(server: LoopbackHub) -> None:
    repo = server.repo("org/tiny")
    before = repo.head
    result = mq.quantize("org/tiny", **QUIET)
    pushed = result.push_to_hub("org/tiny", create_pr=True)
    assert repo.head == before
    assert pushed.pr_url == f"{server.endpoint}/org/tiny/discussions/1"

    text = repo.history[pushed.commit_sha].description
    assert 'mono_quant.load("org/tiny", revision=f"refs/pr/{number}")' in text
    assert f"`org/tiny` at commit `{before}`" in text and f'revision="{before}"' in text
    assert "# Words of the owner" in repo.files("refs/pr/1")["README.md"].decode()
    code = text.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)

    assert (names["embedding"] == result.model.encode("Hello, world.")).all()
    assert type(names["model"]) is SentenceTransformer and int8_layers(names["model"]) == 12
