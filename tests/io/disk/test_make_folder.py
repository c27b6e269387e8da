"""A folder is made once, unless the caller says that it may be there."""

import pytest

from mono_quant.errors import OutputError
from mono_quant.io.disk import disk


def test_a_folder_that_is_there_is_an_error_unless_it_may_be(tmp_path):
    disk.make_folder(tmp_path / "a")
    assert (tmp_path / "a").is_dir()
    with pytest.raises(OutputError, match="a'"):
        disk.make_folder(tmp_path / "a")
    disk.make_folder(tmp_path / "a", exist_ok=True)
    with pytest.raises(OutputError):
        disk.make_folder(tmp_path / "b" / "c")
