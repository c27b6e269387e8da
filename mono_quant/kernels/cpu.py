"""The native library on CPU: load it, test it against the reference, call it.

The library is plain C called through ctypes, which releases the GIL. It shares torch's OpenMP threads because it
names the same runtime and is loaded after torch.
"""

import ctypes
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mono_quant.errors import SettingError
from mono_quant.kernels import pool, reference
from mono_quant.kernels.activations import ACTIVATIONS, AUTO, SCHEMES, ActivationScheme
from mono_quant.kernels.inputs import INDICES

# Instruction sets, best last; the numbers are those of the C interface.
PATHS = {"portable": 0, "avx2": 1, "avxvnni": 2, "avx512": 3, "avx512vnni": 4}
# The kernels of AVX-VNNI in the encoding of AVX-512, for tests on processors that have only that: never chosen.
TWIN = {"avx512vl-vnni": 5}
# What "auto" means on a path: the most accurate scheme that costs little there. Without VNNI 12 bits cost nothing; VNNI
# multiplies 8-bit codes twice as fast as wider ones.
_OWN_ACTIVATIONS = {"avxvnni": "int8-g128", "avx512vnni": "int8-g128", "avx512vl-vnni": "int8-g128"}
WIDE = "int12"
# Paths with kernels of their own for 8-bit codes.
_BYTES = frozenset(_OWN_ACTIVATIONS)
_VERSION = 4
_FOLDER = Path(__file__).resolve().parent
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "mq_version": [],
    "mq_isas": [],
    "mq_linear": [_INT] * 2
    + [_LONG, _INT]
    + [_LONG] * 3
    + [_POINTER, _INT, _LONG]
    + [_POINTER] * 4
    + [_INT, _POINTER, _LONG],
    "mq_half_linear": [_INT] * 2
    + [_LONG] * 3
    + [_POINTER, _INT, _LONG]
    + [_POINTER] * 2
    + [_INT, _POINTER, _LONG],
    "mq_conv": [_INT] * 2 + [_LONG, _INT] + [_POINTER] * 2 + [_INT] + [_POINTER] * 4 + [_INT, _POINTER],
    "mq_fused_conv": [_INT] * 2
    + [_LONG, _INT]
    + [_POINTER] * 10
    + [ctypes.c_double, _POINTER, _INT, _POINTER],
    "mq_recurrent": [_INT] * 2
    + [_LONG]
    + [_INT] * 2
    + [_LONG, _POINTER, _INT, _LONG]
    + [_POINTER] * 8
    + [_LONG],
    "mq_packed_words": [_INT] * 2 + [_LONG] * 2,
    "mq_pack": [_INT] * 3 + [_LONG] * 3 + [_POINTER] * 2,
    "mq_chain": [ctypes.c_char_p],
    "mq_norm": [_INT] * 2 + [_LONG] * 2 + [_INT] + [_POINTER] * 2 + [ctypes.c_double] + [_POINTER] * 4,
    "mq_rotary": [_INT] * 2 + [ctypes.c_char_p] + [_POINTER] * 3 + [_LONG, _POINTER],
    "mq_quantize_rows": [_INT, _LONG, _LONG, _POINTER, _INT, _LONG, _INT] + [_POINTER] * 3,
    "mq_to_half": [_INT, _LONG, _POINTER, _INT, _POINTER, _POINTER],
    "mq_embedding": [_INT, _LONG, _LONG, _LONG] + [_POINTER] * 4 + [_INT],
    "mq_transpose": [_INT] + [_LONG] * 4 + [_POINTER] * 2,
    "mq_attention": [ctypes.c_char_p],
    "mq_run": [ctypes.c_char_p, _LONG, ctypes.c_char_p, _LONG],
    "mq_run_apart": [ctypes.c_char_p, _LONG, ctypes.c_char_p, _LONG, _LONG, _LONG, _LONG, _INT],
}


Longs: TypeAlias = "ctypes.Array[ctypes.c_int64]"


class EncodedRows(NamedTuple):
    """A matrix in int8 rows.

    Attributes:
        codes: int8 [N, K] in [-127, 127].
        scale: fp32 [N, 1]; NaN for a row with NaN or infinity, 1 for a row of zeros.
        signal: sum of squares of the matrix, of its finite rows.
        noise: sum of squares of what rounding changed in them.
    """

    codes: Tensor
    scale: Tensor
    signal: float
    noise: float


class HalfValues(NamedTuple):
    """A tensor in float16.

    Attributes:
        value: float16, same shape.
        overflowed: finite values of magnitude >= 65520, which became infinite.
        clamped: values between 65504 and 65520, which became 65504.
        flushed: non-zero values that became zero.
        nonfinite: values that were NaN or infinite.
    """

    value: Tensor
    overflowed: int
    clamped: int
    flushed: int
    nonfinite: int


class Packed(NamedTuple):
    """The codes of a weight once more, in the order in which a path multiplies them: see `Cpu.pack`.

    Attributes:
        words: int32, in memory as the kernels of `path` read it.
        path: of the `Cpu` that wrote them.
        wide: its words hold pairs of 16 bits, for codes of any width, and not four bytes.
    """

    words: Tensor
    path: str
    wide: bool


class Samples:
    """Bytes of some memory, read again and again without a tensor; the memory has to outlive the reading."""

    _COUNT = 4

    def __init__(self, address: int, size: int) -> None:
        places = (
            {address + (size - 8) * i // (self._COUNT - 1) for i in range(self._COUNT)} if size >= 8 else ()
        )
        self._words = [ctypes.c_int64.from_address(place) for place in places]

    def read(self) -> list[int]:
        return [word.value for word in self._words]


class Cpu:
    """The library on one instruction set.

    Every method returns None where the library has no kernel for its arguments; the caller then takes the reference.

    Attributes:
        path: the name of the instruction set.
        activations: what "auto" means on it.
    """

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self.path, self.activations = path, _OWN_ACTIVATIONS.get(path, WIDE)
        # the number by which the library knows the path
        self.isa = (PATHS | TWIN)[path]
        self._library = library
        self._linear, self._half_linear = library.mq_linear, library.mq_half_linear
        self._embedding = library.mq_embedding
        # the C functions of `fused`, `attention` and `fused_conv`, which return 0 where they ran
        self.chain: Callable[..., int] = library.mq_chain
        self.norm: Callable[..., int] = library.mq_norm
        self.rotary: Callable[..., int] = library.mq_rotary
        self.attention: Callable[..., int] = library.mq_attention
        self.conv_and_norm: Callable[..., int] = library.mq_fused_conv
        # runs what `program` wrote down
        self.run: Callable[..., int] = library.mq_run
        self.run_apart: Callable[..., int] = library.mq_run_apart

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        scheme: ActivationScheme,
        packed: Packed | None = None,
    ) -> Tensor | None:
        """Apply an int8 linear layer; see `mono_quant.kernels.int8_linear`.

        Args:
            packed: of this weight; it is passed over where it was made for other kernels.
        """
        dtype = _DTYPES.get(x.dtype)
        rows, depth = weight.shape
        shape = x.shape
        if dtype is None or not (x.is_cpu and weight.is_cpu) or not shape or shape[-1] != depth:
            return None
        x = _dense(x)
        # int8 [N, K] and fp32 [N, 1] are dense unless someone transposed them
        weight, weight_scale = _dense(weight), _dense(weight_scale)
        if weight.dtype is not torch.int8 or weight_scale.dtype is not torch.float32:
            return None
        bias_pointer, bias_dtype = None, 0
        if bias is not None:
            known = _DTYPES.get(bias.dtype)
            if known is None or bias.numel() != rows:
                return None
            bias = _dense(bias)
            bias_pointer, bias_dtype = bias.data_ptr(), known
        if weight_scale.numel() != rows:
            return None
        out = pool.empty((*shape[:-1], rows), x)
        qmax = scheme.widest_code(depth)
        failed = self._linear(
            self.isa,
            qmax,
            scheme.group,
            torch.get_num_threads(),
            shape[:-1].numel(),
            rows,
            depth,
            x.data_ptr(),
            dtype,
            depth,
            weight.data_ptr(),
            None if packed is None else self._words_of(packed, qmax),
            weight_scale.data_ptr(),
            bias_pointer,
            bias_dtype,
            out.data_ptr(),
            rows,
        )
        return None if failed else out

    def half_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Apply a linear layer with float16 weights; see `mono_quant.kernels.half_linear`."""
        dtype = _DTYPES.get(x.dtype)
        rows, depth = weight.shape
        shape = x.shape
        if dtype is None or not (x.is_cpu and weight.is_cpu) or not shape or shape[-1] != depth:
            return None
        if weight.dtype is not torch.float16:
            return None
        x, weight = _dense(x), _dense(weight)
        bias_pointer, bias_dtype = None, 0
        if bias is not None:
            known = _DTYPES.get(bias.dtype)
            if known is None or bias.numel() != rows:
                return None
            bias = _dense(bias)
            bias_pointer, bias_dtype = bias.data_ptr(), known
        out = pool.empty((*shape[:-1], rows), x)
        failed = self._half_linear(
            self.isa,
            torch.get_num_threads(),
            shape[:-1].numel(),
            rows,
            depth,
            x.data_ptr(),
            dtype,
            depth,
            weight.data_ptr(),
            bias_pointer,
            bias_dtype,
            out.data_ptr(),
            rows,
        )
        return None if failed else out

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
        out_size: Sequence[int],
        scheme: ActivationScheme,
        packed: Packed | None = None,
    ) -> Tensor | None:
        """Apply an int8 convolution; see `mono_quant.kernels.int8_conv`.

        Args:
            packed: of this weight as [O, kh * kw * I / groups], in `groups`; see `linear`.
        """
        dtype = _DTYPES.get(x.dtype)
        bias_dtype = 0 if bias is None else _DTYPES.get(bias.dtype)
        if dtype is None or bias_dtype is None or not (x.is_cpu and weight.is_cpu):
            return None
        if weight.dtype is not torch.int8 or weight_scale.dtype is not torch.float32:
            return None
        images, channels, height, width = x.shape
        rows, inner, *kernel_size = weight.shape
        depth = inner * kernel_size[0] * kernel_size[1]
        if channels != inner * groups or rows % groups:
            return None
        if weight_scale.numel() != rows or (bias is not None and bias.numel() != rows):
            return None
        # pixels of adjacent channels: a receptive field is then a few long runs of memory
        pixels = self.pixels(x)
        weight = weight.permute(0, 2, 3, 1).contiguous()
        weight_scale = _dense(weight_scale)
        bias = None if bias is None else _dense(bias)
        out = pool.empty((images, *out_size, rows), x)
        sizes = [images, groups, rows // groups, height, width, inner]
        sizes += [*kernel_size, *stride, *padding, *dilation, *out_size]
        qmax = scheme.widest_code(depth)
        failed = self._library.mq_conv(
            self.isa,
            qmax,
            scheme.group,
            torch.get_num_threads(),
            (_LONG * len(sizes))(*sizes),
            pixels.data_ptr(),
            dtype,
            weight.data_ptr(),
            None if packed is None else self._words_of(packed, qmax),
            weight_scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            bias_dtype,
            out.data_ptr(),
        )
        if failed:
            return None
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            return out.permute(0, 3, 1, 2)
        return self._transposed(out.flatten(1, 2)).view(images, rows, *out_size)

    def fused_conv(
        self,
        x: Tensor,
        weight: Tensor,
        floats: Sequence[Tensor | None],
        epsilon: float,
        sizes: Longs,
        out_shape: tuple[int, int, int, int],
        residual: Tensor | None,
        relu: bool,
        scheme: ActivationScheme,
        packed: Packed | None = None,
    ) -> Tensor | None:
        """Apply an int8 convolution and what follows it; see `mono_quant.kernels.fused_conv.conv`.

        Args:
            x: fp32 [B, I, H, W].
            weight: int8 [O, I / groups, kh, kw].
            floats: fp32 [O], dense: weight scale and bias; weight, bias, mean and variance of batch norm.
            epsilon: of batch norm.
            sizes: images, groups and O / groups; height, width and I / groups; those of kernel, stride, padding, dilation and
                output.
            out_shape: [B, H', W', O].
            residual: fp32 [B, O, H', W'].
            relu: at the end.
            scheme: of the activations.
            packed: of this weight, see `conv`.

        Returns:
            fp32 [B, O, H', W'], the channels last in memory.
        """
        qmax = scheme.widest_code(sizes[5] * sizes[6] * sizes[7])
        # copies are held until the call is over
        x, weight = self._channels_last(x), self._channels_last(weight)
        residual = None if residual is None else self._channels_last(residual)
        out = pool.empty(out_shape, x)
        failed = self.conv_and_norm(
            self.isa,
            qmax,
            scheme.group,
            torch.get_num_threads(),
            sizes,
            x.data_ptr(),
            weight.data_ptr(),
            None if packed is None else self._words_of(packed, qmax),
            *[None if part is None else part.data_ptr() for part in floats],
            epsilon,
            None if residual is None else residual.data_ptr(),
            relu,
            out.data_ptr(),
        )
        return None if failed else out.permute(0, 3, 1, 2)

    def _channels_last(self, x: Tensor) -> Tensor:
        """Return a tensor of four dimensions whose channels are last in memory."""
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_neg():
            return x
        return self.pixels(x).permute(0, 3, 1, 2)

    def recurrent(
        self,
        cell: int,
        given: Tensor,
        sizes: Longs,
        state: Sequence[Tensor],
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        backward: bool,
        scheme: ActivationScheme,
        packed: Packed | None = None,
    ) -> Tensor | None:
        """Run a recurrent layer over time; see `mono_quant.kernels.run_recurrent`. All tensors are dense, floats fp32.

        Args:
            cell: its number in the C interface.
            given: [sum of sizes, G * H].
            sizes: of the steps.
            state: [sizes[0], H] each; the last states take the place of the initial ones.
            weight: int8 [G * H, H].
            weight_scale: [G * H, 1].
            bias: [G * H] or None.
            backward: in time.
            scheme: of the activations.
            packed: of this weight, see `linear`.

        Returns:
            [sum of sizes, H].
        """
        size = weight.shape[1]
        qmax = scheme.widest_code(size)
        out = pool.empty((given.shape[0], size), given)
        failed = self._library.mq_recurrent(
            self.isa,
            qmax,
            scheme.group,
            torch.get_num_threads(),
            cell,
            len(sizes),
            sizes,
            backward,
            size,
            given.data_ptr(),
            weight.data_ptr(),
            None if packed is None else self._words_of(packed, qmax),
            weight_scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            state[0].data_ptr(),
            state[-1].data_ptr(),
            out.data_ptr(),
            size,
        )
        return None if failed else out

    def pixels(self, x: Tensor) -> Tensor:
        """Return images [B, C, H, W] as [B, H, W, C], dense: a copy where the channels are not last in memory."""
        planes = x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
        # the transpose has kernels for floats alone
        if planes and not x.is_neg() and x.is_floating_point():
            return self._transposed(x.flatten(2)).view(x.shape[0], *x.shape[2:], x.shape[1])
        return _dense(x.permute(0, 2, 3, 1))

    def pack(self, weight: Tensor, scheme: ActivationScheme, groups: int = 1) -> Packed | None:
        """Write the codes of a weight in the order in which products with `scheme` read them.

        It costs about as much as a product with two tokens, and each call with more than a few tokens does it anew where it
        is given none.

        Args:
            weight: int8 [N, K], dense, on CPU.
            scheme: only the width of its codes matters.
            groups: of a convolution; each has N / groups rows.

        Returns:
            A copy of one or two bytes per code, rows and columns padded; None where this path reads weights as they are.
        """
        rows, depth = weight.shape[0] // groups, weight.shape[1]
        if weight.dtype is not torch.int8 or not weight.is_cpu or not weight.is_contiguous():
            return None
        qmax = scheme.widest_code(depth)
        count = self._library.mq_packed_words(self.isa, qmax, rows, depth)
        if count <= 0:
            return None
        words = weight.new_empty(groups * count, dtype=torch.int32)
        failed = self._library.mq_pack(
            self.isa,
            qmax,
            torch.get_num_threads(),
            groups,
            rows,
            depth,
            weight.data_ptr(),
            words.data_ptr(),
        )
        return None if failed else Packed(words, self.path, self.is_wide(qmax))

    def _words_of(self, packed: Packed | None, qmax: int) -> int | None:
        if packed is None or packed.path != self.path or packed.wide != self.is_wide(qmax):
            return None
        return packed.words.data_ptr()

    def is_wide(self, qmax: int) -> bool:
        """Say whether products with codes up to `qmax` read weights as pairs of 16 bits."""
        return self.path not in _BYTES or qmax > reference.QMAX

    def _transposed(self, x: Tensor) -> Tensor:
        """Return a dense copy of [B, R, C] as [B, C, R]."""
        images, rows, columns = x.shape
        out = pool.empty((images, columns, rows), x)
        self._library.mq_transpose(
            torch.get_num_threads(), images, rows, columns, x.element_size(), x.data_ptr(), out.data_ptr()
        )
        return out

    def embedding(
        self, indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Gather and dequantize rows; see `mono_quant.kernels.int8_embedding`."""
        known = _DTYPES.get(dtype)
        if known is None or not (indices.is_cpu and weight.is_cpu) or indices.dtype not in INDICES:
            return None
        if weight.dtype is not torch.int8 or weight_scale.dtype is not torch.float32:
            return None
        rows, depth = weight.shape
        if weight_scale.numel() != rows:
            return None
        index = indices.to(torch.int64).contiguous()
        weight, weight_scale = _dense(weight), _dense(weight_scale)
        out = weight_scale.new_empty((*indices.shape, depth), dtype=dtype)
        failed = self._embedding(
            torch.get_num_threads(),
            index.numel(),
            rows,
            depth,
            index.data_ptr(),
            weight.data_ptr(),
            weight_scale.data_ptr(),
            out.data_ptr(),
            known,
        )
        return None if failed else out

    def encode_rows(
        self,
        weight: Tensor,
        scale_dtype: torch.dtype,
        into: tuple[Tensor, Tensor] | None = None,
        threads: int | None = None,
    ) -> EncodedRows | None:
        """Quantize the rows of a weight; see `mono_quant.kernels.encode_rows`."""
        dtype, scale_code = _DTYPES.get(weight.dtype), _DTYPES.get(scale_dtype, 0)
        if dtype is None or not weight.is_cpu or weight.dim() != 2:
            return None
        weight = _dense(weight)
        rows, depth = weight.shape
        codes, scale = into or (
            weight.new_empty((rows, depth), dtype=torch.int8),
            weight.new_empty((rows, 1), dtype=torch.float32),
        )
        energy = weight.new_empty((rows, 2), dtype=torch.float64)
        failed = self._library.mq_quantize_rows(
            threads or torch.get_num_threads(),
            rows,
            depth,
            weight.data_ptr(),
            dtype,
            depth,
            scale_code,
            codes.data_ptr(),
            scale.data_ptr(),
            energy.data_ptr(),
        )
        if failed:
            return None
        signal, noise = energy.sum(0).tolist()
        return EncodedRows(codes, scale, signal, noise)

    def cast_half(
        self, tensor: Tensor, into: Tensor | None = None, threads: int | None = None
    ) -> HalfValues | None:
        """Cast to float16 and count what does not fit; see `mono_quant.kernels.cast_half`."""
        if tensor.dtype not in (torch.float32, torch.bfloat16) or not tensor.is_cpu:
            return None
        tensor = _dense(tensor)
        value = tensor.new_empty(tensor.shape, dtype=torch.float16) if into is None else into
        counts = (_LONG * 4)()
        failed = self._library.mq_to_half(
            threads or torch.get_num_threads(),
            tensor.numel(),
            tensor.data_ptr(),
            _DTYPES[tensor.dtype],
            value.data_ptr(),
            counts,
        )
        return None if failed else HalfValues(value, *counts)


