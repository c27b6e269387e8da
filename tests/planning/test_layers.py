"""What counts as a layer: exact names, kinds, sizes, default rules and reasons, on plain and transformers models."""

import diffusion
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mono_quant.convert.int8 import INT8_LAYERS
from mono_quant.planning.kinds import PORTABLE_KINDS, kind_of, weights_of
from mono_quant.planning.layers import declared_float32, find_layers
from mono_quant.planning.walk import is_transformers_model, tensor_names


def found(model):
    """Layers as name: (kind, rows, depth, rules, reason)."""
    return {x.name: (x.kind, x.rows, x.depth, set(x.defaults), x.unsupported) for x in find_layers(model)}


def kinds(model):
    return {x.name: x.kind for x in find_layers(model)}


def rules(model, *names):
    """Default rules by layer, for the given endings or for all layers that have any."""
    marked = {x.name: set(x.defaults) for x in find_layers(model)}
    return {n: r for n, r in marked.items() if (any(n.endswith(e) for e in names) if names else r)}


# Plain modules


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Linear(7, 5), ("linear", 5, 7, set(), "")),
        (lambda: nn.Conv1d(4, 6, 3, groups=2), ("conv1d", 6, 6, set(), "")),
        (lambda: nn.Conv2d(4, 6, (3, 2)), ("conv2d", 6, 24, set(), "")),
        (lambda: nn.Embedding(9, 5), ("embedding", 9, 5, {"embedding"}, "")),
        (lambda: nn.MultiheadAttention(8, 2), ("attention", 32, 8, set(), "")),
        (lambda: nn.LSTM(8, 4), ("lstm", 24, 8, set(), "")),
        (lambda: nn.GRU(24, 40), ("gru", 192, 40, set(), "")),
        (lambda: nn.RNNCell(40, 24), ("rnn_cell", 38, 40, set(), "")),
        (lambda: nn.Conv3d(2, 3, 2), ("Conv3d", 1, 48, set(), "no int8 form of Conv3d")),
        (lambda: nn.ConvTranspose1d(2, 3, 2), ("ConvTranspose1d", 1, 12, set(), "no int8 form of ConvTranspose1d")),
        (lambda: nn.Bilinear(3, 4, 5), ("Bilinear", 1, 60, set(), "no int8 form of Bilinear")),
    ],
)  # fmt: skip
def test_each_kind_of_layer_has_its_rows_and_depth(make, expected, device):
    with torch.device(device):
        model = nn.ModuleDict({"x": make()})
    assert found(model) == {"x": expected}


def test_a_layer_may_be_the_whole_model():
    assert found(nn.Linear(7, 5)) == {"": ("linear", 5, 7, set(), "")}
    assert found(nn.MultiheadAttention(8, 2)) == {"": ("attention", 32, 8, set(), "")}


def test_norms_activations_and_vectors_are_no_layers():
    model = nn.Sequential(nn.LayerNorm(8), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.PReLU(8), nn.ReLU())
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 8)))
    assert find_layers(model) == []


def test_gpt2_conv1d_has_its_columns_as_rows():
    assert found(hf.pytorch_utils.Conv1D(5, 7)) == {"": ("transposed_linear", 5, 7, set(), "")}


def test_a_foreign_class_named_conv1d_is_not_gpt2s():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(7, 5))

    assert found(Conv1D()) == {"": ("Conv1D", 1, 35, set(), "no int8 form of Conv1D")}


def test_attention_is_one_layer_with_its_projections():
    model = nn.TransformerEncoderLayer(8, 2, 12)
    assert kinds(model) == {"self_attn": "attention", "linear1": "linear", "linear2": "linear"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 4}, "attention with different key or value sizes"),
        ({"vdim": 4}, "attention with different key or value sizes"),
        ({"add_bias_kv": True}, "attention with bias_k, bias_v or add_zero_attn"),
        ({"add_zero_attn": True}, "attention with bias_k, bias_v or add_zero_attn"),
        ({"bias": False}, ""),
    ],
)
def test_attention_of_another_form_is_kept_with_its_reason(options, reason):
    assert found(nn.MultiheadAttention(8, 2, **options)) == {"": ("attention", 32, 8, set(), reason)}


