"""What tests of io/disk share."""

import os

import torch

from mono_quant.io.disk import disk
from mono_quant.io.disk.output import new_folder
from mono_quant.io.tensors.shards import write_tensors

WRITES = [name for name in vars(disk._Ops) if not name.startswith("_")]


class ShimOps(disk._Ops):
    """Counts every operation and lets the k-th one go wrong, before or after it took effect."""

    def __init__(self, fail_at=None, error=None, after=False, can_exchange=True):
        self.count = 0
        self.calls = []
        self.fail_at, self.error, self.after, self.can_exchange = fail_at, error, after, can_exchange
        for name in WRITES:
            setattr(self, name, self._wrap(name, getattr(super(), name)))

    def _wrap(self, name, real):
        def call(*arguments):
            self.count += 1
            self.calls.append(name)
            strikes = self.count == self.fail_at
            # The kernel frees the descriptor even when close reports an error.
            if strikes and not self.after and name != "close":
                self.error()
            if name == "fsync":
                result = None  # a thousand real ones would take minutes
            elif name == "exchange" and not self.can_exchange:
                result = False
            else:
                result = real(*arguments)
            if strikes:
                self.error()
            return result

        return call


def os_error(code):
    def strike():
        raise OSError(code, os.strerror(code))

    return strike


def save(target, value, **options):
    """A small but complete save: every way of writing is used once."""
    with new_folder(target, **options) as folder:
        folder.manifest["source"] = "tests"
        write_tensors(folder, "model.safetensors", {"w": torch.full((3, 5), float(value))})
        folder.write_json("config.json", {"value": value})
        folder.write_text("1_Pooling/config.json", f"{value}\n")
        folder.adopt(lambda path: (path / "tokenizer.json").write_text(f"{value}"))


def snapshot(folder):
    if not folder.exists():
        return None
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def leftovers(parent):
    return [name for name in listing(parent) if name.startswith(".")]


def shimmed(monkeypatch, **options):
    ops = ShimOps(**options)
    monkeypatch.setattr(disk, "_ops", ops)
    return ops


BAD_NAMES = """modeling_x.py setup.py LICENSE.py pytorch_model.bin model.bin training_args.bin optimizer.pt scheduler.pt
rng_state.pth trainer_state.json .env .git/config .gitattributes model.onnx tf_model.h5 model.gguf
model.ckpt flax_model.msgpack ../config.json a/../config.json /etc/passwd 1_Pooling/../config.json
1_Pooling/2_Dense/config.json 1_Pooling config.json/ ./config.json events.out.tfevents credentials.json
1_Dense/pytorch_model.bin model-1-of-2.safetensors adapter_model.safetensors ..model"""
BAD = [
    *BAD_NAMES.split(),
    "",
    "config.json\n",
    "config\x00.json",
    "config.json\u202e",
    "a" * 300 + ".model",
]
