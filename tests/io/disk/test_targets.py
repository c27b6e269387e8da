"""Targets: see the room of this name."""

from functools import partial
from pathlib import Path

import pytest
from folders import leftovers, listing, save, snapshot

from mono_quant.errors import (
    ConfigError,
    OutputExistsError,
    OutputWriteError,
)
from mono_quant.io.disk.output import check_target


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(
        OutputExistsError, match=r"out' exists and is not empty; choose another folder, or pass over"
    ):
        save(out, 2)
    with pytest.raises(
        OutputExistsError, match=r"out' was not written by mono_quant .*choose another folder or empty"
    ):
        save(out, 2, overwrite=True)
    for text in [
        "{}",
        "[]",
        "not json",
        '{"format": "other"}',
        '{"format": "mono_quant", "format": "mono_quant"}',
    ]:
        (out / "mono_quant.json").write_text(text)
        with pytest.raises(OutputExistsError, match=r"was not written by mono_quant"):
            save(out, 2, overwrite=True)
    assert listing(out) == ["mono_quant.json", "thesis.tex"] and leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.tex", "x"),
        ("LICENSE", "terms"),
        ("model-00001-of-00002.safetensors", "stale"),
        ("config.json", '{\n  "value": 7\n}\n'),
        ("model.safetensors", "another size"),
        ("1_Pooling/config.json", "7\n"),
        ("README.md", "words"),
    ],
)
def test_files_beside_or_in_place_of_our_own_are_not_deleted(tmp_path, name, content):
    save(tmp_path / "out", 1)
    (tmp_path / "out" / name).write_text(content)
    before = snapshot(tmp_path / "out")
    for refuse in (partial(save, value=2), check_target):
        with pytest.raises(
            OutputExistsError, match=rf"did not write.* would delete: '{name}'; move them away"
        ):
            refuse(tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == before
    check_target(tmp_path / "out", overwrite=True, merges=[name])
    save(tmp_path / "out", 2, overwrite=True, merges=[name])
    assert (
        not (tmp_path / "out" / name).exists()
        or (tmp_path / "out" / name).read_text(errors="replace") != content
    )


def test_a_manifest_without_a_list_of_files_leaves_nothing_to_replace(tmp_path):
    save(tmp_path / "out", 1)
    for files in ("[]", "{}", '{"config.json": 3}'):
        (tmp_path / "out" / "mono_quant.json").write_text(f'{{"format": "mono_quant", "files": {files}}}')
        with pytest.raises(
            OutputExistsError, match=r"would delete: '1_Pooling/config\.json', 'config\.json'"
        ):
            save(tmp_path / "out", 2, overwrite=True)


def test_what_git_and_the_hub_put_beside_a_result_is_in_nobodys_way(tmp_path):
    save(tmp_path / "out", 1)
    (tmp_path / "out" / ".gitattributes").write_text("*.safetensors filter=lfs")
    (tmp_path / "out" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "out" / ".cache" / "huggingface" / "x.lock").touch()
    save(tmp_path / "out", 2, overwrite=True)


def test_files_and_links_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"file' is a file, not a folder; choose another name"):
            save(tmp_path / "file", 1, overwrite=overwrite)
        for name in ("link", "dangling"):
            with pytest.raises(
                OutputExistsError, match=rf"{name}' is a symbolic link; name the folder it leads to"
            ):
                save(tmp_path / name, 1, overwrite=overwrite)
    assert listing(tmp_path / "real") == [] and not (tmp_path / "nowhere").exists()


def test_the_output_is_kept_away_from_the_source(tmp_path):
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (tmp_path / "alias").symlink_to(source)
    cases = [
        (source, "is the source"),
        (source / "out", "lies inside the source"),
        (source / "deep" / "er" / "out", "lies inside the source"),
        (tmp_path / "alias" / "out", "lies inside the source"),
        (tmp_path / "models", "contains the source"),
    ]
    for target, words in cases:
        for given in (source, tmp_path / "alias"):
            with pytest.raises(OutputExistsError, match=rf"{words}.*choose a folder beside it"):
                save(target, 1, sources=[given])
    assert listing(source) == ["config.json"]
    save(tmp_path / "models" / "beside", 1, sources=[source, tmp_path / "no-such-source"])


def test_the_hub_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "alias").symlink_to(tmp_path / "cache")
    blob = tmp_path / "elsewhere" / "models--a--b" / "blobs" / "x"
    blob.parent.mkdir(parents=True)
    blob.write_text("shared")
    for target in [
        "cache/out",
        "cache/a/b/out",
        "alias/out",
        "home/hub/out",
        "home/hub",
        blob.parent,
        blob.parent / "o",
    ]:
        with pytest.raises(
            OutputExistsError, match=r"lies in the Hugging Face cache.*choose a folder outside"
        ):
            save(tmp_path / target, 1)
    assert blob.read_text() == "shared" and not (tmp_path / "cache").exists()
    # HF_HOME is often a whole disk, so what lies beside its caches is not theirs.
    save(tmp_path / "home" / "mine", 1)


@pytest.mark.parametrize("name", ["a" * 256, "a" * 250, "a\0b"])
def test_impossible_names_are_typed(tmp_path, name):
    with pytest.raises(OutputWriteError, match=r"choose another"):
        save(tmp_path / name, 1)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("target", [None, b"out", 3, ""])
def test_what_is_no_path_is_typed(target):
    for refuse in (check_target, save_one):
        with pytest.raises(ConfigError, match=r"the output folder is .*; give a path"):
            refuse(target)


def save_one(target):
    save(target, 1)


@pytest.mark.parametrize("target", [".", "..", "../work"])
def test_the_current_folder_is_not_swapped_away(tmp_path, monkeypatch, target):
    here = tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    for refuse in (check_target, save_one):
        with pytest.raises(
            OutputExistsError, match=r"is the current folder or holds it.*name a folder inside"
        ):
            refuse(target)
    assert Path.cwd().samefile(here)
    save("out", 1)
    assert listing(here) == ["out"]


def test_a_place_that_takes_no_folder_is_found_before_the_work(tmp_path):
    with pytest.raises(
        OutputWriteError, match=r"'/proc/x/y' cannot be made: '/proc' takes no new folder .*choose"
    ):
        check_target("/proc/x/y")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputWriteError, match=r"Not a directory"):
        check_target(tmp_path / "file" / "out")
    check_target(tmp_path / "new" / "deep" / "out")
    assert listing(tmp_path) == ["file"]


def test_a_file_as_parent_and_a_link_loop_are_typed(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputWriteError, match=r"cannot write .*Not a directory; check the folder"):
        save(tmp_path / "file" / "out", 1)
    with pytest.raises(OutputWriteError, match=r"cannot be a folder.*choose another name"):
        save(tmp_path / "loop" / "out", 1)
    with pytest.raises(OutputExistsError):
        save("/", 1)
