"""The int8 layers that take the place of float ones.

Each keeps its codes under the name and in the shape of the float parameter it replaces (`weight`, int8) with the
scales beside it (`weight_scale`, fp32 [N, 1]), as plain Parameters without gradient. Reading the attribute
`.weight` gives the dequantized weight, so that code which looks at a layer's weight, its dtype or its device
keeps working, and refuses writes, which would be lost; the codes are in `codes("weight")`, and in the state dict.
There they lie flat, in one dimension, row after row: whoever fills a float layer from a state dict stops at the shape, where
codes in the shape of the weight would be taken for weights. Both forms are loaded. A layer is an instance of the float class
whose place it takes, where it can do all that one does: libraries that look for `nn.Linear` (PEFT, diffusers) find it.
`forward` writes no attribute.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant import kernels
from mono_quant.convert.forwards import (
    AttentionForward,
    ConvForward,
    ExpertsForward,
    TransposedForm,
    activation_of,
)
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import FrozenWeightError
from mono_quant.kernels.weights import RowCodes, dequantize_rows, stored_scale
from mono_quant.planning.kinds import as_rows, flattened, from_rows, rows_of, unflattened


class Int8Module(StoredModule):
    """What all int8 layers share: where codes and scales live and how they survive casts.

    Attributes:
        kind: of layer, as `planning.kinds` has it; says which axis of a weight is a row.
        activations: how its inputs become codes: `auto`, or a scheme of `kernels`; empty where none do.
    """

    kind: str
    activations: str = kernels.AUTO
    # of the float weights
    _shapes: dict[str, torch.Size]

    def _put(self, name: str, shape: torch.Size, encoded: RowCodes | None) -> None:
        """Register codes and scales for the float parameter `name` of `shape`; on meta without `encoded`."""
        vars(self).setdefault("_shapes", {})[name] = shape
        scales = (*rows_of(shape, self.kind), 1)
        if encoded is None:
            matrix = torch.empty(shape, dtype=torch.int8, device="meta")
            scale = torch.empty(scales, dtype=torch.float32, device="meta")
        else:
            matrix, scale = from_rows(encoded.codes, shape, self.kind), encoded.scale.view(scales)
        # Not `register_parameter`: it refuses names that the class answers itself (the dequantizing property).
        self._parameters[name] = nn.Parameter(self._in_kernel_order(matrix), requires_grad=False)
        self._parameters[f"{name}_scale"] = nn.Parameter(scale, requires_grad=False)

    def encode_(self, name: str, weight: Tensor) -> None:
        self._put(name, weight.shape, kernels.encode_rows(as_rows(weight.detach().contiguous(), self.kind)))

    def _in_kernel_order(self, codes: Tensor) -> Tensor:
        """Return codes of the same shape in the memory order that the kernels read without a copy: row after row."""
        return from_rows(as_rows(codes, self.kind).contiguous(), codes.shape, self.kind)

    def settle_(self) -> None:
        """Put codes that were assigned from outside into the memory order of the kernels."""
        for name, codes in self._parameters.items():
            if codes is not None and f"{name}_scale" in self._parameters:
                codes.data = self._in_kernel_order(self._shaped(name, codes.data))

    def stored(self, name: str) -> Tensor:
        """Return the parameter `name` as it lies in memory; codes in the shape of the float weight."""
        return self._shaped(name, super().stored(name))

    def _shaped(self, name: str, held: Tensor) -> Tensor:
        # flat where tensors of a state dict are swapped in: by functional_call, or by accelerate after offloading
        shape = self._shapes.get(name)
        is_flat = shape is not None and held.shape == (shape.numel(),)
        return unflattened(held, shape, self.kind) if shape is not None and is_flat else held

    def codes(self, name: str = "weight") -> Tensor:
        """Return the int8 matrix [N, K] behind the parameter `name`."""
        return as_rows(int8_values(self.stored(name)), self.kind)

    def scale(self, name: str = "weight") -> Tensor:
        """Return the fp32 scales [N, 1] of the parameter `name`."""
        return self.stored(f"{name}_scale")

    def dequantize(self, name: str = "weight") -> Tensor:
        """Return the float parameter that the codes of `name` stand for, in its original shape."""
        rows = dequantize_rows(self.codes(name), self.scale(name), self.float_dtype)
        return from_rows(rows, self.stored(name).shape, self.kind)

    def _restore(self, name: str) -> Tensor:
        codes = self.stored(name)
        # while a loader fills the layer, one of the two may be there already
        if codes.is_meta or self.scale(name).is_meta:
            return torch.empty(self._shape_elsewhere(name), dtype=self.float_dtype, device="meta")
        return self.dequantize(name)

    def _shape_elsewhere(self, name: str) -> torch.Size:
        """Return the shape of a weight that accelerate holds while it is offloaded: it puts back what has the same alone."""
        hook = vars(self).get("_hf_hook")
        for part in getattr(hook, "hooks", (hook,)):
            elsewhere = getattr(part, "weights_map", None)
            if elsewhere is not None and name in elsewhere:
                shape: torch.Size = elsewhere[name].shape
                return shape
        return self._shapes[name]

    def _product(self, x: Tensor, name: str, rows: int | slice, bias: Tensor | None) -> Tensor:
        codes = int8_values(self.stored(name)[rows])
        return self.multiply(x, codes, self.scale(name)[rows], bias)

    def multiply(self, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product with rows of codes, in the scheme of this layer; see `kernels.int8_linear`."""
        return kernels.int8_linear(x, weight, weight_scale, bias, self.activations)

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        """Return the convolution with codes, in the scheme of this layer; see `kernels.int8_conv`."""
        how = (stride, padding, dilation, groups)
        return kernels.int8_conv(x, weight, weight_scale, bias, *how, self.activations)

    @contextmanager
    def answering(self, **products: Callable[..., Tensor]) -> Iterator[None]:
        """Let others give the products of this layer while the context lasts: in place of `multiply` and `convolve`."""
        vars(self).update(products)
        try:
            yield
        finally:
            for name in products:
                del vars(self)[name]

    def _stored_names(self) -> tuple[str, ...]:
        return (*self.held, *(f"{name}_scale" for name in self.held))

    def _misfit(self, name: str, param: Tensor) -> str:
        # scales come in the dtype of their checkpoint
        is_scale = name not in self.held and param.is_floating_point()
        return super()._misfit(name, self._as_scale(name, param) if is_scale else self._shaped(name, param))

    def _as_scale(self, name: str, param: Tensor) -> Tensor:
        """Return scales as the layer holds them; some write them without their last dimension, which is one."""
        shape = self.stored(name).shape
        return (param.unsqueeze(-1) if param.shape == shape[:-1] else param).float()

    def _settled(self, name: str, param: nn.Parameter) -> nn.Parameter:
        if name not in self.held and (param.dtype != torch.float32 or param.dim() != self.stored(name).dim()):
            tags = vars(param)
            param = nn.Parameter(self._as_scale(name, param.detach()), requires_grad=False)
            vars(param).update(tags)
        shaped = self._shaped(name, param.detach())
        if shaped.shape != param.shape:
            tags = vars(param)
            param = nn.Parameter(self._in_kernel_order(shaped), requires_grad=False)
            vars(param).update(tags)
        return super()._settled(name, param)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in () if keep_vars else self._shapes:
            destination[prefix + name] = flattened(destination[prefix + name], self.kind)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        given = dict(state_dict)
        for name, shape in self._shapes.items():
            codes = given.get(prefix + name)
            if codes is not None and codes.shape == (shape.numel(),):
                # an order of its own, as it may be assigned
                given[prefix + name] = self._in_kernel_order(unflattened(codes, shape, self.kind))
        super()._load_from_state_dict(given, prefix, *rest)

    def _state_problems(self, given: Mapping[str, Tensor], assign: bool) -> Iterator[str]:
        for name in self.held:
            codes, scale = given.get(name), given.get(f"{name}_scale")
            if codes is not None and codes.dtype != torch.int8:
                yield (
                    f"{name} is {codes.dtype}, but {type(self).__name__} holds int8 codes. Quantize the model that has these "
                    f"weights, or leave them out of the state dict"
                )
            elif (codes is None) != (scale is None):
                there, lost = (f"{name}_scale", name) if codes is None else (name, f"{name}_scale")
                yield f"{there} comes without {lost}, and either means nothing alone; load both or none"

    def _form(self, name: str) -> str:
        return "int8 codes"

    def extra_repr(self) -> str:
        """Say what the float layer says of itself, and the scheme of the activations unless that is left open."""
        is_open = self.activations in ("", kernels.AUTO)
        return self._sizes() + ("" if is_open else f", activations={self.activations!r}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales = {n: p.data for n, p in self._parameters.items() if n.endswith("_scale") and p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in scales.items():
            after = self._parameters[name]
            if after is not None and after.dtype != torch.float32:
                # a scale in half precision would move every weight of its row
                after.data = before.to(after.device)
        return self


def layers_with_schemes(model: nn.Module) -> dict[str, Int8Module]:
    """Return the int8 layers that quantize activations, by name; the projection of an attention belongs to it."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Int8Module) and module.activations
    }
    inner = {f"{name}.{child}".lstrip(".") for name, m in found.items() for child, _ in m.named_children()}
    return {name: module for name, module in found.items() if name not in inner}


def put_scheme_(layer: Int8Module, scheme: str) -> None:
    """Let a layer, and what is in it, make codes of its activations by a scheme."""
    for module in layer.modules():
        if isinstance(module, Int8Module):
            module.activations = scheme


def schemes_in(model: nn.Module) -> str | dict[str, str]:
    """Return the scheme that all int8 layers of a model have, or that of each by name where they differ."""
    named = {name: layer.activations for name, layer in layers_with_schemes(model).items()}
    schemes = set(named.values()) or {kernels.AUTO}
    return named if len(schemes) > 1 else schemes.pop()


def put_schemes_(model: nn.Module, schemes: str | Mapping[str, str]) -> list[str]:
    """Give the int8 layers of a model their schemes, and return the names among them that no layer has.

    Args:
        model: its layers are changed.
        schemes: one for all, or by name; of a model with another head, or without one, the names may lack a prefix or have one.
    """
    layers = layers_with_schemes(model)
    if isinstance(schemes, str):
        for layer in layers.values():
            put_scheme_(layer, schemes)
        return []
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    left = []
    for name, scheme in schemes.items():
        places = (name, f"{prefix}{name}", name.removeprefix(prefix))
        place = next((place for place in places if place in layers), None)
        if place is None:
            left.append(name)
        else:
            put_scheme_(layers[place], scheme)
    return left


def tensors_of(model: nn.Module) -> dict[str, Any]:
    """Return what is in the state dict of a model, with int8 codes in the shape of the float weight instead of flat."""
    state = model.state_dict(keep_vars=True)
    # one object for what is one: on meta nothing else tells
    plain: dict[int, Tensor] = {}
    return {
        name: plain.setdefault(id(value), value.detach()) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def narrow_scales(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state in which scales are as a file holds them; see `stored_scale`.

    Args:
        model: with int8 layers.
        state: its tensors, by their names in the model or in a checkpoint.
    """
    dtypes = {
        f"{name}.{key}".lstrip("."): module.float_dtype
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Int8Module)
        for key, _ in module.named_parameters(recurse=False)
    }
    # what a checkpoint has under another name, or merged, is in the dtype of the others
    common = next(iter(dtypes.values()), torch.float32)
    scales = {f"{name}_scale" for name, tensor in state.items() if tensor.dtype == torch.int8}
    return {
        name: stored_scale(tensor, dtypes.get(name, common)) if name in scales else tensor
        for name, tensor in state.items()
    }


