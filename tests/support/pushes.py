"""What tests of io/hub share."""

import hashlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import Repo

from mono_quant import errors
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.push import PushResult, push
from mono_quant.io.hub.target import PushOptions, open_target
from mono_quant.io.hub.uploads import gather

ANN = "hf_" + "AnnsCanaryToken" * 2 + "xyz1"
BOB = "hf_" + "BobsCanaryToken" * 2 + "xyz2"
READER = "hf_" + "ReadersCanaryTok" * 2 + "z3"
TOKENS = (ANN, BOB, READER)
LOGGERS = ("huggingface_hub", "mono_quant", "httpx2", "httpcore2")
TRANSIENT = ("500", "503", "429", "drop", "truncate", "apply-then-drop", "apply-then-500")


def safetensors(shape: tuple[int, ...], *, pad: int = 0, fill: bytes = b"\1") -> bytes:
    """Return a file with one int8 tensor; `pad` makes its header longer."""
    size = 1
    for side in shape:
        size *= side
    fields: dict[str, Any] = {"w": {"dtype": "I8", "shape": shape, "data_offsets": [0, size]}}
    if pad:
        fields["__metadata__"] = {"pad": "x" * pad}
    header = json.dumps(fields).encode()
    return len(header).to_bytes(8, "little") + header + fill * size


README = b"""---
license: other
license_name: acme
license_link: https://example.org/license
language: [en, de]
datasets: some/data
pipeline_tag: fill-mask
extra_gated_prompt: Please agree
---
# Model
"""
SOURCE = {
    "README.md": README,
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": safetensors((13, 17)),
    "pytorch_model.bin": b"a pickle that nobody wants",
}
FINISHED = {
    "README.md": b"---\nlicense: mit\n---\n# Quantized\n",
    "config.json": b'{"quantized": true}',
    "model.safetensors": safetensors((13, 17), fill=b"\7"),
}
EARLIER = {
    "README.md": b"---\nlicense: mit\n---\n# Earlier\n",
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": safetensors((5,)),
    "model-00002-of-00002.safetensors": safetensors((6,)),
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b"of the earlier model",
}
for saved in (FINISHED, EARLIER):
    saved["mono_quant.json"] = json.dumps({
        "format": "mono_quant",
        "files": {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in saved.items()},
    }).encode()
EARLIER["notes.txt"] = b"kept"


def failure(
    kind: type[errors.MonoQuantError], match: str, call: Callable[[], object], *, see_locals: bool = True
) -> errors.MonoQuantError:
    """Return the error of a call, after looking for secrets in all of it, local variables included."""
    with pytest.raises(kind, match=match) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    check_no_secret(error, see_locals)
    return error


def check_no_secret(error: BaseException, see_locals: bool = True) -> None:
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = str(error) + repr(error) + "".join(traceback.format_exception(error))
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__) if "mono_quant" in f.f_globals["__name__"]]
    shown += "".join(repr(frame.f_locals) for frame in frames if see_locals)
    assert not [token for token in TOKENS if token in shown]
    assert "Bearer" not in shown


def pushed(folder: Path, repo_id: str, hub: Hub, **options: Any) -> PushResult:
    """Push the finished folder."""
    expect = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in FINISHED.items()}
    source, names = options.pop("source", None), options.pop("files", list(FINISHED))
    expect = options.pop("expect", expect)
    how = PushOptions.of(options)
    files = gather(folder, names, expect)
    return push(open_target(repo_id, how, source=source, hub=hub), files, how, message="Push int8")


def holds_finished(repo: Repo, revision: str = "main") -> bool:
    files = repo.files(revision)
    weights = {name for name in files if ".safetensors" in name or name.endswith(".bin")}
    return weights == {"model.safetensors"} and files | FINISHED == files
