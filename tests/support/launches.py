"""What reaches a device when kernels are launched, without a device: Triton compiles for sm_90, and the start is written down.

python launches.py prints, as JSON, how starts by `launch` differ from those that Triton itself makes.
"""

import json
import sys
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from mono_quant.kernels.gpu import features
from mono_quant.kernels.gpu import launch as room
from mono_quant.kernels.gpu.replay import Replays

HERE, THERE = torch.device("cuda", 0), torch.device("cuda", 1)
starts = []


@triton.jit
def add(x_ptr, y_ptr, n, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1, mask=at < n)


class Launcher:
    def __init__(self, source, metadata):
        self.metadata = metadata

    def __call__(
        self,
        gridX,
        gridY,
        gridZ,
        stream,
        function,
        kernel_metadata,
        launch_metadata,
        launch_enter_hook,
        launch_exit_hook,
        *args,
    ):
        taken = [arg.data_ptr() if isinstance(arg, torch.Tensor) else _told(arg) for arg in args]
        starts.append({
            "grid": [gridX, gridY, gridZ],
            "stream": stream,
            "function": function,
            "metadata": list(kernel_metadata),
            "overlaps": self.metadata.launch_pdl,
            "args": taken,
        })


def _told(arg):
    if not isinstance(arg, TensorDescriptor):
        return arg
    rest = [list(arg.shape), list(arg.strides), list(arg.block_shape), arg.padding, arg.round_f32_to_tf32]
    return {"place": arg.base.data_ptr(), "rest": rest}


class Driver:
    """What is of the device: loading code and starting it. Everything before that Triton does."""

    launcher_cls = Launcher
    current = loaded = 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return Driver.current

    def get_current_stream(self, device):
        return 7000 + device

    @property
    def utils(self):
        return self

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, code, shared, device):
        Driver.loaded += 1
        return object(), 9000 + Driver.loaded, 32, 0, 1024

    def unload_module(self, module):
        pass


class Module:
    """What torch has of a kind of device."""

    @staticmethod
    @contextmanager
    def device(place):
        before, Driver.current = Driver.current, place.index
        yield
        Driver.current = before


@triton.jit
def copy_tiles(x_desc, y_ptr, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(y_ptr + at, x_desc.load([0, 0]), mask=at < n)


def two_launches(x, y):
    """Launch through scratch memory, and of tiles."""
    middle, out = torch.empty(64, dtype=torch.int8), torch.empty(4, 16)
    room.launch(add, (1,), (y[16:], middle, 48), {"WIDTH": 64}, device=HERE, warps=2)
    tiles = TensorDescriptor.from_tensor(x, [4, 16])
    room.launch(copy_tiles, (1, 2), (tiles, out, x.numel()), {"ROWS": 4, "WIDTH": 16}, device=HERE)
    return out


def replayed():
    """Return the starts of a call that is replayed, with distances in place of addresses, and of one that is not."""
    replays, answers = Replays(HERE), []
    for _ in range(4):
        x, y = torch.randn(4, 16), torch.zeros(64, dtype=torch.int8)
        starts.clear()
        out = replays.run((two_launches,), lambda: two_launches(x, y), x, y)  # noqa: B023
        (first, second), bases = starts, [x, y, out]
        tiles = second["args"][0]
        told = [
            first["args"][0] - y.data_ptr(),
            first["args"][2],
            tiles["place"] - x.data_ptr(),
            tiles["rest"],
        ]
        told += [second["args"][1] - out.data_ptr(), second["args"][2], first["args"][1] % 64]
        is_apart = all(not 0 <= first["args"][1] - b.data_ptr() < b.nbytes for b in bases)
        same = [{k: v for k, v in start.items() if k != "args"} for start in starts]
        answers.append([told, is_apart, same])
    return answers


@contextmanager
def counted():
    """Yield a list that grows when Triton's own launcher is asked."""
    asked, run = [], add.run
    add.run = lambda *args, **how: (asked.append(1), run(*args, **how))[1]
    yield asked
    add.run = run


def compared(grid, args, constants, **how):
    """Start by Triton alone, then twice by `launch`; say how the third start differs from the first."""
    starts.clear()
    options = {"num_warps": how.get("warps", 4), "num_stages": 1, "enable_fp_fusion": False}
    options |= {"launch_pdl": True} if how.get("overlap") else {}
    add[grid](*args, **constants, **options)
    with counted() as asked:
        for _ in range(2):
            room.launch(add, grid, args, constants, device=HERE, **how)
    theirs, *ours = starts
    differ = [what for start in ours for what in start if what != "args" and start[what] != theirs[what]]
    left_out = [
        [i for i, arg in enumerate(start["args"]) if arg != theirs["args"][i]]
        for start in ours
        if len(start["args"]) == len(theirs["args"])
    ]
    return {"differ": differ, "left out": left_out, "asked": len(asked), **ours[-1]}


def main():
    triton.runtime.driver.set_active(Driver())
    nvidia = features.of_nvidia((9, 0), 232448, 132, overlap=True)
    room.features_of = lambda device: nvidia
    torch.get_device_module = lambda kind: Module
    x = torch.zeros(256)
    plain = ((3,), (x, x[64:], 192), {"WIDTH": 64})
    answers = {
        "plain": compared(*plain),
        "again": compared((5, 2), (x[64:], x, 64), {"WIDTH": 64}),
        "odd length": compared((3,), (x, x[64:], 191), {"WIDTH": 64}),
        "one": compared((3,), (x, x[64:], 1), {"WIDTH": 64}),
        "misaligned": compared((3,), (x[1:], x, 192), {"WIDTH": 64}),
        "dtype": compared((3,), (x.half(), x, 192), {"WIDTH": 64}),
        "constant": compared((3,), (x, x[64:], 192), {"WIDTH": 128}),
        "warps": compared(*plain, warps=8),
        "overlap": compared((3, 1, 4), *plain[1:], overlap=True),
    }
    answers["replayed"] = replayed()
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(1))
    with counted() as asked:
        room.launch(add, *plain, device=HERE)
    answers["observed"] = len(asked)
    triton.knobs.runtime.launch_enter_hook.calls.clear()

    starts.clear()
    for _ in range(2):
        room.launch(add, *plain, device=THERE)
    answers["elsewhere"] = {"starts": list(starts), "current": Driver.current}

    # takes other arguments than those that are known
    Launcher.__call__ = lambda self, gridX, gridY, gridZ, stream, function, more, *args: None
    with counted() as asked:
        for _ in range(2):
            room.launch(add, (3,), (x, x[64:], 192), {"WIDTH": 32}, device=HERE)
    answers["unknown launcher"] = len(asked)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
