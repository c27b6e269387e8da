"""What is carried to a machine that reaches no registry."""

import zipfile

import pytest
from gpu import wheels

LIBRARIES = ["cpu", "cuda118", "cuda130", "rocm70", "xpu2025"]


def bitsandbytes(folder):
    wheel = folder / "bitsandbytes-1.0-py3-none-any.whl"
    files = {f"bitsandbytes/libbitsandbytes_{name}.so": name.encode() for name in LIBRARIES}
    files["bitsandbytes/__init__.py"] = b""
    record = "bitsandbytes-1.0.dist-info/RECORD"
    lines = "".join(f"{name},sha256=x,{len(data)}\n" for name, data in files.items()) + f"{record},,\n"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, data in {**files, record: lines.encode()}.items():
            file.writestr(name, data)
    return wheel


def test_one_library_stays_and_the_record_agrees(tmp_path):
    wheel = bitsandbytes(tmp_path)
    wheels.slim(wheel, "cuda130")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        assert {name for name in names if name.endswith(".so")} == {
            "bitsandbytes/libbitsandbytes_cpu.so",
            "bitsandbytes/libbitsandbytes_cuda130.so",
        }
        assert file.read("bitsandbytes/libbitsandbytes_cuda130.so") == b"cuda130"
        record = file.read("bitsandbytes-1.0.dist-info/RECORD").decode().splitlines()
    assert {line.split(",")[0] for line in record} == names


def test_a_release_of_cuda_without_a_library_is_an_error(tmp_path):
    wheel = bitsandbytes(tmp_path)
    before = wheel.read_bytes()
    with pytest.raises(ValueError, match=r"no library for cuda140, but for cuda118, cuda130.*--cuda"):
        wheels.slim(wheel, "cuda140")
    assert wheel.read_bytes() == before


def test_versions_are_those_that_ours_are_tested_with():
    constraints = "# text\ntorch==2.13.0\nhuggingface_hub==2.4.0\n#   optimum==2.3.0\n"
    assert wheels.pinned(("huggingface_hub", "tokenizers", "optimum"), constraints) == [
        "huggingface_hub==2.4.0",
        "tokenizers",
        "optimum",
    ]


def test_nothing_is_installed_where_nothing_was_carried(tmp_path):
    assert wheels.install(tmp_path) is None
