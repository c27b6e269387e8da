"""What fits no memory is measured with its weights in their files: outputs have the bits of the models that are loaded as a whole.

The float model is held against transformers' own loader, the converted one against `load`, and the report's numbers against those
of a conversion in memory.
"""

import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers as hf
from models import FAMILIES, seeded, transformer
from safetensors.torch import load_file, save_file

import mono_quant as mq
from mono_quant.api.apart import original_apart, result_apart
from mono_quant.api.measuring import probe_for
from mono_quant.api.recipe import measured, reference_of
from mono_quant.api.stream_plan import plan_stream
from mono_quant.convert.fidelity import run
from mono_quant.convert.schemes import SCHEMES
from mono_quant.hf.models import quiet
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.planning.config import QuantizationConfig
from mono_quant.sources.source import ACCESS
from mono_quant.sources.streamed import open_streamed
from mono_quant.stream.spec import Found

sizes = {k: v for k, v in transformer.items() if k != "vocab_size"}
grouped = {"num_key_value_heads": 2, "head_dim": 16}
sides = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 128))
}


def deepseek():
    ranks = {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    routing = {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    }
    config = hf.DeepseekV3Config(
        **transformer,
        **ranks,
        **routing,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    )
    return hf.DeepseekV3ForCausalLM(config)


def mamba():
    config = hf.MambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=200, state_size=8, time_step_rank=8
    )
    return hf.MambaForCausalLM(config)


def gemma3():
    layers = ["sliding_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**transformer, **grouped, layer_types=layers, sliding_window=8)
    )


def resnet():
    widths = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}
    config = hf.ResNetConfig(**widths, num_labels=3, image_size=32)
    model = hf.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def llava():
    vision = hf.CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=64)
    text = hf.LlamaConfig(**transformer, num_key_value_heads=2)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=199)
    return hf.LlavaForConditionalGeneration(config)


def rwkv():
    widths = {"hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 128}
    return hf.RwkvForCausalLM(
        hf.RwkvConfig(vocab_size=200, context_length=64, num_hidden_layers=4, rescale_every=2, **widths)
    )


def gpt_oss():
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(**transformer, **grouped, num_local_experts=4, num_experts_per_tok=2)
    )


def clip():
    text = {**transformer, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    return hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    )


def marian():
    # its positions are in no checkpoint
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = hf.MarianConfig(d_model=64, **sides, **special, vocab_size=200, max_position_embeddings=64)
    return hf.MarianMTModel(config)


def swin():
    # tables that it computes in the dtype that it is built in
    windows = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    return hf.Swinv2ForImageClassification(
        hf.Swinv2Config(image_size=32, patch_size=4, num_labels=3, **windows)
    )


def molmo2():
    # a layer of the checkpoint is split into several, by the sizes that the model has
    return hf.Molmo2TextModel(hf.Molmo2TextConfig(**transformer, **grouped))


MODELS = {
    **{name: FAMILIES[name].make for name in ("bert", "llama_tied", "llama_bf16", "gpt2", "vit", "whisper")},
    **{name: FAMILIES[name].make for name in ("mixtral", "qwen3_moe")},
    **{
        f.__name__: f
        for f in (deepseek, mamba, gemma3, resnet, llava, rwkv, gpt_oss, molmo2, clip, marian, swin)
    },
}


def saved(make, folder):
    model = seeded(make).eval()
    with quiet():
        model.save_pretrained(folder)
    return folder, type(model)


def apart(folder, out, report, request, probe=None):
    """The reports of a conversion in memory and of the same measured from the files; what the float model wrote into."""
    seen = set()
    scheme, request = SCHEMES[request.dtype], replace(request, fidelity="auto")
    with (
        open_streamed(folder, ACCESS) as opened,
        open_checkpoint(folder) as stored,
        open_checkpoint(out) as made,
    ):
        reference, note = reference_of(original_apart(opened.source, stored), request, probe, seen)
        plan = plan_stream(opened.source, opened.pieces, request, Found(), {})
        result = result_apart(plan.subject, plan.report, made)
        found = measured(plan.report, scheme, result, reference, note)
    assert (found.fidelity, found.fidelity_note) == (report.fidelity, report.fidelity_note)
    assert found.kernel == report.kernel
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_outputs_have_the_bits_of_loaded_models(name, tmp_path):
    folder, cls = saved(MODELS[name], tmp_path / "in")
    request = QuantizationConfig(fidelity=False)
    out = mq.quantize(folder, fidelity=False).save(tmp_path / "out")
    with quiet():
        theirs = cls.from_pretrained(folder).eval()
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        # sums may take another order in memory that begins anywhere in a file
        tensor.data = tensor.data.clone()
    with (
        open_streamed(folder, ACCESS) as opened,
        open_checkpoint(folder) as stored,
        open_checkpoint(out) as made,
    ):
        with original_apart(opened.source, stored) as subject:
            probe, _ = probe_for(subject, None)
            output = run(subject.core, probe)
        plan = plan_stream(opened.source, opened.pieces, request, Found(), {})
        with result_apart(plan.subject, plan.report, made) as subject:
            converted = run(subject.core, probe)
        assert all(
            p.is_meta for subject in (opened.source.subject, plan.subject) for p in subject.core.parameters()
        )
    assert torch.equal(output.values, run(theirs, probe).values)
    assert torch.equal(converted.values, run(mq.load(out), probe).values)
    assert not torch.equal(converted.values, output.values)


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama_tied", "fp16"), ("qwen3_moe", "int8"), ("rwkv", "int8"), ("marian", "fp16")]
)
def test_a_report_has_the_numbers_of_a_conversion_in_memory(name, dtype, tmp_path):
    folder, _ = saved(MODELS[name], tmp_path / "in")
    result = mq.quantize(folder, dtype, fidelity=True)
    out = result.save(tmp_path / "out")
    seen = apart(folder, out, result.report, result.config)
    assert result.report.fidelity["relative_error"] > 0
    # RWKV divides two matrices in each block
    assert len(seen) == (8 if name == "rwkv" else 0)


