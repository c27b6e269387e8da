"""What tests of api share."""

from pathlib import Path

import torch
from models import (
    seeded,
)
from torch import nn

import mono_quant as mq

QUIET = {"fidelity": False}
ROOT = Path(mq.__file__).parent


class Net(nn.Module):
    """A nested net: a shared layer, a tie, a norm, a hook-carrying layer and a layer too small to gain."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.deep = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))})
        self.shared = nn.Linear(64, 64)
        self.again = self.shared
        self.norm = nn.LayerNorm(64)
        self.small = nn.Linear(64, 4)
        self.out = nn.Linear(64, 80, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(x + self.again(self.shared(self.deep["inner"](x))))
        return self.out(x) + self.small(x).sum(-1, keepdim=True)


def net():
    return seeded(Net).eval()


def ids():
    return seeded(lambda: torch.randint(0, 80, (3, 5)))


def kept(result):
    return {row.module: row.reason for row in result.report.skipped}


def chosen(result):
    return [row.module for row in result.report.quantized]