def test_attention_with_a_parametrized_projection_is_kept():
    model = nn.MultiheadAttention(8, 2)
    parametrizations.spectral_norm(model.out_proj)
    assert all(x.unsupported for x in find_layers(model))


@pytest.mark.parametrize("make", [lambda size: nn.LSTM(size, 40, 2), lambda size: nn.GRUCell(size, 40)])
def test_a_recurrent_layer_keeps_matrices_with_short_rows_in_float_where_it_has_longer_ones(make):
    few, enough = make(15), make(16)
    assert set(weights_of(enough)) - set(weights_of(few)) == {next(n for n, _ in enough.named_parameters())}
    assert found(few)[""][2:] == found(enough)[""][2:] == (40, set(), "")
    # what the rules say of it as a whole is said of its longest rows
    assert set(weights_of(nn.LSTM(15, 8))) == {"weight_ih_l0", "weight_hh_l0"}


def shared_inside():
    lstm = nn.LSTM(16, 16, 2)
    lstm.weight_hh_l1 = lstm.weight_hh_l0
    return lstm


def dropped_weight():
    gru = nn.GRU(16, 16)
    gru.raw = nn.Parameter(gru.weight_hh_l0.detach())
    del gru.weight_hh_l0
    return gru


def buffer_for_a_bias():
    cell = nn.LSTMCell(16, 16)
    bias = cell.bias_hh.detach()
    del cell.bias_hh
    cell.register_buffer("bias_hh", bias)
    return cell


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (shared_inside, "two of its weights are one tensor"),
        (dropped_weight, "computed at every forward"),
        (buffer_for_a_bias, "computed at every forward"),
        (lambda: prune.l1_unstructured(nn.LSTM(16, 16), "weight_hh_l0", 0.5), "computed at every forward"),
        (lambda: parametrizations.weight_norm(nn.GRU(16, 16), "weight_hh_l0"), "computed at every forward"),
        (lambda: type("Mine", (nn.LSTM,), {})(16, 16), "Mine is a subclass of LSTM"),
    ],
)
def test_a_recurrent_layer_of_another_form_is_kept_with_its_reason(make, reason):
    (layer, *_) = find_layers(make())
    assert reason in layer.unsupported


class Odd(nn.Linear):
    pass


class OddAttention(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Odd(8, 8), "Odd is a subclass of Linear and may compute something else"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), "is a subclass of Linear"),
        (OddAttention(8, 2), "OddAttention is a subclass of MultiheadAttention"),
    ],
)
def test_subclasses_are_kept_with_a_reason(module, reason):
    assert kind_of(module) == ""
    assert all(reason in x.unsupported for x in find_layers(module) if not x.name)
    assert find_layers(module)[0].unsupported


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "make",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda m: parametrize.register_parametrization(m, "weight", Double()) or m,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "custom", "prune"],
)
def test_a_weight_computed_at_every_forward_is_never_int8_and_says_so(make):
    layers = find_layers(nn.Sequential(make(nn.Linear(8, 6)), nn.Linear(6, 6)))
    assert [x.name for x in layers if not x.unsupported] == ["1"]
    assert "computed at every forward" in layers[0].unsupported


@pytest.mark.parametrize("make", [nn.LazyLinear, lambda n: nn.LazyConv2d(n, 3)])
def test_a_lazy_layer_without_weights_is_reported_not_a_crash(make):
    (layer,) = find_layers(nn.Sequential(make(4)))
    assert (layer.name, layer.kind) == ("0", type(make(4)).__name__)
    assert "has no weights yet: run the model once first" in layer.unsupported


def test_a_lazy_layer_that_has_run_is_plain():
    model = nn.Sequential(nn.LazyLinear(5))
    model(torch.zeros(1, 7))
    assert found(model) == {"0": ("linear", 5, 7, set(), "")}


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_weight_that_is_no_float_is_kept(dtype):
    model = nn.Linear(7, 5)
    model._parameters["weight"] = nn.Parameter(torch.zeros(5, 7).to(dtype), requires_grad=False)
    assert found(model)[""][-1] == f"its weight is {dtype}, not a float matrix"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_can_become_int8(dtype):
    assert found(nn.Linear(7, 5).to(dtype))[""][-1] == ""


