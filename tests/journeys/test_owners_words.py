"""A push, and a save over an older result, keep what the owner of the place wrote: card, terms, metadata, other files."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from loopback_hub import LoopbackHub, Repo
from models import tiny_llama

import mono_quant
from mono_quant import errors
from mono_quant.apps import cli

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ANN = "hf_" + "AnnsCanaryToken" * 2 + "xyz1"
TERMS = b"MIT License of org\n"
SOURCE_CARD = b"---\nlicense: mit\nlanguage: en\npipeline_tag: text-generation\n---\n# A model\n"
# What the page of a new repository writes, and a person after it.
WEB_CARD = """---
license: mit # as the original
tags: [mine]
extra_gated_prompt: Tell us who you are
widget:
- text: Hello
---

# Our model

Ask **Ann** before you use it.
"""
WORDS = "\n## Notes of the owner\n\nTested on our data by Ann.\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("source")
    tiny_llama().save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with LoopbackHub() as running, pytest.MonkeyPatch.context() as patch:
        running.add_user("ann", ANN)
        running.add_repo("org/model", files | {"README.md": SOURCE_CARD, "LICENSE": TERMS})
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", running.endpoint)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder.parent / "cache"))
        patch.setenv("HF_TOKEN", ANN)
        yield running
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def int8(server: LoopbackHub) -> mono_quant.QuantizedModel:
    return mono_quant.quantize_from_hub("org/model", fidelity=False)


@pytest.fixture(scope="module")
def other(server: LoopbackHub) -> mono_quant.QuantizedModel:
    """The same model, converted with another option."""
    return mono_quant.quantize_from_hub("org/model", fidelity=False, skip=["q_proj"])


@pytest.fixture(scope="module")
def fp16(server: LoopbackHub) -> mono_quant.QuantizedModel:
    return mono_quant.quantize_from_hub("org/model", "fp16", fidelity=False)


@pytest.fixture
def repo(server: LoopbackHub, request: pytest.FixtureRequest) -> Repo:
    """An empty repository of the account, as its page on the Web makes it."""
    name = f"ann/repo-{abs(hash(request.node.nodeid))}"
    return server.add_repo(name)


def card(repo: Repo, revision: str = "main") -> str:
    return repo.files(revision)["README.md"].decode()


def head(text: str) -> dict[str, object]:
    data = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(data, dict)
    return data


def quantized_line(result: mono_quant.QuantizedModel) -> str:
    return f"- **{result.report.quantized_parameters:,} of {result.report.parameters:,} parameters"


def test_a_card_written_on_the_web_stays_and_ours_stands_below_it(
    server: LoopbackHub, repo: Repo, int8: mono_quant.QuantizedModel
) -> None:
    server.commit(repo.id, {"README.md": WEB_CARD.encode()})
    int8.push_to_hub(repo.id)
    text = card(repo)
    page = WEB_CARD.split("---\n")[2]
    assert page.strip() in text
    assert text.index("Ask **Ann**") < text.index(quantized_line(int8))
    assert "license: mit # as the original\n" in text
    data = head(text)
    assert data["widget"] == [{"text": "Hello"}]
    assert data["extra_gated_prompt"] == "Tell us who you are"
    assert data["tags"] == ["mine", "mono_quant", "int8", "w8a8"]
    assert (data["base_model"], data["base_model_relation"]) == ("org/model", "quantized")
    assert (data["language"], data["pipeline_tag"]) == (["en"], "text-generation")
    assert f'mono_quant.load("{repo.id}")' in text
    # and again nothing changes
    assert int8.push_to_hub(repo.id).already_there


@pytest.mark.parametrize("where", ["below", "both"])
def test_words_added_to_our_card_live_through_the_next_model_and_the_next_dtype(
    server: LoopbackHub,
    repo: Repo,
    int8: mono_quant.QuantizedModel,
    other: mono_quant.QuantizedModel,
    fp16: mono_quant.QuantizedModel,
    where: str,
) -> None:
    int8.push_to_hub(repo.id)
    first = card(repo)
    opening, body = first.split("\n---\n", 1)
    edited = f"{opening}\ndatasets_note: ours\n---\n"
    edited += (WORDS if where != "below" else "") + body + (WORDS if where != "above" else "")
    server.commit(repo.id, {"README.md": edited.encode()})
    int8.push_to_hub(repo.id)
    assert card(repo) == edited
    assert int8.push_to_hub(repo.id).already_there
    for result in (other, fp16, int8) if where == "both" else (fp16, int8):
        result.push_to_hub(repo.id)
        text = card(repo)
        assert text.count(WORDS.strip()) == (2 if where == "both" else 1)
        assert head(text)["datasets_note"] == "ours"
        assert ("fp16" in head(text)["tags"]) == (result is fp16)  # type: ignore[operator]
        assert ("int8" in head(text)["tags"]) == (result is not fp16)  # type: ignore[operator]
        assert quantized_line(result) in text
        assert text.count("parameters (") == 1
    assert card(repo) == edited


def test_a_card_of_ours_that_nobody_touched_is_replaced(
    repo: Repo, int8: mono_quant.QuantizedModel, fp16: mono_quant.QuantizedModel
) -> None:
    int8.push_to_hub(repo.id)
    first = card(repo)
    fp16.push_to_hub(repo.id)
    assert quantized_line(int8) not in card(repo)
    int8.push_to_hub(repo.id)
    assert card(repo) == first


def test_our_own_lines_edited_are_kept_while_true_and_refused_when_not(
    server: LoopbackHub, repo: Repo, int8: mono_quant.QuantizedModel, fp16: mono_quant.QuantizedModel
) -> None:
    int8.push_to_hub(repo.id)
    edited = card(repo).replace("## How to load it\n", f"{WORDS}\n## How to load it\n")
    server.commit(repo.id, {"README.md": edited.encode()})
    int8.push_to_hub(repo.id)
    assert card(repo) == edited
    before = repo.head
    with pytest.raises(
        errors.HubConflictError, match=r"README\.md.*overwrite=True.*create_pr=True"
    ) as refused:
        fp16.push_to_hub(repo.id)
    assert "above or below" in str(refused.value)
    assert repo.head == before
    pull = fp16.push_to_hub(repo.id, create_pr=True)
    assert repo.head == before
    assert pull.pr_url is not None
    fp16.push_to_hub(repo.id, overwrite=True)
    assert "Notes of the owner" not in card(repo)
    assert quantized_line(fp16) in card(repo)


def test_a_pull_request_proposes_a_card_with_the_owners_words(
    server: LoopbackHub, int8: mono_quant.QuantizedModel
) -> None:
    theirs = server.add_repo("bob/page", {"README.md": WEB_CARD.encode()})
    before = theirs.head
    int8.push_to_hub("bob/page", create_pr=True)
    assert theirs.head == before
    text = card(theirs, "refs/pr/1")
    assert "Ask **Ann** before you use it." in text
    assert quantized_line(int8) in text


def test_a_branch_keeps_its_own_words(
    server: LoopbackHub, repo: Repo, int8: mono_quant.QuantizedModel
) -> None:
    repo.branches["int8"] = repo.head
    server.commit(repo.id, {"README.md": b"# Main\n\nWords of main.\n"})
    server.commit(repo.id, {"README.md": b"# Branch\n\nWords of the branch.\n"}, branch="int8")
    main = repo.head
    int8.push_to_hub(repo.id, revision="int8")
    assert repo.head == main
    assert card(repo, "int8").startswith("---\n")
    assert "Words of the branch." in card(repo, "int8")
    assert "Words of main." not in card(repo, "int8")


BAD_CARDS = {
    "broken YAML": (b"---\nlicense: [\n---\n# Mine\n", "cannot be read"),
    "no list of names": (b"---\n- a\n- b\n---\n# Mine\n", "cannot be read"),
    "not UTF-8": (b"# Mine\n\n\xff\xfe\n", "UTF-8"),
    "huge": (b"# Mine\n" + b"word " * 900_000, "it is longer than 4194304 bytes"),
    "another licence": (
        b"---\nlicense: apache-2.0\n---\n# Mine\n",
        "license is 'apache-2.0', but the model's is 'mit'",
    ),
    "another base": (b"---\nbase_model: bob/other\n---\n", "base_model is 'bob/other'"),
}


@pytest.mark.parametrize("kind", BAD_CARDS)
def test_a_card_that_cannot_be_merged_is_refused_before_the_work(
    server: LoopbackHub, repo: Repo, int8: mono_quant.QuantizedModel, kind: str
) -> None:
    content, says = BAD_CARDS[kind]
    server.commit(repo.id, {"README.md": content})
    before, asked = repo.head, len(server.calls("resolve"))
    with pytest.raises(errors.HubConflictError, match=says) as refused:
        mono_quant.quantize_from_hub("org/model", push_to=repo.id)
    assert "overwrite=True" in str(refused.value)
    assert "create_pr=True" in str(refused.value)
    assert not [r for r in server.calls("resolve")[asked:] if "org/model" in r.path]
    with pytest.raises(errors.HubConflictError, match=says):
        int8.push_to_hub(repo.id)
    assert repo.head == before
    if kind not in ("not UTF-8", "another licence"):
        return
    int8.push_to_hub(repo.id, create_pr=True)
    int8.push_to_hub(repo.id, overwrite=True)
    assert card(repo) == card(repo, "refs/pr/1")
    assert quantized_line(int8) in card(repo)


def test_terms_of_the_owner_are_not_replaced(
    server: LoopbackHub, repo: Repo, int8: mono_quant.QuantizedModel
) -> None:
    server.commit(repo.id, {"LICENSE": b"Terms of Ann\n"})
    before, asked = repo.head, len(server.calls("resolve"))
    with pytest.raises(
        errors.HubConflictError, match=r"did not push.*'LICENSE'.*overwrite=True.*create_pr=True"
    ):
        mono_quant.quantize_from_hub("org/model", push_to=repo.id)
    assert not [r for r in server.calls("resolve")[asked:] if "org/model" in r.path]
    with pytest.raises(errors.HubConflictError, match="'LICENSE'"):
        int8.push_to_hub(repo.id)
    assert repo.head == before
    int8.push_to_hub(repo.id, create_pr=True)
    assert repo.files("refs/pr/1")["LICENSE"] == TERMS
    int8.push_to_hub(repo.id, overwrite=True)
    assert repo.files()["LICENSE"] == TERMS


def test_terms_that_say_the_same_or_that_only_the_owner_has_stay(
    server: LoopbackHub, repo: Repo, int8: mono_quant.QuantizedModel
) -> None:
    server.commit(repo.id, {"LICENSE": TERMS, "NOTICE": b"by Ann\n"})
    int8.push_to_hub(repo.id)
    int8.push_to_hub(repo.id)
    assert repo.files()["LICENSE"] == TERMS
    assert repo.files()["NOTICE"] == b"by Ann\n"


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("generation_config.json", lambda data: data.replace(b'"eos_token_id": 2', b'"eos_token_id": 3')),
        ("config.json", lambda data: data + b"\n"),
        ("LICENSE", lambda data: data.replace(b"org", b"ann")),
    ],
)
def test_a_file_of_ours_that_the_owner_changed_is_theirs(
    server: LoopbackHub,
    repo: Repo,
    int8: mono_quant.QuantizedModel,
    fp16: mono_quant.QuantizedModel,
    name: str,
    edit,
) -> None:
    int8.push_to_hub(repo.id)
    mine = repo.files()[name]
    theirs = edit(mine)
    assert theirs != mine
    server.commit(repo.id, {name: theirs})
    before = repo.head
    with pytest.raises(errors.HubConflictError, match=f"did not push.*'{name}'"):
        fp16.push_to_hub(repo.id)
    assert repo.head == before
    if name == "LICENSE":
        int8.push_to_hub(repo.id, overwrite=True)
        assert repo.files()[name] == mine


def test_two_edited_cards_are_not_guessed_about(
    server: LoopbackHub, repo: Repo, int8: mono_quant.QuantizedModel, tmp_path: Path
) -> None:
    folder = int8.save(tmp_path / "out")
    readme = folder / "README.md"
    fresh = readme.read_text()
    readme.write_text(fresh + "\nLine one of the folder.\n")
    mono_quant.push_to_hub(folder, repo.id)
    assert card(repo).endswith("\nLine one of the folder.\n")
    # what is in the folder goes on
    readme.write_text(fresh + "\nLine one of the folder.\n\nLine two.\n")
    mono_quant.push_to_hub(folder, repo.id)
    assert card(repo).endswith("Line two.\n")
    # a fresh card takes nothing away
    int8.push_to_hub(repo.id)
    assert card(repo).endswith("Line two.\n")
    # two people wrote
    server.commit(repo.id, {"README.md": (card(repo) + "\nLine of the Web.\n").encode()})
    readme.write_text(fresh + "\nLine three.\n")
    before = repo.head
    with pytest.raises(errors.HubConflictError, match=r"Line of the Web.*Line three.*overwrite=True"):
        mono_quant.push_to_hub(folder, repo.id)
    assert repo.head == before
    mono_quant.push_to_hub(folder, repo.id, overwrite=True)
    assert card(repo).endswith("Line three.\n")


# The same in a folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_saving_over_a_result_keeps_the_words_on_its_card(
    int8: mono_quant.QuantizedModel, fp16: mono_quant.QuantizedModel, tmp_path: Path
) -> None:
    folder = int8.save(tmp_path / "out")
    fresh = (folder / "README.md").read_text()
    assert fresh == int8.card()
    (folder / "README.md").write_text(fresh + WORDS)
    fp16.save(folder, overwrite=True)
    text = (folder / "README.md").read_text()
    assert text == fp16.card() + WORDS
    int8.save(folder, overwrite=True)
    assert (folder / "README.md").read_text() == fresh + WORDS
    assert mono_quant.load(folder) is not None


def test_saving_over_a_card_that_contradicts_is_refused(
    int8: mono_quant.QuantizedModel, fp16: mono_quant.QuantizedModel, tmp_path: Path
) -> None:
    folder = int8.save(tmp_path / "out")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("## How to load it\n", f"{WORDS}\n## How to load it\n"))
    edited = readme.read_text()
    int8.save(folder, overwrite=True)
    assert readme.read_text() == edited
    before = contents(folder)
    with pytest.raises(errors.OutputExistsError, match=r"README\.md.*above or below"):
        fp16.save(folder, overwrite=True)
    assert contents(folder) == before
    readme.write_bytes(b"---\nlicense: [\n---\n")
    with pytest.raises(errors.OutputExistsError, match="cannot be read"):
        fp16.save(folder, overwrite=True)
    assert readme.read_bytes() == b"---\nlicense: [\n---\n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("LICENSE", b"Terms of Ann\n"),
        ("NOTICE.md", b"by Ann\n"),
        ("chat_template.jinja", b"{{ messages }}"),
        ("config.json", None),
        ("generation_config.json", b"{}\n"),
    ],
)
def test_a_file_that_the_owner_put_into_a_result_is_not_deleted(
    int8: mono_quant.QuantizedModel, tmp_path: Path, name: str, data: bytes | None
) -> None:
    folder = int8.save(tmp_path / "out")
    path = folder / name
    path.write_bytes(data if data is not None else path.read_bytes().replace(b"silu", b"gelu"))
    before = contents(folder)
    with pytest.raises(errors.OutputExistsError, match=f"did not write.*{name}.*another folder"):
        int8.save(folder, overwrite=True)
    with pytest.raises(errors.OutputExistsError, match=f"did not write.*{name}"):
        mono_quant.quantize_from_hub("org/model", output=folder, overwrite=True)
    assert contents(folder) == before
    path.unlink()
    if name in ("config.json", "generation_config.json"):
        return
    int8.save(folder, overwrite=True)
    assert mono_quant.load(folder) is not None


def test_a_result_without_its_card_is_replaced(int8: mono_quant.QuantizedModel, tmp_path: Path) -> None:
    folder = int8.save(tmp_path / "out")
    (folder / "README.md").unlink()
    int8.save(folder, overwrite=True)
    assert (folder / "README.md").read_text() == int8.card()


def test_what_contradicts_the_card_of_an_older_result_is_known_before_the_work(
    server: LoopbackHub, int8: mono_quant.QuantizedModel, tmp_path: Path
) -> None:
    folder = int8.save(tmp_path / "out")
    (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\n# Mine\n")
    before, asked = contents(folder), len(server.calls("resolve"))
    with pytest.raises(
        errors.OutputExistsError, match=r"license is 'gpl-3\.0', but the model's is 'mit'.*Correct it"
    ):
        mono_quant.quantize_from_hub("org/model", output=folder, overwrite=True)
    assert len(server.calls("resolve")) == asked
    assert contents(folder) == before


def test_a_card_that_is_a_link_is_no_card_to_merge(int8: mono_quant.QuantizedModel, tmp_path: Path) -> None:
    folder = int8.save(tmp_path / "out")
    (tmp_path / "secret").write_text("# Secret\n")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(errors.OutputExistsError, match=r"did not write.*'README\.md'"):
        int8.save(folder, overwrite=True)


def test_a_card_that_is_a_pipe_is_neither_waited_for_nor_replaced(
    int8: mono_quant.QuantizedModel, tmp_path: Path
) -> None:
    folder = int8.save(tmp_path / "out")
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    with pytest.raises(errors.OutputExistsError, match=r"did not write.*'README\.md'"):
        int8.save(folder, overwrite=True)


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "config.json"])
def test_the_command_line_sees_for_a_local_source_too_what_it_would_replace(
    server: LoopbackHub,
    repo: Repo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    tiny_llama().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "LICENSE").write_bytes(TERMS)
    (tmp_path / "llama" / "README.md").write_bytes(SOURCE_CARD)
    server.commit(repo.id, {name: b"---\nlicense: gpl\n---\n"})
    monkeypatch.setattr(
        sys, "argv", ["mono-quant", "quantize", str(tmp_path / "llama"), "--push-to", repo.id]
    )
    monkeypatch.setattr("mono_quant.api.delivery.convert_source", pytest.fail)
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert name in said
    assert "--overwrite to replace" in said
    assert "--create-pr to open a pull request" in said
