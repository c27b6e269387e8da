"""Every family goes the whole way in both dtypes: converted, accounted for, saved, loaded; the original is not touched."""

import copy
import functools
import json
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import safetensors.torch
import torch
import transformers
from models import FAMILIES, MOE, is_plain, relative_error, run, snapshot
from safetensors import safe_open
from torch import nn

import mono_quant as mq
from mono_quant import kernels

DTYPES = ("int8", "fp16")
CASES = [(name, dtype) for name in FAMILIES for dtype in DTYPES]
EVERY = pytest.mark.parametrize(("name", "dtype"), CASES, ids=["-".join(case) for case in CASES])
STANDARD = [name for name, family in FAMILIES.items() if family.layout == "compressed-tensors"]
DENSE = [name for name in STANDARD if name not in MOE]
OWN = [name for name in FAMILIES if name not in STANDARD]


@pytest.fixture(scope="module")
def base():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        case.cache_clear()


@functools.cache
def case(base, name, dtype):
    """One conversion, shared by all tests that look at it; hooks and flags are set before it."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    next(model.children()).train()
    next(model.parameters()).requires_grad_(False)
    calls = []
    leaf = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding))
    leaf.register_forward_hook(lambda *_: calls.append(1))
    before, random_before = state_of(model), random_states()
    probe = inputs if is_plain(model) else None
    result = mq.quantize(model, dtype, probe=probe)
    after, random_after = state_of(model), random_states()
    folder = result.save(base / f"{name}-{dtype}")
    expected, output = run(model.eval(), inputs), run(result.model.eval(), inputs)
    return SimpleNamespace(**locals())


def state_of(model):
    """Everything that a conversion could disturb, by identity and by value."""
    modules = {
        name: (
            id(m),
            m.training,
            {k: dict(v) for k, v in vars(m).items() if k.endswith("_hooks")},
            sorted(vars(m)),
        )
        for name, m in model.named_modules(remove_duplicate=False)
    }
    tensors = {
        name: (id(t), t.data_ptr(), t.requires_grad, t.dtype, t.detach().clone())
        for name, t in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    }
    return modules, tensors


def random_states():
    kind, keys, *rest = numpy.random.get_state()  # noqa: NPY002
    return torch.get_rng_state(), random.getstate(), (kind, keys.tolist(), *rest)


def unique_tensors(model):
    """Name -> tensor of the state dict, each memory once, counted without the help of mono_quant."""
    seen, unique = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def read_weights(folder):
    """Name -> tensor of all weight files, by the official library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@EVERY
def test_every_parameter_is_accounted_for(base, name, dtype):
    c = case(base, name, dtype)
    report, unique = c.result.report, unique_tensors(c.model)
    parameters = {id(p) for p in c.model.parameters()}
    rows = {row.name: row for row in report.rows}
    assert sorted(rows) == sorted(c.model.state_dict()) and len(rows) == len(report.rows)
    for row_name, tensor in c.model.state_dict().items():
        row = rows[row_name]
        assert row.shape == tuple(tensor.shape) and row.dtype_before == str(tensor.dtype).removeprefix(
            "torch."
        )
        assert row.bytes_before == (tensor.nbytes if row_name in unique else 0)
        assert (row.action == "shared") == (row_name not in unique)
        assert row.action == "quantized" or row.reason
    assert report.parameters == sum(p.numel() for p in c.model.parameters())
    assert report.bytes_before == sum(t.nbytes for t in unique.values())
    counted = sum(r.numel for r in report.quantized if id(unique[r.name]) in parameters)
    assert report.quantized_parameters == counted
    assert math.isclose(report.coverage, counted / report.parameters)
    assert {r.dtype_after for r in report.quantized} == {"int8" if dtype == "int8" else "float16"}


@EVERY
def test_the_bytes_in_the_report_are_the_bytes_on_disk(base, name, dtype):
    c = case(base, name, dtype)
    tensors = read_weights(c.folder)
    assert sum(t.nbytes for t in tensors.values()) == c.result.report.bytes_after
    codes = sum(t.numel() for t in tensors.values() if t.dtype == torch.int8)
    assert codes == (c.result.report.quantized_parameters if dtype == "int8" else 0)


@EVERY
def test_the_original_is_untouched(base, name, dtype):
    c = case(base, name, dtype)
    assert c.after[0] == c.before[0]
    assert c.after[1].keys() == c.before[1].keys()
    for tensor_name, (*facts, value) in c.before[1].items():
        *now, current = c.after[1][tensor_name]
        assert now == facts and torch.equal(current, value), tensor_name
    assert torch.equal(c.random_after[0], c.random_before[0]) and c.random_after[1:] == c.random_before[1:]


@EVERY
def test_the_result_has_memory_of_its_own(base, name, dtype):
    c = case(base, name, dtype)
    original = {p.untyped_storage().data_ptr() for p in c.model.parameters()}
    assert not original & {p.untyped_storage().data_ptr() for p in c.result.model.parameters()}
    assert type(c.result.model) is type(c.model)


