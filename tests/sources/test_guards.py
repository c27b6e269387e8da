"""Guards: see the room of this name."""

import warnings

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from models import FAMILIES, relative_error, run, seeded, tiny_llama
from sources import QUIET, VERBS
from torch import nn
from torch.nn.utils import prune

import mono_quant as mq
from mono_quant.errors import (
    AdapterAttachedError,
    AlreadyQuantizedError,
    MetaTensorError,
    SourceNotFoundError,
    StateDictError,
    TorchScriptError,
    WrappedModelError,
)
from mono_quant.planning import rows

# peft asks transformers for an attribute that was renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def plain():
    return seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(plain())


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(plain(), torch.zeros(1, 64))


def on_meta():
    with torch.device("meta"):
        return plain()


def offloaded():
    model = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched():
    return dispatch_model(plain(), {"0": "cpu", "1": "cpu", "2": "cpu"}, force_hooks=True)


def claims_to_be_quantized():
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return model


def with_a_foreign_layer():
    """Stands for torchao, bitsandbytes and the like, which are told by the package of the class."""
    layer = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    return nn.Sequential(layer(64, 64))


OBJECTS = {
    "state_dict": (
        lambda: plain().state_dict(),
        StateDictError,
        r"^the OrderedDict with 4 entries is weights.*load_state_dict\(\.\.\.\).*pass the model",
    ),
    "scripted": (scripted, TorchScriptError, "convert the Python module before scripting"),
    "traced": (traced, TorchScriptError, "convert the Python module before scripting"),
    "scripted_inside": (
        lambda: nn.Sequential(nn.Linear(64, 64), scripted()),
        TorchScriptError,
        r"^1 \(RecursiveScriptModule\) is TorchScript.*put the Python module there",
    ),
    "compiled": (
        lambda: torch.compile(plain(), backend="eager"),
        TorchScriptError,
        r"_orig_mod.*compile the result",
    ),
    "data_parallel": (
        lambda: nn.DataParallel(plain()),
        WrappedModelError,
        r"pass the model inside it \(\.module\)",
    ),
    "meta": (on_meta, MetaTensorError, r"0\.weight is on the meta device.*load the weights first"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(64)), MetaTensorError, "run the model once"),
    "offloaded": (
        offloaded,
        (MetaTensorError, WrappedModelError),
        "without offloading|remove_hook_from_module",
    ),
    "dispatched": (dispatched, WrappedModelError, "remove_hook_from_module"),
    "ours": (lambda: mq.quantize(plain(), **QUIET).model, AlreadyQuantizedError, "pass the float model"),
    "ours_nested": (
        lambda: nn.Sequential(nn.ReLU(), mq.quantize(plain(), **QUIET).model),
        AlreadyQuantizedError,
        r"1\.0 \(Int8Linear\)",
    ),
    "ours_llama": (
        lambda: mq.quantize(tiny_llama(), **QUIET).model,
        AlreadyQuantizedError,
        "pass the float model",
    ),
    "config_says_quantized": (claims_to_be_quantized, AlreadyQuantizedError, "pass the float model"),
    "foreign_layer": (with_a_foreign_layer, AlreadyQuantizedError, "bitsandbytes.*pass the float model"),
    "number": (
        lambda: 3,
        SourceNotFoundError,
        "an object of type int is no model; pass an nn.Module, a folder, or a Hub id",
    ),
    "none": (lambda: None, SourceNotFoundError, "type NoneType is no model"),
    "class": (lambda: nn.Linear, SourceNotFoundError, "pass an nn.Module"),
    "list": (lambda: [plain()], SourceNotFoundError, "type list is no model"),
}


@VERBS
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_of_the_wrong_kind_names_the_remedy(name, verb):
    make, error, match = OBJECTS[name]
    with pytest.raises(error, match=match):
        verb(make())


def lora():
    peft = pytest.importorskip("peft")
    return peft, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def wrapped_by_peft():
    peft, config = lora()
    return peft.get_peft_model(tiny_llama(), config)


def carrying_peft():
    model = tiny_llama()
    model.add_adapter(lora()[1])
    return model


def injected_by_peft():
    peft, config = lora()
    return peft.inject_adapter_in_model(config, tiny_llama())


@pytest.mark.parametrize("attach", [wrapped_by_peft, carrying_peft, injected_by_peft])
def test_attached_adapters_are_refused_and_merged_ones_are_fine(attach):
    with pytest.raises(AdapterAttachedError, match=r"merge_and_unload\(\) first and pass the result"):
        mq.quantize(attach())