def test_rows_too_long_for_exact_sums_are_kept():
    with torch.device("meta"):
        assert found(nn.Linear(132_104, 2))[""][-1] == ""
        assert (
            "132105 inputs: an int32 sum could overflow above 132104" in found(nn.Linear(132_105, 2))[""][-1]
        )


def test_an_embedding_that_renormalises_itself_is_kept():
    assert "max_norm" in found(nn.Embedding(9, 5, max_norm=1.0))[""][-1]


# Sharing


def test_a_module_used_twice_is_one_layer_with_an_alias():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"again": shared}), "c": nn.Linear(8, 8)})
    layers = find_layers(model)
    assert [(x.name, x.aliases, set(x.defaults)) for x in layers] == [
        ("a", ("b.again",), set()),
        ("c", (), set()),
    ]


def test_two_modules_with_one_parameter_are_tied():
    model = nn.ModuleDict({"emb": nn.Embedding(9, 8), "out": nn.Linear(8, 9), "free": nn.Linear(8, 8)})
    model["out"].weight = model["emb"].weight
    assert rules(model) == {"emb": {"embedding", "tied"}, "out": {"tied"}}


def test_a_projection_of_attention_that_is_tied_ties_the_attention():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "other": nn.Linear(8, 8)})
    model["other"].weight = model["attn"].out_proj.weight
    assert rules(model) == {"attn": {"tied"}, "other": {"tied"}}


def test_a_shared_bias_ties_nothing():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].bias = model["a"].bias
    assert rules(model) == {}


# Heads, routers and declared float32


def stack(**children):
    return nn.ModuleDict({"body": nn.Linear(8, 8), **children})


@pytest.mark.parametrize(
    "name", ["lm_head", "classifier", "score", "qa_outputs", "proj_out", "classification_head", "head"]
)
def test_a_layer_with_the_name_of_a_head_is_one(name):
    assert rules(stack(**{name: nn.Linear(8, 2)})) == {name: {"head"}}


def test_the_last_layer_below_a_head_is_the_head():
    head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert rules(stack(classifier=head)) == {"classifier.2": {"head"}}


def test_the_projection_of_a_block_is_no_head_and_that_of_the_whole_model_is():
    blocks = nn.ModuleList(nn.ModuleDict({"proj_out": nn.Linear(8, 8)}) for _ in range(2))
    assert rules(stack(blocks=blocks, proj_out=nn.Linear(8, 2))) == {"proj_out": {"head"}}


def test_in_a_sequence_of_whole_models_the_last_head_is_the_output():
    model = nn.Sequential(stack(classifier=nn.Linear(8, 8)), stack(classifier=nn.Linear(8, 8)))
    assert rules(model) == {"1.classifier": {"head"}}


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("dit", {"proj_out_2"}),
        ("flux", {"proj_out"}),
        ("sd3", {"proj_out"}),
        ("wan", {"proj_out"}),
        ("unet", set()),
        ("vae", set()),
    ],
)
def test_of_a_diffusion_model_only_the_outermost_projection_is_a_head(name, heads):
    assert {n for n, r in rules(diffusion.build(name)).items() if "head" in r} == heads


def test_the_router_of_a_block_is_called_one():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_sparse_encoder_layers": 1}
    config = hf.SwitchTransformersConfig(
        vocab_size=32, **sizes, num_layers=1, num_decoder_layers=1, num_experts=2
    )
    with torch.device("meta"):
        model = hf.SwitchTransformersForConditionalGeneration(config)
    found = rules(model, "router.classifier")
    assert found and set.union(*found.values()) == {"router"}


def test_the_pooler_is_kept_and_a_head_of_attention_is_not_an_output():
    model = stack(
        pooler=nn.ModuleDict({"dense": nn.Linear(8, 8)}), attn=nn.ModuleDict({"head": nn.Linear(8, 8)})
    )
    assert rules(model) == {"pooler.dense": {"head"}}


def test_routers_are_named_exactly():
    model = stack(
        gate=nn.Linear(8, 4),
        router=nn.Linear(8, 4),
        shared_expert_gate=nn.Linear(8, 4),
        gate_proj=nn.Linear(8, 4),
    )
    assert rules(model) == {n: {"router"} for n in ("gate", "router", "shared_expert_gate")}


