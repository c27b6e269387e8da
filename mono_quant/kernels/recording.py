"""Writing a `Program` down while its steps run for the first time.

A recorder does what it is asked to by the same functions that run alone, which check everything there is to check, and listens
to what they tell the library. It knows the memory of each tensor: that of an input, or what a step made; views have the memory
of what they show. Whatever it cannot place (a copy that torch makes on the way, a product that runs in plain torch) spoils the
program, but not the run.
"""

import math
import struct
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mono_quant.kernels import fused, packs
from mono_quant.kernels.activations import AUTO
from mono_quant.kernels.attention import attention, native_attention
from mono_quant.kernels.choice import scheme_of, scheme_on
from mono_quant.kernels.cpu import Cpu, Longs
from mono_quant.kernels.fused_conv import BatchNorm, conv, is_kept_packed, is_plain_conv, native_conv
from mono_quant.kernels.program import Conditions, Given, Made, Place, Program, Step, Weight
from mono_quant.kernels.steps import Norm, Product

# `StepKind` of csrc/program.h.
_CHAIN, _ATTENTION, _NORM, _ROTARY, _COPY_ROWS, _ADD_LONGS, _CONV = range(7)
_WORD = struct.Struct("=q")
# `NormStep`, `RotaryStep` and `ConvStep` of csrc/api.cpp, `CopyRows` and `AddLongs` of csrc/program.h.
_NORM_STEP, _ROTARY_STEP = struct.Struct("=5q2qd4q"), struct.Struct("=9q3qqq")
_CONV_STEP = struct.Struct("=4q16q" + "9q" + "dqqq")
_COPY_STEP, _ADD_STEP = struct.Struct("=5q" + "4q" + "q" + "4q"), struct.Struct("=q2q3qq")
# Words of `Chain` before its parts, and of a part.
_HEADER_WORDS, _PART_WORDS = 31, 5


class _Listener(Cpu):
    """A path that remembers what the library was told last."""

    def __init__(self, cpu: Cpu) -> None:
        self.__dict__.update(cpu.__dict__)
        self.heard: tuple[int, bytes] | None = None
        self._cpu = cpu
        self.chain, self.attention = self._hear_chain, self._hear_attention
        self.norm, self.rotary = self._hear_norm, self._hear_rotary
        self.conv_and_norm = self._hear_conv

    def take(self) -> tuple[int, bytes] | None:
        heard, self.heard = self.heard, None
        return heard

    def _hear_chain(self, words: bytes) -> int:
        self.heard = _CHAIN, words
        return int(self._cpu.chain(words))

    def _hear_attention(self, words: bytes) -> int:
        self.heard = _ATTENTION, words
        return int(self._cpu.attention(words))

    def _hear_norm(self, *words: Any) -> int:
        self.heard = _NORM, _NORM_STEP.pack(*[0 if word is None else word for word in words])
        return int(self._cpu.norm(*words))

    def _hear_rotary(self, isa: int, threads: int, sizes: bytes, *words: int) -> int:
        self.heard = _ROTARY, _ROTARY_STEP.pack(isa, threads, *struct.unpack("=7q", sizes), *words)
        return int(self._cpu.rotary(isa, threads, sizes, *words))

    def _hear_conv(self, isa: int, qmax: int, group: int, threads: int, sizes: Longs, *words: Any) -> int:
        given = [0 if word is None else word for word in words]
        self.heard = _CONV, _CONV_STEP.pack(isa, qmax, group, threads, *sizes, *given)
        return int(self._cpu.conv_and_norm(isa, qmax, group, threads, sizes, *words))


