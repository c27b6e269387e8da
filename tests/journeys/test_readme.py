"""The lines of the README, as they stand there, in a fresh folder with a Hub that has what they name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers
import diffusion
import pytest
import transformers as hf
from encoders import tokenizer_into
from loopback_hub import LoopbackHub
from models import FAMILIES

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("mono-quant") and "--install-completion" not in line
]
# What the README leaves to the reader, and what a Hub has.
GIVEN = """
import torch, transformers
my_module = torch.nn.Sequential(torch.nn.Linear(64, 64))
m = transformers.AutoModelForCausalLM.from_pretrained("org/model")
"""


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory, minilm):
    with LoopbackHub() as server:
        server.add_user("me", "hf_" + "x" * 30)
        model = tmp_path_factory.mktemp("model")
        hf.LlamaForCausalLM(FAMILIES["llama"].build().config).save_pretrained(model)
        tokenizer_into(model)
        server.add_repo("org/model", files(model))
        server.add_repo("sentence-transformers/all-MiniLM-L6-v2", files(minilm))
        pipeline = tmp_path_factory.mktemp("pipeline")
        parts = diffusion.build("dit", num_embeds_ada_norm=1000), diffusion.build("vae")
        diffusers.DiTPipeline(*parts, diffusers.DDIMScheduler()).save_pretrained(pipeline)
        server.add_repo("org/pipeline", files(pipeline))
        yield server


@pytest.fixture
def place(hub, tmp_path):
    """How to run something in a folder of its own, with nothing but this Hub to reach."""
    own = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_" + "x" * 30, "HF_HOME": str(tmp_path / "cache")}
    own |= {"HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    own |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    (tmp_path / "work").mkdir()

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path / "work",
            env=os.environ | own,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_every_python_block_runs_as_it_stands(place):
    assert len(BLOCKS) >= 6
    done = place(GIVEN + "\n".join(BLOCKS) + CHECKS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("all there")


CHECKS = """
from pathlib import Path
from mono_quant.convert.int8_layers import Int8Module
def int8(module): return any(isinstance(part, Int8Module) for part in module.modules())
names = {path.name for path in Path("model-int8").iterdir()}
assert {"config.json", "model.safetensors", "README.md", "mono_quant.json", "tokenizer.json"} <= names, names
assert names == {path.name for path in Path("model-int8-again").iterdir()}
assert int8(result.model) and int8(pipe.transformer) and not int8(pipe.vae)
assert any("lora" in name for name, _ in model.named_parameters()) and int8(model)
assert int8(SentenceTransformer("minilm-int8")) is False
with mono_quant.enable():
    assert int8(SentenceTransformer("minilm-int8"))
again = DiffusionPipeline.from_pretrained("pipeline-int8")
assert int8(again.transformer)
print("all there")
"""


def test_every_command_runs_as_it_stands(place):
    assert len(COMMANDS) >= 6
    calls = [shlex.split(command)[1:] for command in COMMANDS]
    code = f"""
from mono_quant.apps import usage
for arguments in {calls!r}:
    print("$", *arguments, flush=True)
    usage.app(arguments, prog_name="mono-quant", standalone_mode=False)
print("all there")
"""
    done = place(code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("all there")


def test_every_command_that_the_readme_names_is_one():
    scripts = set(re.findall(r"(?<![\w/])scripts/([a-z_]+(?:\.[a-z]+)?)", README))
    assert scripts and all((Path(__file__).parents[2] / "scripts" / name).exists() for name in scripts)