def test_what_is_declared_to_need_float32_is_looked_for_in_the_names_of_tensors_as_transformers_does():
    model = nn.ModuleDict({
        "wo": nn.Linear(8, 8),
        "two": nn.Linear(8, 8),
        "x": nn.ModuleDict({"gate": nn.Linear(8, 8), "gate_weight_proj": nn.Linear(8, 8)}),
    })
    model._keep_in_fp32_modules = ["wo"]
    assert rules(model, "wo", "proj") == {n: {"keep_in_fp32"} for n in ("wo", "two")} | {
        "x.gate_weight_proj": set()
    }
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = None, ["x*t_pr", "gate.weight"]
    assert rules(model, "wo", "gate", "proj") == {
        "wo": set(), "two": set(), "x.gate": {"keep_in_fp32", "router"}, "x.gate_weight_proj": {"keep_in_fp32"}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, {"a.weight", "a.bias", "b.bias", "mean"}),
        (torch.float16, {"a.weight", "a.bias", "b.bias", "mean"}),
        (torch.bfloat16, {"b.bias", "mean"}),
        (torch.float32, set()),
        (torch.float64, set()),
    ],
)
@pytest.mark.parametrize("outer", [lambda model: model, lambda model: nn.Sequential(nn.ReLU(), model)])
def test_which_declarations_are_in_force_depends_on_the_dtype(outer, dtype, expected):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = (
        {"a"},
        ["b.b*s", "mean", "count", "table"],
    )
    model.register_buffer("mean", torch.ones(4))
    model.register_buffer("count", torch.ones(4, dtype=torch.int64))
    model.register_buffer("table", torch.ones(4), persistent=False)
    whole = outer(model)
    prefix = "" if whole is model else "1."
    assert declared_float32(whole, dtype) == {f"{prefix}{name}" for name in expected}


def test_a_model_speaks_for_the_ones_inside_it_and_others_declare_nothing():
    inner = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "inner": inner})
    inner._keep_in_fp32_modules = ["^b"]
    assert declared_float32(model) == {"inner.b.weight", "inner.b.bias"}
    model._keep_in_fp32_modules = ["a.w", *inner._keep_in_fp32_modules]
    assert declared_float32(model) == {"a.weight", "inner.a.weight"}
    assert declared_float32(nn.Linear(2, 2)) == set()


# transformers

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLAMA = {**SIZES, "num_key_value_heads": 1}


def meta(cls, config):
    with torch.device("meta"):
        return cls(config)


def attention_layers(prefix, key_rows=8):
    sizes = {"q_proj": 16, "k_proj": key_rows, "v_proj": key_rows, "o_proj": 16}
    return {f"{prefix}.{n}": ("linear", r, 16, set(), "") for n, r in sizes.items()}


def around(layers, tied=()):
    return {
        "model.embed_tokens": ("embedding", 32, 16, {"embedding", *tied}, ""),
        **attention_layers("model.layers.0.self_attn"),
        **layers,
        "lm_head": ("linear", 32, 16, {"head", *tied}, ""),
    }


@pytest.mark.parametrize("tie", [True, False])
def test_llama(tie):
    model = meta(hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA, tie_word_embeddings=tie))
    mlp = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
    expected = {f"model.layers.0.mlp.{n}": ("linear", *size, set(), "") for n, size in mlp.items()}
    assert is_transformers_model(model)
    assert found(model) == around(expected, ["tied"] if tie else [])


def router(cls):
    return (cls, 1, 64, {"router"}, f"no int8 form of {cls}")