def expected_error(report, dtype):
    """First-order bound: the relative errors of all layers add up, each passed on with a gain of one.

    int8: the measured noise of each weight, and that of activations of 8 bits or more whose rms is a tenth of the largest.
    fp16: half a unit in the last place (2^-11) of weights, inputs and outputs of each weight matrix.
    """
    matrices = [r for r in report.quantized if len(r.shape) > 1]
    if dtype == "fp16":
        return len(matrices) * 3 * 2**-11
    activations = 1 / (127 * math.sqrt(12)) * 10
    return sum(math.hypot(10 ** (-(r.sqnr_db or 200) / 20), activations) for r in matrices)


@EVERY
def test_the_output_is_close(base, name, dtype):
    c = case(base, name, dtype)
    output = c.output
    assert torch.isfinite(output).all() and output.shape == c.expected.shape
    if dtype == "int8":
        assert output.dtype == c.expected.dtype
    error = relative_error(c.expected, output)
    # bf16 itself rounds every activation to 8 bits, in the model that is compared with as well
    own = 16 * 2**-8 if c.expected.dtype == torch.bfloat16 else 0.0
    assert error <= expected_error(c.result.report, dtype) + own
    assert error <= 0.04
    measured = c.result.report.fidelity
    assert measured is not None and measured["relative_error"] <= 0.04, c.result.report.fidelity_note


@EVERY
def test_loading_gives_the_same_class_and_the_same_bits(base, name, dtype):
    c = case(base, name, dtype)
    factory = FAMILIES[name].build if is_plain(c.model) else None
    loaded = mq.load(c.folder, model=factory)
    assert type(loaded) is type(c.model) and not any(m.training for m in loaded.modules())
    assert torch.equal(run(loaded, c.inputs), c.output)
    ours, theirs = c.result.model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for tensor_name, tensor in ours.items():
        assert tensor.dtype == theirs[tensor_name].dtype and torch.equal(tensor, theirs[tensor_name]), (
            tensor_name
        )
    if dtype == "int8":
        held = sum(p.nbytes for p in loaded.parameters()) + sum(
            b.nbytes for n, b in loaded.named_buffers() if n in theirs
        )
        stored = read_weights(c.folder)
        # in memory scales are fp32, in the file they have the dtype of their weight
        widened = sum(t.numel() * (4 - t.element_size()) for n, t in stored.items() if n.endswith("_scale"))
        assert held == c.result.report.bytes_after + widened


@EVERY
def test_loading_leaves_the_random_states_alone(base, name, dtype):
    c = case(base, name, dtype)
    model = FAMILIES[name].build() if is_plain(c.model) else None
    before = random_states()
    mq.load(c.folder, model=model, verify=False)
    after = random_states()
    assert torch.equal(after[0], before[0]) and after[1:] == before[1:]


@EVERY
def test_the_same_input_gives_the_same_bytes(base, name, dtype, tmp_path):
    c = case(base, name, dtype)
    model = FAMILIES[name].build()
    again = mq.quantize(model, dtype, probe=c.inputs if is_plain(model) else None)
    assert snapshot(again.save(tmp_path / "out")) == snapshot(c.folder)


@EVERY
def test_a_loaded_model_is_saved_with_the_same_tensors(base, name, dtype, tmp_path):
    c = case(base, name, dtype)
    factory = FAMILIES[name].build if is_plain(c.model) else None
    loaded = mq.QuantizedModel.from_folder(c.folder, factory)
    assert loaded.report == c.result.report
    again = snapshot(loaded.save(tmp_path / "out"))
    before = snapshot(c.folder)
    assert again["model.safetensors"] == before["model.safetensors"]
    assert again.keys() == before.keys()
    if "config.json" in before:
        assert again["config.json"] == before["config.json"]


def fake_quantized(model, names, step=None):
    """The float model with int8 weights and fake-quantized inputs, by the definition alone; `step` cuts the largest value.

    Without it, inputs are not rounded.
    """

    def quantize_input(module, args):
        x = args[0].float()
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / step
        return ((x / scale).round().clamp(-128, 127) * scale).to(args[0].dtype), *args[1:]

    model = copy.deepcopy(model)
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight.detach().float()
        axis = 0 if type(module).__name__ == "Conv1D" else 1
        scale = (weight.abs().amax(axis, keepdim=True) / 127).to(module.weight.dtype).float()
        module.weight.data = ((weight / scale).round().clamp(-127, 127) * scale).to(module.weight.dtype)
        if step:
            module.register_forward_pre_hook(quantize_input)
    return model


@pytest.mark.parametrize("name", [*DENSE, "gpt2"])
def test_int8_is_the_definition_and_nothing_else(base, name):
    """A model that fake-quantizes by the formula gives the output of the int8 one, up to float noise."""
    c = case(base, name, "int8")
    if c.expected.dtype == torch.bfloat16:
        pytest.skip("fake quantization rounds to bf16 where the int8 layer does not")
    emulated = fake_quantized(c.model, [r.module for r in c.result.report.quantized], 127)
    with kernels.using("reference"):
        output = run(c.result.model, c.inputs)
    # not equal: a value next to the edge of a step may fall on its other side
    assert relative_error(run(emulated, c.inputs), output) < 0.1 * relative_error(c.expected, output)


VANILLA = """
import json, sys, torch, transformers
from pathlib import Path
base = Path(sys.argv[1])
assert not any(m.startswith("mono_quant") for m in sys.modules)
found = {}
for name, inputs in torch.load(base / "inputs.pt").items():
    cls = getattr(transformers, json.loads((base / name / "config.json").read_text())["architectures"][0])
    try:
        # a float16 checkpoint in float32: exact arithmetic on the same weights
        options = {"dtype": torch.float32} if name.endswith("-fp16") else {}
        model = cls.from_pretrained(base / name, **options).eval()
        half = [p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
        cast = {k: v.to(half[0]) if half and v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            found[name] = model(**cast).logits.clone()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
torch.save(found, base / "vanilla.pt")
"""


@pytest.fixture(scope="module")
def vanilla(base):
    """What transformers makes of the folders, in a process that never heard of mono_quant."""
    names = [(n, d) for n in FAMILIES for d in DTYPES if not is_plain(case(base, n, d).model)]
    torch.save({f"{n}-{d}": case(base, n, d).inputs for n, d in names}, base / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", VANILLA, str(base)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(base / "vanilla.pt")


@pytest.mark.parametrize("name", DENSE)
def test_vanilla_transformers_loads_the_standard_format(base, vanilla, name):
    """It computes in float with the weights that the codes stand for: activations are rounded here alone."""
    c, theirs = case(base, name, "int8"), vanilla[f"{name}-int8"]
    assert isinstance(theirs, torch.Tensor), theirs
    with kernels.using("reference"):
        ours = run(c.result.model, c.inputs)
    modules = [r.module for r in c.result.report.quantized]
    meant, rounded = (run(fake_quantized(c.model, modules, step), c.inputs) for step in (None, 127.0))
    rounding = relative_error(meant, rounded)
    exact = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
    assert relative_error(meant, theirs) <= (1e-5 if exact else 1.5 * rounding)
    assert relative_error(ours, theirs) <= 1.5 * rounding


@pytest.mark.parametrize("name", [*STANDARD, "gpt2"])
def test_vanilla_transformers_in_float32_agrees_with_fp16(base, vanilla, name):
    """The file is a plain checkpoint, and our arithmetic on it is float32: only the order of sums differs."""
    c = case(base, name, "fp16")
    theirs = vanilla[f"{name}-fp16"]
    assert isinstance(theirs, torch.Tensor), theirs
    assert c.output.dtype == torch.float32
    assert relative_error(theirs, c.output) < 32 * 2.0**-24 * len(c.result.report.quantized)


@pytest.mark.parametrize("name", [*MOE, "gpt2"])
def test_vanilla_transformers_stops_at_what_it_cannot_hold(vanilla, name):
    assert isinstance(vanilla[f"{name}-int8"], str), "loaded int8 codes as weights"


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("assign", [False, True])
def test_foreign_loaders_stop_at_our_own_format(base, name, assign):
    c = case(base, name, "int8")
    codes = read_weights(c.folder)
    with pytest.raises(RuntimeError, match="size mismatch"):
        FAMILIES[name].build().load_state_dict(codes, strict=False, assign=assign)
    with pytest.raises(RuntimeError, match="size mismatch"):
        safetensors.torch.load_model(FAMILIES[name].build(), c.folder / "model.safetensors", strict=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_cast_in_memory_loads_bit_for_bit(dtype, tmp_path):
    """`.bfloat16()` also casts tables that are not saved, such as the rotary frequencies."""
    model, inputs = FAMILIES["llama"].build().bfloat16(), FAMILIES["llama"].inputs()
    result = mq.quantize(model, dtype, fidelity=False)
    loaded = mq.load(result.save(tmp_path / "out"))
    assert torch.equal(run(loaded, inputs), run(result.model, inputs))


@pytest.mark.parametrize("name", ["bert", "vit", "mixtral"])
def test_the_standard_format_names_every_float_matrix_in_ignore(base, name):
    c = case(base, name, "int8")
    tensors = read_weights(c.folder)
    block = json.loads((c.folder / "config.json").read_text())["quantization_config"]
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight")
        if tensor.dtype == torch.int8:
            assert tensor.dim() == 2 and tensors[f"{key}_scale"].shape == (tensor.shape[0], 1)
            assert tensors[f"{key}_scale"].dtype == torch.float32
            assert module not in block["ignore"]
        elif key.endswith(".weight") and tensor.dim() == 2:
            assert module in block["ignore"]
