"""What a run set aside goes once something is in its place, and not before."""

import pytest
from folders import leftovers, save, shimmed, snapshot

from mono_quant.io.disk import staging


@pytest.mark.parametrize("there", [True, False])
def test_an_old_result_is_removed_only_where_something_is_in_its_place(tmp_path, there):
    place, partial = tmp_path / "out", tmp_path / ".out.mq-0-1-2.partial"
    for folder in (partial, partial.with_suffix(".old"), *([place] if there else [])):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    staging.clean(partial, place)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"out"} if there else {partial.with_suffix(".old").name})


@pytest.mark.parametrize("can_exchange", [True, False])
def test_nothing_is_left_beside_a_folder_that_was_replaced(tmp_path, monkeypatch, can_exchange):
    save(tmp_path / "out", 1)
    before = snapshot(tmp_path / "out")
    shimmed(monkeypatch, can_exchange=can_exchange)
    save(tmp_path / "out", 2, overwrite=True)
    assert leftovers(tmp_path) == [] and snapshot(tmp_path / "out") != before