def test_mixtral_experts_are_one_layer():
    model = meta(hf.MixtralForCausalLM, hf.MixtralConfig(**LLAMA, num_local_experts=4))
    assert found(model) == around({
        "model.layers.0.mlp.gate": router("MixtralTopKRouter"),
        "model.layers.0.mlp.experts": ("experts", 4 * (48 * 16 + 16 * 24) // 24, 24, set(), ""),
    })


def test_qwen3_moe_experts_are_one_layer():
    config = hf.Qwen3MoeConfig(
        **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8, mlp_only_layers=[]
    )
    assert found(meta(hf.Qwen3MoeForCausalLM, config)) == around({
        "model.layers.0.mlp.gate": router("Qwen3MoeTopKRouter"),
        "model.layers.0.mlp.experts": ("experts", 4 * (16 * 16 + 16 * 8) // 16, 16, set(), ""),
    })


def test_gpt_oss_experts_are_reported_as_an_unknown_layout():
    config = hf.GptOssConfig(**LLAMA, num_local_experts=4, head_dim=8, layer_types=["full_attention"])
    reason = "GptOssExperts: experts of a layout that is not known here"
    matrices = 4 * (16 * 48 + 48 + 24 * 16 + 16)
    assert found(meta(hf.GptOssForCausalLM, config)) == around({
        "model.layers.0.mlp.router": router("GptOssTopKRouter"),
        "model.layers.0.mlp.experts": ("GptOssExperts", 1, matrices, set(), reason),
    })


def test_experts_that_only_look_like_mixtrals_are_not_taken_for_them():
    class Clamped(MixtralExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states.clamp(-1, 1), top_k_index, top_k_weights)

    Clamped.__module__ = "transformers.models.clamped.modeling_clamped"
    config = hf.MixtralConfig(**LLAMA, num_local_experts=4)
    assert kind_of(meta(MixtralExperts, config)) == "experts"
    assert kind_of(meta(Clamped, config)) == ""
    (layer,) = find_layers(meta(Clamped, config))
    assert layer.unsupported == "Clamped: experts of a layout that is not known here"


def test_gpt2():
    config = hf.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=1
    )
    block = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
    assert found(meta(hf.GPT2LMHeadModel, config)) == {
        "transformer.wte": ("embedding", 32, 16, {"embedding", "tied"}, ""),
        "transformer.wpe": ("embedding", 8, 16, {"embedding"}, ""),
        **{f"transformer.h.0.{n}": ("transposed_linear", *s, set(), "") for n, s in block.items()},
        "lm_head": ("linear", 32, 16, {"head", "tied"}, ""),
    }


def test_a_bert_classifier():
    model = meta(hf.BertForSequenceClassification, hf.BertConfig(**SIZES, max_position_embeddings=8))
    assert rules(model) == {
        **{f"bert.embeddings.{n}_embeddings": {"embedding"} for n in ("word", "position", "token_type")},
        "bert.pooler.dense": {"head"},
        "classifier": {"head"},
    }
    linear = [n for n, kind in kinds(model).items() if kind == "linear"]
    layer = "bert.encoder.layer.0"
    assert linear == [
        *(f"{layer}.attention.self.{n}" for n in ("query", "key", "value")),
        f"{layer}.attention.output.dense",
        f"{layer}.intermediate.dense",
        f"{layer}.output.dense",
        "bert.pooler.dense",
        "classifier",
    ]


def test_t5_ties_three_tables_to_the_head_and_keeps_wo_in_float32():
    model = meta(
        hf.T5ForConditionalGeneration,
        hf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2),
    )
    tables = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias"
    assert rules(model) == {
        **{n: {"embedding", "tied"} for n in tables},
        "lm_head": {"head", "tied"},
        **{f"{side}.{bias}": {"embedding"} for side in ("encoder", "decoder")},
        "encoder.block.0.layer.1.DenseReluDense.wo": {"keep_in_fp32"},
        "decoder.block.0.layer.2.DenseReluDense.wo": {"keep_in_fp32"},
    }


def test_convolutions_in_a_transformer_are_marked_and_in_a_convolutional_model_they_are_not():
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    vit = meta(hf.ViTForImageClassification, hf.ViTConfig(**sizes, image_size=8, patch_size=4))
    assert rules(vit, "projection") == {"vit.embeddings.patch_embeddings.projection": {"portable"}}
    resnet = meta(
        hf.ResNetForImageClassification,
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    )
    parakeet = meta(
        hf.ParakeetForRNNT,
        hf.ParakeetRNNTConfig(
            vocab_size=12,
            decoder_hidden_size=16,
            encoder_config={
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 999,
            },
        ),
    )
    assert rules(parakeet, "lstm") == {"decoder.lstm": {"portable"}}
    encodec = meta(hf.EncodecModel, hf.EncodecConfig(num_filters=4, hidden_size=16))
    assert kinds(encodec)["encoder.layers.13.lstm"] == "lstm"
    assert rules(encodec, "lstm") == {"encoder.layers.13.lstm": set(), "decoder.layers.1.lstm": set()}
    convs = [x for x in find_layers(resnet) if x.kind == "conv2d"]
    assert len(convs) > 4 and not any(x.defaults for x in convs)
    assert rules(resnet) == {"classifier.1": {"head"}}
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(64, 64))
    assert rules(plain) == {}