def test_a_merged_adapter_is_quantized():
    assert mq.quantize(wrapped_by_peft().merge_and_unload(), **QUIET).report.quantized


@pytest.fixture
def process_group(tmp_path):
    distributed = torch.distributed
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_distributed_wrappers_name_the_remedy(process_group):
    with pytest.raises(WrappedModelError, match=r"DistributedDataParallel.*\.module"):
        mq.quantize(nn.parallel.DistributedDataParallel(plain()))
    sharded = plain()
    process_group.fsdp.fully_shard(sharded, mesh=process_group.init_device_mesh("cpu", (1,)))
    with pytest.raises(WrappedModelError, match=r"FSDP.*gather it into one plain model"):
        mq.quantize(sharded)


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "subclass"])
def test_layers_that_compute_their_weight_stay_float_with_a_reason(wrap):
    model = plain()
    if wrap == "subclass":
        model[0].__class__ = type(
            "Doubled", (nn.Linear,), {"forward": lambda s, x: 2 * nn.Linear.forward(s, x)}
        )
    else:
        getattr(nn.utils.parametrizations, wrap)(model[0])
    model.eval()
    x = seeded(lambda: torch.randn(3, 64))
    result = mq.quantize(model, **QUIET)
    assert [r.module for r in result.report.quantized] == ["2"]
    assert any("parametrized" in r.reason or "subclass of Linear" in r.reason for r in result.report.skipped)
    assert relative_error(model(x), result.model(x)) < 0.02


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "compute",
    [nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)],
    ids=["weight_norm", "prune"],
)
@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_hooks_that_compute_a_weight_do_not_keep_the_rest_from_being_converted(compute, dtype, tmp_path):
    model = seeded(
        lambda: nn.Sequential(compute(nn.Conv1d(64, 64, 3)), nn.Linear(7, 96), nn.Linear(96, 96))
    ).eval()
    x = seeded(lambda: torch.randn(2, 64, 9))
    before, state = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = mq.quantize(model, dtype, **QUIET)
    assert result.model[0].weight is not model[0].weight
    assert relative_error(before, result.model(x)) < 0.02
    assert torch.equal(before, model(x))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    loaded = mq.load(result.save(tmp_path / "out"), model)
    assert torch.equal(loaded(x), result.model(x))


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("bias", [True, False])
def test_falcon_is_converted_and_comes_back(bias, dtype, tmp_path):
    """Its layers are a subclass of `nn.Linear` that computes the same."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
    model = seeded(
        lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bias=bias))
    ).eval()
    inputs = FAMILIES["llama"].inputs()
    result = mq.quantize(model, dtype, **QUIET)
    if dtype == "int8":
        layers = {row.module.rpartition(".")[2] for row in result.report.quantized}
        assert layers == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert relative_error(run(model, inputs), run(result.model, inputs)) < 0.03
    loaded = mq.load(result.save(tmp_path / "out"))
    assert torch.equal(run(loaded, inputs), run(result.model, inputs))


def int8_notes(model, **options):
    report = mq.quantize(model, **QUIET, **options)
    return list(rows.int8_notes(report.report.rows, report.model))


def test_a_conversion_that_changes_nothing_says_so_with_the_usual_reason():
    tiny = [nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 8), nn.Conv3d(2, 2, 2)]
    assert int8_notes(nn.Sequential(*tiny)) == [
        "NO LAYER BECAME INT8: 3 of 4 layers kept: short rows: 8 weights share one scale, fewer than 16"
    ]
    assert int8_notes(nn.Sequential(nn.LayerNorm(8))) == [
        "NO LAYER BECAME INT8: it holds no layer with a weight matrix"
    ]
    assert list(rows.int8_notes(mq.plan(nn.Sequential(nn.LayerNorm(8))).rows)) != []
    assert int8_notes(plain()) == []


def test_values_that_are_not_finite_outside_of_int8_are_named():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    model.register_buffer("mask", torch.full((4, 4), -torch.inf))
    with torch.no_grad():
        model[0].bias[3], model[1].weight[5] = torch.inf, torch.nan
    model[2].running_mean[1] = torch.nan
    (note,) = int8_notes(model)
    assert "'0.bias', '1.weight', '2.running_mean'; check the original model" in note