def int8_values(codes: Tensor) -> Tensor:
    """Return codes as int8: accelerate's offload hooks cast them to the dtype that `.weight` shows, all of which hold them.

    Raises:
        FrozenWeightError: they are no codes: float weights were put in their place.
    """
    if codes.dtype == torch.int8:
        return codes
    values = codes.to(torch.int8)
    if not kernels.is_watched() and not codes.is_meta and not torch.equal(values.to(codes.dtype), codes):
        raise FrozenWeightError(
            f"an int8 layer found {codes.dtype} weights in the place of its int8 codes. Put codes there, or convert the model "
            f"that has these weights (quantize)"
        )
    return values


class _Int8Weight(Int8Module):
    """An int8 layer with the one parameter `weight` and perhaps a bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, encoded: RowCodes | None) -> None:
        super().__init__(weight.dtype)
        self._put("weight", weight.shape, encoded)
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: float, in the shape of the layer this one replaced."""
        return self.read("weight")


class Int8Linear(_Int8Weight, nn.Linear):  # type: ignore[misc, override]
    """`nn.Linear` with int8 weights [out, in]; activations are quantized per token."""

    kind = "linear"

    def __init__(self, source: nn.Linear, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, source.bias, encoded)
        self.in_features, self.out_features = source.in_features, source.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of `input`."""
        return self.multiply(input, self.codes(), self.scale(), self.bias)

    def _sizes(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class Int8TransposedLinear(TransposedForm, _Int8Weight):
    """GPT-2's `Conv1D`: a linear layer whose float weight is [in, out]."""

    kind = "transposed_linear"

    def __init__(self, source: nn.Module, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, source.bias, encoded)  # type: ignore[arg-type]
        self._take_size(source)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        return self.multiply(x, self.codes(), self.scale(), self.bias)