def test_attention_blocks_in_a_transformer_are_marked_like_convolutions():
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    model = meta(hf.SiglipVisionModel, hf.SiglipVisionConfig(**sizes, image_size=8, patch_size=4))
    assert kinds(model)["head.attention"] == "attention"
    assert rules(model, "attention", "patch_embedding") == {
        "embeddings.patch_embedding": {"portable"},
        "head.attention": {"portable"},
    }


def test_falcons_linear_layers_are_linear():
    assert kind_of(FalconLinear(8, 6)) == "linear"
    assert kind_of(type("FalconLinear", (nn.Linear,), {"forward": FalconLinear.forward})(8, 6)) == ""
    doubled = type("Doubled", (FalconLinear,), {"__module__": FalconLinear.__module__})
    assert kind_of(doubled(8, 6)) == ""


def test_another_forward_of_transformers_is_not_linear():
    def forward(self, input):
        return 2 * (input @ self.weight.T)

    members = {"forward": forward, "__module__": "transformers.models.odd"}
    assert kind_of(type("OddLinear", (nn.Linear,), members)(8, 6)) == ""


def test_whisper_ties_its_head_and_keeps_its_own_embedding_class():
    sides = {f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    sizes = {
        "vocab_size": 32,
        "d_model": 16,
        "num_mel_bins": 8,
        "max_source_positions": 8,
        "max_target_positions": 8,
    }
    model = meta(hf.WhisperForConditionalGeneration, hf.WhisperConfig(**sizes, **sides, **tokens))
    layers = found(model)
    assert layers["proj_out"] == ("linear", 32, 16, {"head", "tied"}, "")
    assert layers["model.encoder.conv1"] == ("conv1d", 16, 24, {"portable"}, "")
    assert layers["model.decoder.embed_positions"][-1] == (
        "WhisperPositionalEmbedding is a subclass of Embedding and may compute something else"
    )


# Names of tensors


def test_every_tensor_is_listed_under_every_name_and_temporary_buffers_are_not():
    shared = nn.Linear(3, 2, bias=False)
    model = nn.ModuleDict({"a": shared, "b": shared, "bn": nn.BatchNorm1d(2)})
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    listed = list(tensor_names(model))
    assert {n for n, _, _ in listed} == set(model.state_dict())
    assert {n for n, _, is_buffer in listed if is_buffer} == {n for n, _ in model.named_buffers()} - {"cache"}
    state = model.state_dict(keep_vars=True)
    assert all(tensor is state[name] for name, tensor, _ in listed)


def test_each_kind_says_which_parameters_become_int8():
    modules = {
        "linear": nn.Linear(3, 2),
        "transposed_linear": hf.pytorch_utils.Conv1D(3, 2),
        "conv1d": nn.Conv1d(3, 2, 1),
        "conv2d": nn.Conv2d(3, 2, 1),
        "embedding": nn.Embedding(3, 2),
        "attention": nn.MultiheadAttention(4, 2),
        "experts": meta(MixtralExperts, hf.MixtralConfig(**LLAMA)),
        "lstm": nn.LSTM(16, 32, 2, bidirectional=True, proj_size=16),
        "gru": nn.GRU(16, 32),
        "rnn": nn.RNN(16, 32),
        "lstm_cell": nn.LSTMCell(16, 32),
        "gru_cell": nn.GRUCell(16, 32),
        "rnn_cell": nn.RNNCell(16, 32),
    }
    assert modules.keys() == INT8_LAYERS.keys() > PORTABLE_KINDS
    for kind, module in modules.items():
        matrices = {n for n, p in module.named_parameters() if p.dim() > 1}
        assert kind_of(module) == kind and set(weights_of(module)) == matrices