def longs(numbers: Sequence[int]) -> Longs:
    """Return integers as the library takes them."""
    return (_LONG * len(numbers))(*numbers)


def _dense(x: Tensor) -> Tensor:
    # a tensor marked as negated shares its memory with the positive one
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


@dataclass(frozen=True)
class Loaded:
    """What came of loading the library.

    Attributes:
        library: the loaded library, or None.
        reason: why there is none, or why some path was refused; None when all is well.
        compiler: the compiler that built it, when known.
        paths: the instruction sets that this processor runs and that passed the self-test, best last.
    """

    library: ctypes.CDLL | None
    reason: str | None
    compiler: str | None
    paths: tuple[str, ...]


def load() -> Loaded:
    """Load the library from this folder and test each path that the processor can run."""
    record = _read_record()
    compiler = record.get("compiler")
    file = _FOLDER / "libmono_quant.so"
    if not file.exists():
        reason = record.get("reason") or "it was not built when the package was installed"
        return Loaded(None, reason, compiler, ())
    try:
        library = ctypes.CDLL(str(file))
        for name, argtypes in _SIGNATURES.items():
            getattr(library, name).argtypes = argtypes
        library.mq_packed_words.restype = _LONG
    except (OSError, AttributeError) as e:
        return Loaded(None, f"{file} could not be loaded: {e}", compiler, ())
    version = library.mq_version()
    if version != _VERSION:
        return Loaded(None, f"{file} has interface {version}, this package needs {_VERSION}", compiler, ())
    mask = library.mq_isas()
    runnable = [name for name, isa in PATHS.items() if mask >> isa & 1]
    passed = tuple(name for name in runnable if _agrees(library, name))
    failed = [name for name in runnable if name not in passed]
    reason = f"self-test failed, not used: {', '.join(failed)}" if failed else None
    return Loaded(library, reason, compiler, passed)