class _Int8Conv(ConvForward, _Int8Weight):
    def __init__(self, source: nn.Conv1d | nn.Conv2d, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, source.bias, encoded)
        self._take_geometry(source)

    def _in_kernel_order(self, codes: Tensor) -> Tensor:
        return codes.movedim(1, -1).contiguous().movedim(-1, 1)

    def _convolve(
        self,
        x: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> Tensor:
        codes = int8_values(self.stored("weight"))
        codes = codes if codes.dim() == 4 else codes.unsqueeze(2)
        return self.convolve(x, codes, self.scale(), self.bias, stride, padding, dilation, self.groups)


class Int8Conv2d(_Int8Conv, nn.Conv2d):  # type: ignore[misc, override]
    """`nn.Conv2d` with int8 weights; each receptive field is quantized as one token."""

    kind = "conv2d"


class Int8Conv1d(_Int8Conv, nn.Conv1d):  # type: ignore[misc, override]
    """`nn.Conv1d` with int8 weights; each receptive field is quantized as one token."""

    kind = "conv1d"


class Int8Embedding(_Int8Weight, nn.Embedding):  # type: ignore[override]
    """`nn.Embedding` with int8 rows."""

    kind = "embedding"
    activations = ""

    def __init__(self, source: nn.Embedding, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, None, encoded)
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        self.padding_idx = source.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Map integer indices [...] to rows [..., D] in the dtype the table had."""
        return kernels.int8_embedding(input, self.codes(), self.scale(), self.float_dtype)

    def _sizes(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Experts(ExpertsForward, Int8Module):
    """The fused experts of transformers 5: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    Runs one int8 product per expert that got tokens, or all of them as one call where `kernels` has that.
    """

    kind = "experts"

    def __init__(self, source: nn.Module, encoded: dict[str, RowCodes] | None) -> None:
        gate_up, down = source.gate_up_proj, source.down_proj
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        super().__init__(gate_up.dtype)
        self._put("gate_up_proj", gate_up.shape, None if encoded is None else encoded["gate_up_proj"])
        self._put("down_proj", down.shape, None if encoded is None else encoded["down_proj"])
        self._take_routing(source)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix the experts' outputs; see `ExpertsForward.forward`."""
        act = activation_of(self.act_fn)
        # others may give the products, or add to them
        changed = "_product" in self.__dict__ or "multiply" in self.__dict__
        if changed or not act or not kernels.has_experts(hidden_states, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        kernels.check_input(hidden_states, type(self).__name__, self.hidden_size)
        weights = (self.codes(), self.scale("gate_up_proj"), self.codes("down_proj"), self.scale("down_proj"))
        routing = (hidden_states, top_k_index, top_k_weights)
        return kernels.int8_experts(*routing, *weights, act, self.activations)

    def codes(self, name: str = "gate_up_proj") -> Tensor:
        """Return the int8 codes [E, N, K] of the parameter `name`."""
        return int8_values(self.stored(name))


class Int8MultiheadAttention(AttentionForward, Int8Module):
    """`nn.MultiheadAttention` with int8 projections: `in_proj_weight` [3E, E] and `out_proj`.

    For the plain form only: equal query, key and value sizes, no `bias_k`/`bias_v`, no `add_zero_attn`.
    """

    kind = "attention"

    def __init__(self, source: nn.MultiheadAttention, encoded: dict[str, RowCodes] | None) -> None:
        weight = source.in_proj_weight
        assert weight is not None
        super().__init__(weight.dtype)
        self._put("in_proj_weight", weight.shape, None if encoded is None else encoded["in_proj_weight"])
        self.register_parameter("in_proj_bias", source.in_proj_bias)
        self.out_proj = Int8Linear(source.out_proj, None if encoded is None else encoded["out_proj.weight"])
        self._take_heads(source)
