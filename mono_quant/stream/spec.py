"""What a streaming conversion will read and write, as plain data that any process can work on, and what one found out.

Every name, dtype, shape and offset is known before a byte of a weight is read. What only the values say (`Found`) begins
empty; where a shard finds something, everything is planned anew with it, and shards whose plan stays the same stay done.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Action = Literal["copy", "cast", "int8"]


class Piece(NamedTuple):
    """Where the bytes of a tensor lie in a source.

    Attributes:
        name: in the checkpoint, for errors.
        file: its name in the source.
        start: of its first byte in the file.
        dtype: as torch calls it, without `torch.`; `float8_e4m3fn` for block-quantized weights.
        shape: of the tensor.
        nbytes: of the tensor in the file.
        block: rows and columns that one scale is for, of a block-quantized weight.
        inverse: its scales, which the values are multiplied with; `[rows / block, columns / block]`, rounded up.
        read_as: dtype that a weight has in the model: of a block-quantized one, once it is dequantized, and of one that the
            class, or most of the checkpoint, has in another dtype than the file.
    """

    name: str
    file: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    block: tuple[int, int] = (0, 0)
    inverse: "Piece | None" = None
    read_as: str = ""


class Place(NamedTuple):
    """Where a tensor lies in a file that is written.

    Attributes:
        name: in that file.
        dtype, shape: of the tensor.
        start: of its first byte in the file.
        nbytes: of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Job(NamedTuple):
    """One tensor of the source, and what is made of it in one file.

    Attributes:
        weight: name in the model of the tensor that it is, or is a part of; statistics and errors carry it.
        part: its number among the tensors of the checkpoint that `weight` is made of.
        action: `copy` takes the bytes, `cast` changes the floating dtype, `int8` makes codes and scales.
        source: the tensor.
        kind: of the layer (`planning/kinds`): says which axis is a row.
        value: the copy, the cast or the codes; None where another file has it.
        scale: of codes; None where another file has it.
        fits: dtype that a copy would be cast to if nothing else kept it; what does not fit it is found as in a cast. Empty for none.
    """

    weight: str
    part: int
    action: Action
    source: Piece
    kind: str = ""
    value: Place | None = None
    scale: Place | None = None
    fits: str = ""


class Constant(NamedTuple):
    """A small tensor that the class computes and no file holds."""

    place: Place
    data: bytes


@dataclass(frozen=True)
class ShardPlan:
    """One file of the result.

    Attributes:
        file: its name.
        size: in bytes.
        header: the first bytes of the file, with everything that safetensors says of it.
        jobs: in the order in which their sources lie in their files.
        constants: what is written as it is.
    """

    file: str
    size: int
    header: bytes
    jobs: tuple[Job, ...]
    constants: tuple[Constant, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the source that it is made of, in the order in which they are needed."""
        pieces = [piece for job in self.jobs for piece in (job.source, job.source.inverse) if piece]
        return tuple(dict.fromkeys(piece.file for piece in pieces))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of its tensors, in the order in which they fill files."""
        return tuple(sorted(n for n in json.loads(self.header[8:]) if n != "__metadata__"))

    def digest(self) -> str:
        """Return the sha256 of everything that its bytes depend on, but for the bytes of the source."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives back an equal plan."""
        return {
            "file": self.file,
            "size": self.size,
            "header": base64.b64encode(self.header).decode(),
            "jobs": [[*job[:3], _piece(job.source), *job[4:]] for job in self.jobs],
            "constants": [[place, base64.b64encode(data).decode()] for place, data in self.constants],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ShardPlan":
        """Return the plan that `to_dict` described."""
        jobs = tuple(
            Job(weight, part, action, _read_piece(source), kind, _place(value), _place(scale), fits)
            for weight, part, action, source, kind, value, scale, fits in data["jobs"]
        )
        constants = tuple(Constant(_some(place), base64.b64decode(raw)) for place, raw in data["constants"])
        return cls(data["file"], data["size"], base64.b64decode(data["header"]), jobs, constants)


class Seen(NamedTuple):
    """What a job saw of the values of its tensor; sums, so that parts of one weight add up.

    Attributes:
        weight, part: of the job.
        signal, noise: sums of squares of the values and of the errors of codes.
        overflowed, clamped, flushed: of a cast; see `kernels.weights.HalfCast`.
        unfinite: number of values that are NaN or infinite.
        largest: magnitude of all finite values, of a cast where some overflow.
        nan: number of values that are NaN.
    """

    weight: str
    part: int
    signal: float = 0.0
    noise: float = 0.0
    overflowed: int = 0
    clamped: int = 0
    flushed: int = 0
    unfinite: int = 0
    largest: float = 0.0
    nan: int = 0

    def joined(self, other: "Seen") -> "Seen":
        """Return what was seen of two parts of a weight together."""
        return Seen(
            self.weight,
            self.part,
            self.signal + other.signal,
            self.noise + other.noise,
            self.overflowed + other.overflowed,
            self.clamped + other.clamped,
            self.flushed + other.flushed,
            self.unfinite + other.unfinite,
            max(self.largest, other.largest),
            self.nan + other.nan,
        )


@dataclass(frozen=True)
class Found:
    """What only values say; weights have the names that jobs carry.

    Attributes:
        wide: scales, by their names in the file, that the dtype of their weight cannot hold, so that the file has them in float32.
        unfinite: weights that hold NaN or infinity.
        overflowed: weights that do not fit the dtype they are cast to.
    """

    wide: frozenset[str] = field(default=frozenset())
    unfinite: frozenset[str] = field(default=frozenset())
    overflowed: frozenset[str] = field(default=frozenset())

    def __or__(self, other: "Found") -> "Found":
        return Found(
            self.wide | other.wide, self.unfinite | other.unfinite, self.overflowed | other.overflowed
        )

    def __bool__(self) -> bool:
        return bool(self.wide or self.unfinite or self.overflowed)

    def to_dict(self) -> dict[str, list[str]]:
        """Return plain data; `from_dict` gives back an equal object."""
        return {name: sorted(names) for name, names in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Iterable[str]]) -> "Found":
        """Return the object that `to_dict` described."""
        return cls(**{name: frozenset(names) for name, names in data.items()})


@dataclass(frozen=True)
class ShardRecord:
    """A file that was written, or what was found instead.

    Attributes:
        file: its name.
        digest: of its plan.
        size, sha256: of the file; empty where something was found, and the file is not there.
        seen: one per job.
        found: why everything has to be planned anew; nothing where the file is good.
    """

    file: str
    digest: str
    size: int
    sha256: str
    seen: tuple[Seen, ...]
    found: Found = field(default_factory=Found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives back an equal record."""
        return {**vars(self), "seen": [list(seen) for seen in self.seen], "found": self.found.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ShardRecord":
        """Return the record that `to_dict` described."""
        seen = tuple(Seen(*values) for values in data["seen"])
        return cls(**{**data, "seen": seen, "found": Found.from_dict(data["found"])})


def summed(seen: Iterable[Seen]) -> dict[str, Seen]:
    """Return what was seen of each weight, its parts together."""
    found: dict[str, Seen] = {}
    # a weight that lies at the border of two files was read twice
    once = {(one.weight, one.part): one for one in seen}
    for (weight, _), one in sorted(once.items()):
        found[weight] = one.joined(found[weight]) if weight in found else one
    return found


def _piece(piece: Piece) -> list[Any]:
    return [*piece[:7], None if piece.inverse is None else _piece(piece.inverse), piece.read_as]


def _read_piece(data: Any) -> Piece:
    name, file, start, dtype, shape, nbytes, block, inverse, read_as = data
    rows, columns = block
    scales = None if inverse is None else _read_piece(inverse)
    return Piece(name, file, start, dtype, tuple(shape), nbytes, (rows, columns), scales, read_as)


def _place(data: Any) -> Place | None:
    return None if data is None else _some(data)


def _some(data: Any) -> Place:
    name, dtype, shape, start, nbytes = data
    return Place(name, dtype, tuple(shape), start, nbytes)