def _read_record() -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((_FOLDER / "libmono_quant.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record


def choose(loaded: Loaded, path: str | None = None) -> tuple[Cpu | None, str | None]:
    """Return the kernels to use, or None and the reason for the reference.

    Args:
        loaded: from `load`.
        path: a name in `PATHS`, or "reference"; the best one when not given.

    Raises:
        ValueError: the path is unknown, or this machine does not have it.
    """
    if path == "reference":
        return None, "the reference was asked for"
    if path is not None and path not in PATHS:
        raise ValueError(f"unknown kernel path {path!r}; choose from {', '.join(['reference', *PATHS])}")
    if loaded.library is None or not loaded.paths:
        if path is not None:
            raise ValueError(f"kernel path {path!r} is not available: {loaded.reason}")
        return None, loaded.reason
    if path is not None and path not in loaded.paths:
        raise ValueError(f"this processor does not run {path!r}, only {', '.join(loaded.paths)}")
    return Cpu(loaded.library, path or loaded.paths[-1]), loaded.reason


def from_environment(loaded: Loaded) -> tuple[Cpu | None, str | None]:
    """Choose by MONO_QUANT_ISA; see `choose`.

    Raises:
        SettingError: it names no path, or one that this machine does not have.
    """
    try:
        return choose(loaded, os.environ.get("MONO_QUANT_ISA") or None)
    except ValueError as e:
        raise SettingError(f"MONO_QUANT_ISA: {e}") from e


def activations_from_environment() -> str:
    """Return the scheme that MONO_QUANT_ACTIVATIONS gives to layers whose own is "auto".

    Raises:
        SettingError: there is no such scheme.
    """
    name = os.environ.get("MONO_QUANT_ACTIVATIONS") or AUTO
    if name not in ACTIVATIONS:
        raise SettingError(f"MONO_QUANT_ACTIVATIONS is {name!r}; choose from {', '.join(ACTIVATIONS)}")
    return name


def _agrees(library: ctypes.CDLL, path: str) -> bool:
    """Hold one path against the reference, bit for bit, on small products made to catch it."""
    # few and many tokens take different kernels; odd sizes leave a tail everywhere
    cases = [(3, 7, 67), (61, 51, 131)]
    return all(
        _case_agrees(Cpu(library, path), scheme, *case) for scheme in SCHEMES.values() for case in cases
    )


def _case_agrees(cpu: Cpu, scheme: ActivationScheme, tokens: int, rows: int, depth: int) -> bool:
    index = torch.arange(tokens * depth, dtype=torch.float32)
    x = torch.sin(index * index).view(tokens, depth)
    x[0] = 1.0
    x[1] = 0.0
    x[2, depth - 1] = float("nan")
    weight = ((torch.arange(rows * depth) * 37 + 11) % 256 - 128).to(torch.int8).view(rows, depth)
    weight[0], weight[1] = 127, -128
    weight_scale = torch.linspace(0.5, 1.5, rows).view(rows, 1)
    bias = torch.linspace(-1.0, 1.0, rows)
    expected = reference.linear(x, weight, weight_scale, bias, scheme)
    for packed in (None, cpu.pack(weight, scheme)):
        found = cpu.linear(x, weight, weight_scale, bias, scheme, packed)
        if found is None or not torch.equal(found.nan_to_num(1e30), expected.nan_to_num(1e30)):
            return False
    return True
