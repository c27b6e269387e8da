"""Other people's int8 layers, each made from a float one: what the package's are held against."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# `torch._int_mm` on CUDA wants more rows than this, and a multiple of 8 of them.
_FEW_ROWS = 16
_ALIGNED = 8

Peer = Callable[[nn.Linear], nn.Module]


class IntMm(nn.Module):
    """int8 as one writes it in plain torch: codes by its operators, `torch._int_mm`, the scales after it."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        weight = source.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = source.bias
        self.in_features, self.out_features = source.in_features, source.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-30)
        codes = (rows * (127 / largest)).round().clamp(-127, 127).to(torch.int8)
        count = rows.shape[0]
        missing = max(0, _FEW_ROWS + 1 - count)
        missing += -(count + missing) % _ALIGNED
        codes = F.pad(codes, (0, 0, 0, missing)) if missing else codes
        total = torch._int_mm(codes, self.weight.t())[:count].float()  # noqa: SLF001
        out = total * (largest / 127 * self.scale)
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def bitsandbytes_int8(source: nn.Linear) -> nn.Module:
    """Its W8A8 without the detour for outliers, which waits for the host and fits in no graph."""
    import bitsandbytes  # noqa: PLC0415

    layer = bitsandbytes.nn.Linear8bitLt(
        source.in_features,
        source.out_features,
        bias=source.bias is not None,
        has_fp16_weights=False,
        threshold=0.0,
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Int8Params(
        source.weight.detach().to("cpu", torch.float16), requires_grad=False, has_fp16_weights=False
    )
    layer.bias = source.bias
    # codes are made on the way to the device
    return layer.to(source.weight.device).requires_grad_(False)


def torchao_int8(source: nn.Linear) -> nn.Module:
    """Its dynamic W8A8; it is meant to be compiled, which its name in the tables says where it is."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # noqa: PLC0415

    copy = nn.Linear(source.in_features, source.out_features, source.bias is not None, device="meta")
    copy.weight, copy.bias = source.weight, source.bias
    held = nn.Sequential(copy)
    quantize_(held, Int8DynamicActivationInt8WeightConfig())
    return held[0]


PEERS: dict[str, Peer] = {"int_mm": IntMm, "bitsandbytes": bitsandbytes_int8, "torchao": torchao_int8}
_IMPORTED = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}
# How its codes are made decides: the others are eager operators without it.
COMPILED = ("int_mm", "torchao")


def importable(name: str) -> bool:
    """Say whether a peer is installed here."""
    package = _IMPORTED.get(name)
    return package is None or importlib.util.find_spec(package) is not None


def swap_(model: nn.Module, peer: Peer, but: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Put a peer in the place of every `nn.Linear` of a model, except those named; return the model."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear and name not in but:
                setattr(owner, name, peer(child))
    return model