class Recorder:
    """What steps do to some inputs, and how to do it again."""

    def __init__(self, cpu: Cpu, inputs: Sequence[Tensor]) -> None:
        """Listen to steps that begin with `inputs`: plain tensors on CPU, none of them twice."""
        self._cpu, self._conditions = _Listener(cpu), Conditions.now(cpu)
        self._inputs = inputs
        # by the id of each tensor that is still there: what is held here would be there until the end
        self._homes = {id(tensor): i for i, tensor in enumerate(inputs)}
        # by home, the address that its offsets are counted from
        self._roots: dict[int, int] = {i: tensor.data_ptr() for i, tensor in enumerate(inputs)}
        self._steps: list[Step] = []
        self._made: list[Made] = []
        self._held: list[Tensor] = []
        self._weights: list[Weight] = []
        self._written: dict[int, None] = {}
        self._whole = len(self._homes) == len(inputs)

    def chain(self, x: Tensor, first: Product, **how: Any) -> Tensor:
        """Do what `fused.chain` does."""
        names = ("pre", "act", "gate", "second", "residual", "post")
        pre, act, gate, second, residual, post = (how.get(name) for name in names)
        products: list[Product] = [product for product in (first, gate, second) if product is not None]
        out = None
        x, residual = self._dense(x), None if residual is None else self._dense(residual)
        if _is_float32(x):
            out = fused.native_chain(self._cpu, x, first, pre, act, gate, second, residual, post)
        heard = self._cpu.take()
        if out is None or heard is None:
            self._whole = False
            return fused.chain(x, first, **how)
        self._make(out)
        words = {3: x, 4: residual, 5: out}
        for word, norm in ((7, pre), (11, post)):
            if norm is not None:
                words |= {word: norm[1], word + 1: norm[2]}
        packed, word = [], _HEADER_WORDS
        for product in products:
            for weight, scale, bias in zip(*product[:3], strict=True):
                words |= {word: weight, word + 2: scale, word + 3: bias}
                if packs.pays(self._cpu, scheme_of(product[3], x)):
                    packed += self._packed(weight, word + 1, heard[1])
                word += _PART_WORDS
        self._write(heard, words, packed)
        return out

    def chain_parts(self, x: Tensor, first: Product, *, pre: Norm | None = None) -> tuple[Tensor, ...]:
        """Do what `fused.chain_parts` does."""
        out = self.chain(x, first, pre=pre)
        parts = torch.split(out, [weight.shape[0] for weight in first[0]], -1)
        self.views(parts, out)
        return parts

    def int8_linear(
        self, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activations: str = AUTO
    ) -> Tensor:
        """Do what `ops.int8_linear` does."""
        return self.chain(x, ((weight,), (weight_scale,), (bias,), activations))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
        """Do what `attention.attention` does."""
        causal, scale, window = how.get("causal", False), how.get("scale"), how.get("window")
        out = native_attention(self._cpu, q, k, v, mask, causal, scale, window)
        heard = self._cpu.take()
        if out is None or heard is None:
            self._whole = False
            return attention(q, k, v, mask, **how)
        self._make(out)
        self._write(heard, {10: q, 15: k, 20: v, 26: mask, 34: out})
        return out

    def norm(self, x: Tensor, how: Norm, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Do what `fused.norm` does."""
        x, residual = self._dense(x), None if residual is None else self._dense(residual)
        found = fused.native_norm(self._cpu, x, how, residual) if _is_float32(x) else None
        heard = self._cpu.take()
        if found is None or heard is None:
            self._whole = False
            return fused.norm(x, how, residual)
        out, total = found if isinstance(found, tuple) else (found, x)
        for made in found if isinstance(found, tuple) else (found,):
            self._make(made)
        self._write(heard, {5: how[1], 6: how[2], 8: x, 9: residual, 10: total, 11: out})
        return found

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Do what `fused.rotary` does."""
        out = fused.native_rotary(self._cpu, x, cos, sin) if _is_float32(x) else None
        heard = self._cpu.take()
        if out is None or heard is None:
            self._whole = False
            return fused.rotary(x, cos, sin)
        self._make(out)
        self._write(heard, {9: x, 10: cos, 11: sin, 13: out})
        return out

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        *,
        batch_norm: BatchNorm | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
        activations: str = AUTO,
    ) -> Tensor:
        """Do what `fused_conv.conv` does."""
        layer, how = (x, weight, weight_scale, bias), (tuple(stride), tuple(padding), tuple(dilation), groups)
        out = None
        if is_plain_conv(x, weight_scale, bias, batch_norm, residual):
            out = native_conv(self._cpu, layer, how, batch_norm, residual, relu, activations)
        heard = self._cpu.take()
        if out is None or heard is None:
            self._whole = False
            after: Any = {"batch_norm": batch_norm, "residual": residual, "relu": relu}
            return conv(*layer, *how, **after, activations=activations)
        self._make(out)
        floats = (weight_scale, bias, *(batch_norm or (None,) * 4)[:4])
        packed: list[Place] = []
        if is_kept_packed(self._cpu, weight, groups, scheme_on(activations, True)):
            packed = self._packed(weight, 22, heard[1])
        words = {20: x, 21: weight, 30: residual, 32: out, **dict(enumerate(floats, 23))}
        self._write(heard, words, packed)
        return out

    def copy_rows(self, target: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        """Do what `target.index_copy_(dim, index, source)` does."""
        target.index_copy_(dim, index, source)
        fits = target.dim() == 4 and dim in (2, -2) and index.dtype is torch.int64 and index.is_contiguous()
        if not fits or not self._note_written(target):
            self._whole = False
        else:
            self._copy(source, index, target)
        return target

    def add_longs(self, a: Tensor, b: Tensor | int) -> Tensor:
        """Add int64 tensors of at most one dimension, or a number to one."""
        total = a + b
        self._make(total)
        self._add(a, b, total)
        return total

    def add_long(self, a: Tensor, b: int) -> Tensor:
        """Do what `a.add_(b)` does to one int64."""
        a.add_(b)
        self._whole = self._whole and a.numel() == 1 and self._note_written(a)
        self._add(a, b, a)
        return a

    def constant(self, value: Tensor) -> Tensor:
        """Keep a tensor that is the same at every run."""
        self._held.append(value)
        self._homes[id(value)] = len(self._inputs) + len(self._held) - 1
        self._roots[self._homes[id(value)]] = value.data_ptr()
        return value

    def views(self, found: Any, source: Tensor) -> Any:
        """Take note of views of a tensor, one or a tuple of them, or of its dense copy."""
        home = self._homes.get(id(source))
        for view in found if isinstance(found, tuple | list) else (found,):
            if (
                home is None
                or not isinstance(view, Tensor)
                or view.numel() == 0
                or view.dtype is not source.dtype
            ):
                self._whole = False
            elif view.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
                self._find(view, home)
            else:
                self._make(view)
                self._copy(source, None, view)
        return found

    def finish(self, outputs: Sequence[Any]) -> Program | None:
        """Return the program of what was done, giving `outputs`; None where something could not be written down."""
        given = [self._given(output) for output in outputs]
        if not self._whole or not self._steps or any(one is None for one in given):
            return None
        return Program(
            self._conditions, self._steps, self._made, [one for one in given if one is not None],
            self._weights, list(self._written), len(self._inputs), self._held,
        )  # fmt: skip

    def _given(self, output: Any) -> Given | None:
        home = self._homes.get(id(output)) if isinstance(output, Tensor) else None
        if home is None or len(self._inputs) <= home:
            return None
        if home >= 0 and output is self._inputs[home]:
            return Given(home)
        offset = output.data_ptr() - self._roots[home]
        return Given(home, tuple(output.shape), output.stride(), offset // output.element_size())

    def _make(self, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            self._whole = False
        self._made.append(Made(tensor.nbytes, tensor.dtype))
        self._roots[-len(self._made)] = tensor.data_ptr()
        self._find(tensor, -len(self._made))

    def _find(self, tensor: Tensor, home: int) -> None:
        """Know a tensor by its home as long as it is there: another one may get its id then."""
        self._homes[id(tensor)] = home
        weakref.finalize(tensor, self._homes.pop, id(tensor), None).atexit = False

    def _dense(self, x: Tensor) -> Tensor:
        """Return what steps would make of an input by themselves, as a step of its own."""
        if x.is_contiguous():
            return x
        dense: Tensor = self.views(x.contiguous(), x)
        return dense

    def _note_written(self, tensor: Tensor) -> bool:
        """Say whether a tensor is an input, which may be written into."""
        home = self._homes.get(id(tensor), -1)
        if 0 <= home < len(self._inputs):
            self._written[home] = None
        return home in self._written

    def _copy(self, source: Tensor, index: Tensor | None, target: Tensor) -> None:
        """Write down that rows go to some rows of a target, or to all of a dense one of any shape."""
        dense = target.contiguous().view(source.shape) if index is None and target.is_contiguous() else target
        fits = (
            source.dim() <= 4 and source.stride(-1) == dense.stride(-1) == 1 and source.dtype is dense.dtype
        )
        if not fits or source.is_neg() or dense.is_neg():
            self._whole = False
            return
        left = (1,) * (4 - source.dim())
        size = source.element_size()
        batch, heads, tokens, width = (*left, *source.shape)
        record = _COPY_STEP.pack(
            batch, heads, tokens, dense.shape[-2] if dense.dim() > 1 else 1, width * size,
            source.data_ptr(), *[size * step for step in (*left, *source.stride())[:3]],
            0 if index is None else index.data_ptr(),
            dense.data_ptr(), *[size * step for step in (*left, *dense.stride())[:3]],
        )  # fmt: skip
        self._write((_COPY_ROWS, record), {5: source, 9: index, 10: target})

    def _add(self, a: Tensor, b: Tensor | int, total: Tensor) -> None:
        terms = [a, b] if isinstance(b, Tensor) else [a]
        if any(t.dtype is not torch.int64 or t.dim() > 1 or t.is_neg() for t in (*terms, total)):
            self._whole = False
            return
        steps = [t.stride(0) if t.numel() > 1 else 0 for t in terms]
        other, constant = (b, 0) if isinstance(b, Tensor) else (None, b)
        record = _ADD_STEP.pack(
            total.numel(), a.data_ptr(), steps[0], 0 if other is None else other.data_ptr(), steps[-1], constant, total.data_ptr()
        )  # fmt: skip
        self._write((_ADD_LONGS, record), {1: a, 3: other, 6: total})

    def _packed(self, weight: Tensor, word: int, record: bytes) -> list[Place]:
        """Number a weight that is packed, or might be, and return the word of a record that points to its packed form."""
        home = self._homes.get(id(weight))
        if home is None or not 0 <= home < len(self._inputs):
            self._whole = False
            return []
        is_packed = _WORD.unpack_from(record, 8 * word)[0] != 0
        offset = weight.data_ptr() - self._roots[home]
        self._weights.append(Weight(home, offset, weight.shape[0], math.prod(weight.shape[1:]), is_packed))
        return [Place(word, None, len(self._weights) - 1)] if is_packed else []

    def _write(
        self, heard: tuple[int, bytes], words: dict[int, Tensor | None], packed: Sequence[Place] = ()
    ) -> None:
        """Write a step down, whose record holds the addresses of some tensors."""
        kind, record = heard
        places = list(packed)
        for word, tensor in words.items():
            address = _WORD.unpack_from(record, 8 * word)[0]
            if tensor is None:
                self._whole = self._whole and address == 0
                continue
            home = self._homes.get(id(tensor))
            # another address: the step has made a copy
            if home is None or address != tensor.data_ptr():
                self._whole = False
            elif home < len(self._inputs):
                places.append(Place(word, home, address - self._roots[home]))
        self._steps.append(Step(kind, record, tuple(places)))


def _is_float32(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu
