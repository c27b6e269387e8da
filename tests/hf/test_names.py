"""What a checkpoint lacks or has too much is what transformers' own loader says of it, for every kind of conversion."""

import copy

import pytest
import torch
import transformers as hf
from models import transformer
from transformers.core_model_loading import Chunk, Split, WeightConverter, WeightRenaming

from mono_quant.hf.models import quiet
from mono_quant.hf.names import fit, place, scales_follow, unmergeable
from mono_quant.hf.state import checkpoint_state

experts = {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
sizes = {k: v for k, v in transformer.items() if k != "vocab_size"}
MODELS = {
    "plain": (hf.LlamaForCausalLM, hf.LlamaConfig(**transformer)),
    "tied": (hf.LlamaForCausalLM, hf.LlamaConfig(**transformer, tie_word_embeddings=True)),
    "renamed": (hf.ViTModel, hf.ViTConfig(**sizes, image_size=32, patch_size=8)),
    "split": (hf.NomicBertModel, hf.NomicBertConfig(**transformer)),
    "split unevenly": (
        hf.Molmo2TextModel,
        hf.Molmo2TextConfig(**transformer, num_key_value_heads=2, head_dim=16),
    ),
    "reordered": (hf.Step3p7VisionModel, hf.Step3p7VisionConfig(**sizes, image_size=32, patch_size=8)),
    "merged": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**transformer, **experts, moe_intermediate_size=48)),
    "turned": (
        hf.Qwen3VLMoeTextModel,
        hf.Qwen3VLMoeTextConfig(**transformer, **experts, moe_intermediate_size=48),
    ),
    "without prefix": (hf.BertModel, hf.BertConfig(**transformer)),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def skeleton(name):
    cls, config = MODELS[name]
    with torch.device("meta"):
        return cls._from_config(copy.deepcopy(config))


def checkpoint(name):
    model = skeleton("with head") if name == "without prefix" else skeleton(name)
    return checkpoint_state(model)


MODELS["with head"] = (hf.BertForSequenceClassification, hf.BertConfig(**transformer))


def of_transformers(name, tensors):
    """(unexpected, missing, mismatched) of transformers' loader, which gets no data here; None when it merges nothing."""
    cls, config = MODELS[name]
    options = {"device_map": {"": "meta"}, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            _, info = cls.from_pretrained(
                None, config=copy.deepcopy(config), state_dict=dict(tensors), **options
            )
    except RuntimeError as e:
        assert "conversion of the weights" in str(e)
        return None
    wrong = {str(entry[0]) for entry in info["mismatched_keys"]}
    return set(info["unexpected_keys"]), set(info["missing_keys"]), wrong


@EVERY
def test_a_checkpoint_of_the_model_fits(name):
    tensors = checkpoint(name)
    found = fit(skeleton(name), tensors)
    # the head that a base model leaves out
    assert set(found.left) == of_transformers(name, tensors)[0]
    assert bool(found.left) == (name == "without prefix")
    assert not found.missing and not found.wrong and not found.integers
    state = skeleton(name).state_dict()
    assert {n: t.shape for n, t in place(skeleton(name), tensors).tensors.items()} == {
        n: t.shape for n, t in state.items() if not (name == "tied" and n == "lm_head.weight")
    }


def agrees(name, tensors):
    """True when transformers finds something wrong, too, and nothing else."""
    found, oracle = fit(skeleton(name), tensors), of_transformers(name, tensors)
    sentences = {sentence.split()[0].rstrip(":") for sentence in found.wrong}
    if oracle is None:
        return bool(sentences)
    return (set(found.left), set(found.missing), sentences) == oracle and any(oracle)


@EVERY
def test_what_a_checkpoint_lacks_is_what_transformers_misses(name):
    tensors = checkpoint(name)
    for key in list(tensors)[1::7]:
        assert agrees(name, {k: t for k, t in tensors.items() if k != key}), key


@EVERY
def test_what_has_another_shape_is_what_transformers_finds(name):
    tensors = checkpoint(name)
    for key in [k for k, t in tensors.items() if t.dim()][::9]:
        shape = (tensors[key].shape[0] * 2, *tensors[key].shape[1:])
        assert agrees(name, tensors | {key: torch.empty(shape, device="meta")}), key


def test_a_stray_tensor_is_left_and_integers_are_named():
    tensors = checkpoint("split") | {"stray.weight": torch.empty(3, device="meta")}
    key = "encoder.layers.0.attn.Wqkv.weight"
    tensors[key] = torch.empty_like(tensors[key], dtype=torch.int32)
    found = fit(skeleton("split"), tensors)
    assert found.left == ["stray.weight"] and not found.wrong and not found.missing
    assert found.integers == [f"layers.0.self_attn.{p}_proj.weight (of {key}) is torch.int32" for p in "qkv"]


def test_two_names_for_one_tensor_leave_one_over():
    tensors = checkpoint("plain") | {"embed_tokens.weight": torch.empty(200, 64, device="meta")}
    assert of_transformers("plain", tensors)[0] == set()
    assert fit(skeleton("plain"), tensors).left == ["model.embed_tokens.weight"]


def test_scales_go_where_their_codes_go_and_what_is_only_called_a_scale_does_not():
    conversions = [
        WeightRenaming("attn_scale", "attn.scale"),
        WeightRenaming("attn", "self_attn"),
        WeightConverter("qkv.weight", ["q.weight", "k.weight"], [Chunk(dim=0)]),
    ]
    names = ["0.attn.qkv.weight", "0.attn.qkv.weight_scale", "0.attn_scale"]
    renamed = {}
    for name in names:
        renamed[name] = name
        for conversion in scales_follow(conversions, ["0.attn.qkv.weight"], names):
            renamed[name] = conversion.rename_source_key(renamed[name])[0]
    assert list(renamed.values()) == [
        "0.self_attn.q.weight",
        "0.self_attn.q.weight_scale",
        "0.self_attn.scale",
    ]
    assert {type(c) for c in conversions} == {WeightRenaming, WeightConverter}


@pytest.mark.parametrize(
    ("operation", "shapes", "dtypes", "apart"),
    [
        (Chunk(dim=0), [(4, 2), (4, 2)], ["float32", "float32"], False),
        (Chunk(dim=0), [(4, 2), (2, 2)], ["float32", "float32"], True),
        (Split(dim=0), [(4, 2), (2, 2)], ["float32", "float32"], False),
        (Split(dim=0), [(4, 2), (2, 2)], ["int8", "float32"], True),
        (Chunk(dim=0), [(4, 2)], ["float32"], True),
    ],
)
def test_what_could_not_be_taken_apart_again_is_not_merged(operation, shapes, dtypes, apart):
    conversions = [WeightConverter("qkv.weight", ["q.weight", "k.weight"], [operation])]
    parts = {
        f"0.{name}.weight": torch.empty(shape, dtype=getattr(torch, dtype))
        for name, shape, dtype in zip("qk", shapes, dtypes, strict=False)
    }
    assert unmergeable(conversions, parts | {"0.norm.weight": torch.empty(2)}) == (
        set(parts) if apart else set()
    )