def test_an_encoder_is_measured_with_its_own_tokenizer(minilm, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(minilm, folder)
    result = mq.quantize(folder, fidelity=True)
    assert apart(folder, result.save(tmp_path / "out"), result.report, result.config) == set()
    assert "sentences" in result.report.fidelity["probe"]


def test_inputs_of_the_user_go_through_a_whole_encoder(minilm, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(minilm, folder)
    probe = (
        {"input_ids": torch.tensor([[101, 7592, 102]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)},
    )
    result = mq.quantize(folder, probe=probe, fidelity=True)
    apart(folder, result.save(tmp_path / "out"), result.report, result.config, probe)
    assert result.report.fidelity["output"] == "sentence_embedding"


def test_a_file_that_changes_meanwhile_makes_a_note_and_no_number(tmp_path):
    folder, _ = saved(FAMILIES["llama"].make, tmp_path / "in")
    request = QuantizationConfig()
    with open_streamed(folder, ACCESS) as opened, open_checkpoint(folder) as stored:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors, folder / "other.safetensors")
        (folder / "model.safetensors").write_bytes((folder / "other.safetensors").read_bytes())
        reference, note = reference_of(original_apart(opened.source, stored), request, None, set())
    assert reference is None and "changed while it was read" in note
    report = measured(mq.plan(folder), SCHEMES["int8"], nullcontext(), reference, note)
    assert report.fidelity is None and report.fidelity_note == note


# the most that a process grows by while a model runs from its files, float and converted, and while it runs as a whole
GROWTH = """
import sys
from pathlib import Path
import torch, transformers
from mono_quant.api.apart import original_apart, result_apart
from mono_quant.api.measuring import probe_for
from mono_quant.api.stream_plan import plan_stream
from mono_quant.convert.fidelity import run
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.planning.config import QuantizationConfig
from mono_quant.sources.opening import open_source
from mono_quant.sources.source import ACCESS
from mono_quant.sources.streamed import open_streamed
from mono_quant.stream.spec import Found

def anonymous():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

def growth(model, probe, before):
    most = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: most.append(anonymous() - before))
    run(model, probe)
    return max(most)

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
with open_streamed(folder, ACCESS) as opened, open_checkpoint(folder) as stored, open_checkpoint(out) as made:
    small = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=2000)
    with original_apart(opened.source, stored) as subject:
        probe, core = probe_for(subject, None)
    # what is imported and allocated once
    run(transformers.LlamaForCausalLM(small).eval(), probe)
    before = anonymous()
    with original_apart(opened.source, stored) as subject:
        print(growth(subject.core, probe, before))
    plan = plan_stream(opened.source, opened.pieces, QuantizationConfig(fidelity=False), Found(), {})
    before = anonymous()
    with result_apart(plan.subject, plan.report, made) as subject:
        print(growth(subject.core, probe, before))
    before = anonymous()
    print(growth(open_source(folder).read().subject.model, probe, before))
"""


def test_memory_is_that_of_one_module(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 4}
    config = hf.LlamaConfig(**shape, num_key_value_heads=4, vocab_size=2000)
    folder, _ = saved(lambda: hf.LlamaForCausalLM(config), tmp_path / "in")
    out = mq.quantize(folder, fidelity=False).save(tmp_path / "out")
    size = (folder / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, folder, out], capture_output=True, text=True, check=True
    )
    floats, codes, whole = (int(line) for line in done.stdout.split())
    # its largest module, the head, has 2 MB; activations, and what a first run allocates for good, come on top
    assert size > 90 << 20 and whole > 0.9 * size
    assert floats < 32 << 20 and codes < 16 << 20
