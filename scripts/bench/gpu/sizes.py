"""How large everything is: as the issue asks on a device, and tiny for a walk through on a CPU."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Decoder:
    """A shape of Llama."""

    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    vocabulary: int


@dataclass(frozen=True)
class Experts:
    """A shape of Mixtral's or Qwen3-MoE's experts: how many there are, and how many a token takes."""

    name: str
    hidden: int
    inner: int
    count: int
    taken: int


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    dtype: of activations and of the weights that are not int8.
    shapes, tokens: N x K of single layers, and M.
    scheme_shapes, scheme_tokens: of those that are run in every scheme; the peers' too.
    most_copies: of a layer's weight, between which calls rotate.
    host_shape, host_tokens: what the host's time is taken at.
    layers: of the model.
    decoder: its shape.
    prefill: tokens.
    batches: of decoding.
    filled, room: places of the cache that are filled before, and all of them.
    experts, expert_tokens: shapes of experts, and T.
    steps, step_layers: of the long comparison of a graph with eager mode.
    measured_tokens: how many tokens the outlier model is held against fp32 with.
    outliers: channels of each norm that are scaled by 20.
    """

    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    scheme_shapes: tuple[tuple[int, int], ...]
    scheme_tokens: tuple[int, ...]
    most_copies: int
    host_shape: tuple[int, int]
    host_tokens: tuple[int, ...]
    layers: int
    decoder: Decoder
    prefill: int
    batches: tuple[int, ...]
    filled: int
    room: int
    experts: tuple[Experts, ...]
    expert_tokens: tuple[int, ...]
    steps: int
    step_layers: int
    measured_tokens: int
    outliers: int


FULL = Sizes(
    dtype=torch.bfloat16,
    shapes=((4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (1024, 4096), (1024, 1024), (384, 384)),
    tokens=(1, 4, 16, 64, 256, 1024, 4096),
    scheme_shapes=((4096, 4096), (4096, 14336)),
    scheme_tokens=(1, 16, 256, 4096),
    most_copies=128,
    host_shape=(1024, 4096),
    host_tokens=(1, 16, 256),
    layers=8,
    decoder=Decoder(4096, 14336, 32, 8, 128256),
    prefill=2048,
    batches=(1, 4, 16),
    filled=256,
    room=512,
    experts=(Experts("Mixtral", 4096, 14336, 8, 2), Experts("Qwen3-MoE", 2048, 768, 128, 8)),
    expert_tokens=(1024, 1),
    steps=1000,
    step_layers=2,
    measured_tokens=512,
    outliers=16,
)
# bf16 is cut, not rounded, by Triton's interpreter: a walk through is in fp32
DRY = replace(
    FULL,
    dtype=torch.float32,
    shapes=((48, 64), (32, 96)),
    tokens=(1, 5, 20),
    scheme_shapes=((32, 136),),
    scheme_tokens=(1, 18),
    most_copies=2,
    host_shape=(16, 64),
    host_tokens=(1,),
    layers=1,
    decoder=Decoder(64, 96, 4, 2, 96),
    prefill=6,
    batches=(1, 2),
    filled=4,
    room=16,
    experts=(Experts("Mixtral", 64, 96, 3, 2),),
    expert_tokens=(5, 1),
    steps=4,
    step_layers=1,
    measured_tokens=8,
    outliers=2,
)
