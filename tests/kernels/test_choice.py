"""Choice: see the room of this name."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native import NATIVE, PATHS, native_only, same

from mono_quant import kernels
from mono_quant.kernels import build, choice, cpu, reference


def test_the_environment_names_what_runs() -> None:
    with kernels.using("reference"):
        env = kernels.environment()
        assert env["path"] == "reference"
        assert env["activations"] == kernels.activation_scheme() == "int8"
        assert "slower" in str(env["cost"])
        assert "reference" in kernels.describe()
    for name in NATIVE:
        with kernels.using(name):
            assert kernels.environment()["path"] == name
            assert kernels.environment()["cost"] is None
            assert kernels.describe() == f"native {name} (exact)"


@pytest.mark.parametrize("name", PATHS)
def test_auto_is_the_most_accurate_scheme_that_costs_little(name: str) -> None:
    own = "int8" if name == "reference" else "int8-g128" if name.endswith("vnni") else "int12"
    with kernels.using(name):
        assert kernels.activation_scheme() == kernels.activation_scheme("auto", "cpu") == own
        assert kernels.activation_scheme(device="cuda") == "int8"
        for fixed in kernels.SCHEMES:
            assert kernels.activation_scheme(fixed) == kernels.activation_scheme(fixed, "cuda") == fixed
            with kernels.using(activations=fixed):
                assert kernels.activation_scheme() == kernels.activation_scheme("auto", "cuda") == fixed
                assert kernels.activation_scheme("int8-g64") == "int8-g64"
                assert kernels.environment()["activations"] == fixed
                assert kernels.environment()["path"] == name
                with kernels.using(activations="auto"):
                    assert kernels.activation_scheme() == own


def test_unknown_schemes_are_errors(path: str) -> None:
    weight, scale = torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 1)
    wrong = r"unknown activation scheme 'int9'; choose from auto, int8, int8-g128, int8-g64, int12"
    with pytest.raises(ValueError, match=wrong):
        kernels.activation_scheme("int9")
    with pytest.raises(ValueError, match=wrong), kernels.using(activations="int9"):
        raise AssertionError
    with pytest.raises(ValueError, match=wrong):
        kernels.int8_linear(torch.ones(1, 3), weight, scale, None, "int9")
    with pytest.raises(ValueError, match=wrong):
        kernels.int8_linear(torch.ones(1, 3, requires_grad=True), weight, scale, None, "int9")
    image, kernel = torch.ones(1, 3, 4, 4), weight.view(2, 3, 1, 1)
    with pytest.raises(ValueError, match=wrong):
        kernels.int8_conv(image, kernel, scale, None, (1, 1), (0, 0), (1, 1), 1, "int9")
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        for call in (
            lambda: kernels.int8_linear(torch.ones(1, 3), weight, scale, None, "int9"),
            lambda: kernels.int8_conv(
                torch.ones(1, 3, 4, 4), kernel, scale, None, (1, 1), (0, 0), (1, 1), 1, "int9"
            ),
        ):
            with pytest.raises(ValueError, match=wrong):
                call()


def test_unknown_choices_are_errors() -> None:
    with pytest.raises(ValueError, match=r"unknown kernel path 'sse9'; choose from reference, portable"):
        cpu.choose(choice.loaded, "sse9")
    nothing = cpu.Loaded(None, "no compiler", None, ())
    with pytest.raises(ValueError, match=r"'avx2' is not available: no compiler"):
        cpu.choose(nothing, "avx2")
    assert cpu.choose(nothing) == (None, "no compiler")
    only = cpu.Loaded(ctypes.CDLL(None), None, None, ("portable",))
    with pytest.raises(ValueError, match=r"does not run 'avx2', only portable"):
        cpu.choose(only, "avx2")


def test_the_switches_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_QUANT_ISA", "reference")
    assert cpu.from_environment(choice.loaded)[0] is None
    if NATIVE:
        monkeypatch.setenv("MONO_QUANT_ISA", NATIVE[0])
        chosen, _ = cpu.from_environment(choice.loaded)
        assert chosen is not None
        assert chosen.path == NATIVE[0]
    assert cpu.activations_from_environment() == "auto"
    monkeypatch.setenv("MONO_QUANT_ACTIVATIONS", "int12")
    assert cpu.activations_from_environment() == "int12"
    monkeypatch.setenv("MONO_QUANT_ACTIVATIONS", "12")
    with pytest.raises(ValueError, match="MONO_QUANT_ACTIVATIONS is '12'; choose from auto, int8, int8-g128"):
        cpu.activations_from_environment()


def test_a_missing_library_leaves_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "_FOLDER", tmp_path)
    assert "not built" in str(cpu.load().reason)
    (tmp_path / build.RECORD).write_text(
        json.dumps({"built": False, "reason": "no C++ compiler", "compiler": None})
    )
    assert cpu.load() == cpu.Loaded(None, "no C++ compiler", None, ())
    (tmp_path / build.LIBRARY).write_bytes(b"not a library")
    assert "could not be loaded" in str(cpu.load().reason)


@native_only
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_VERSION", 999)
    assert "this package needs 999" in str(cpu.load().reason)


@native_only
def test_a_path_that_fails_its_self_test_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_agrees", lambda library, path: path == "portable")
    loaded = cpu.load()
    assert loaded.paths == ("portable",)
    if len(NATIVE) > 1:
        assert "self-test failed, not used: " + NATIVE[1] in str(loaded.reason)


@native_only
def test_the_self_test_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    library = choice.loaded.library
    assert library is not None
    assert cpu._agrees(library, "portable")
    right = reference.int_matmul
    monkeypatch.setattr(reference, "int_matmul", lambda codes, weight: right(codes, weight) + 1)
    assert not cpu._agrees(library, "portable")


def test_without_a_compiler_the_build_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    (tmp_path / build.LIBRARY).write_bytes(b"of an earlier build")
    reason = build.build(tmp_path)
    assert "no C++ compiler was found" in str(reason)
    assert json.loads((tmp_path / build.RECORD).read_text())["reason"] == reason
    assert not (tmp_path / build.LIBRARY).exists()


def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "error: no such thing" in str(build.build(tmp_path))
    compiler.write_text("not a program")
    assert "could not be run" in str(build.build(tmp_path))
    monkeypatch.setenv("MONO_QUANT_BUILD", "0")
    assert "MONO_QUANT_BUILD=0" in str(build.build(tmp_path))


@pytest.mark.parametrize("scheme", ["int8-g64", "int12"])
def test_a_process_without_the_library_computes_the_same(tmp_path: Path, scheme: str) -> None:
    code = (
        "import torch; from mono_quant import kernels; torch.manual_seed(0)\n"
        "x, w = torch.randn(21, 140), torch.randint(-128, 128, (9, 140), dtype=torch.int8)\n"
        "torch.save(kernels.int8_linear(x, w, torch.ones(9, 1), None), r'%s')\n"
        "print(kernels.environment()['path'])\n"
    )
    results = []
    for isa in ("reference", ""):
        file = tmp_path / f"{isa or 'native'}.pt"
        env = os.environ | {"MONO_QUANT_ISA": isa, "MONO_QUANT_ACTIVATIONS": scheme}
        run = subprocess.run(
            [sys.executable, "-c", code % file], env=env, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == (isa or choice.loaded.paths[-1] if NATIVE else "reference")
        results.append(torch.load(file))
    assert same(*results)


@pytest.mark.parametrize("path", PATHS)
def test_auto_is_wide_for_the_next_tokens_of_a_few_texts(path):
    if path == "reference":
        pytest.skip("the reference has one scheme")
    weight = torch.randint(-127, 128, (24, 300), dtype=torch.int8)
    scale, bias = torch.rand(24, 1), torch.randn(24)
    x = torch.randn(5, 7, 300)
    with kernels.using(path):
        wide = kernels.int8_linear(x, weight, scale, bias, "int12")
        usual = kernels.int8_linear(x, weight, scale, bias, kernels.activation_scheme())
        for one in (x[:4, :1], x[2:3, 4:5], x[:2, :2].unsqueeze(2)):
            got = kernels.int8_linear(one, weight, scale, bias)
            assert torch.equal(got, kernels.int8_linear(one, weight, scale, bias, "int12"))
            chained = kernels.chain(one, ((weight,), (scale,), (bias,), "auto"))
            assert torch.equal(chained, got)
        assert torch.equal(kernels.int8_linear(x[:4, :1], weight, scale, bias), wide[:4, :1])
        for texts in (x[:, :1], x.unsqueeze(2)):
            got = kernels.int8_linear(texts, weight, scale, bias)
            assert torch.equal(got.flatten(), usual[:, : texts.shape[1]].flatten())
            chained = kernels.chain(texts, ((weight,), (scale,), (bias,), "auto"))
            assert torch.equal(chained, got)
        # a matrix of tokens is no sequence of one token, whatever its height
        for many in (x, x[0], x[0, :1], x[0, 0]):
            assert torch.equal(
                kernels.int8_linear(many, weight, scale, bias).view(-1, 24),
                usual.view(-1, 24)[: many.numel() // 300],
            )
        with kernels.using(activations="int8"):
            assert torch.equal(
                kernels.int8_linear(x[:4, :1], weight, scale, bias),
                kernels.int8_linear(x[:4, :1], weight, scale, bias, "int8"),
            )


@pytest.mark.parametrize(
    "shape", [(3, 1, 100), (2, 3, 1, 100), (8, 1, 1, 100), (2, 5, 1, 100), (6, 1, 2, 100)]
)
def test_auto_means_the_same_for_each_element_of_a_vmap(shape):
    weight, scale = torch.randint(-127, 128, (24, 100), dtype=torch.int8), torch.rand(24, 1)

    def layer(x):
        return kernels.int8_linear(x, weight, scale, None)

    x = torch.randn(shape)
    assert torch.equal(torch.func.vmap(layer)(x), torch.stack([layer(one) for one in x]))
