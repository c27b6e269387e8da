"""Every error mono_quant raises on purpose.

Catch `MonoQuantError` for all of them, or a branch for one family::

    MonoQuantError
    ├── ConfigError                 an argument or option is wrong
    │   ├── SettingError            an environment variable of ours means nothing
    │   └── PatternError            a skip pattern matches nothing
    ├── MissingDependencyError      an optional package is needed for this input
    ├── SourceNotFoundError         no such folder, file or object
    ├── UnsupportedModelError       the model cannot be converted as it was given
    │   ├── StateDictError          weights without an architecture
    │   ├── TorchScriptError        scripted, traced or compiled module
    │   ├── WrappedModelError       DataParallel, DDP or FSDP wrapper
    │   ├── AdapterAttachedError    PEFT adapters are attached
    │   ├── MetaTensorError         weights are on the meta device or offloaded
    │   ├── AlreadyQuantizedError   the weights are quantized already
    │   └── RemoteCodeError         the model needs code from its repository
    ├── UnsafeInputError            the input points outside itself or carries code
    │   └── PickleOnlyError         there are only pickle weights
    ├── CorruptCheckpointError      the files contradict themselves
    │   └── MissingFileError        a file that the folder promises is not there
    ├── LimitExceededError          the input asks for unreasonable resources
    ├── NonFiniteWeightError        NaN or infinity in a weight
    ├── Fp16RangeError              a value does not fit float16
    ├── FormatVersionError          the saved format is newer than this package
    ├── InputError                  a converted layer got an input that it cannot take
    ├── FrozenWeightError           a converted weight was to be changed or trained
    ├── OutputError                 the result could not be written
    │   ├── OutputExistsError       something that is not ours is there
    │   ├── OutputBusyError         another run is writing there
    │   ├── ResumeError             what a stopped run left is of other settings or another source
    │   └── OutputWriteError        the file system refused
    └── HubError                    the Hub refused or did not answer
        ├── HubAuthError            the token is missing, wrong or too weak
        ├── HubGatedError           access to the repository must be requested
        ├── HubNotFoundError        no such repository, revision or file
        ├── HubConflictError        the repository changed or holds foreign weights
        ├── HubOfflineError         not in the cache and the network is off
        └── HubTransientError       the Hub failed for now; try again

A message says which thing, what is wrong with it, the value found, and what to do. Where that is to pass an argument, the
message holds an `Option`, and every front end says it in its own words: `worded`. So do the `Words` of a report.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Option:
    """An argument of the library that a message speaks of; as text it is Python.

    Attributes:
        name: the keyword.
        value: to pass; None when it is for the reader to choose.
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        return f"{self.name}=" if self.value is None else f"{self.name}={self.value!r}"


class Name(Option):
    """An argument that a message names without a value to pass; as text it is its keyword."""

    def __str__(self) -> str:
        return self.name


class Words(str):
    """A text that speaks of options: as it stands it is Python, and a front end words it anew.

    Args:
        *parts: the text, in pieces of text, `Option`s and other `Words`.
    """

    parts: tuple[object, ...]

    def __new__(cls, *parts: object) -> Self:
        words = super().__new__(cls, "".join(map(str, parts)))
        words.parts = tuple(p for part in parts for p in (part.parts if isinstance(part, Words) else (part,)))
        return words


def worded(text: str, say: Callable[[Option], str]) -> str:
    """Return a text with its options named by a front end.

    Args:
        text: `Words`, or what speaks of no option.
        say: how to name one.
    """
    return _join(text.parts, say) if isinstance(text, Words) else text


def _join(parts: Iterable[object], say: Callable[[Option], str]) -> str:
    return "".join(say(part) if isinstance(part, Option) else str(part) for part in parts)


class MonoQuantError(Exception):
    """Base of every error raised on purpose by mono_quant.

    Args:
        *parts: the message, in pieces of text and `Option`s.
    """

    # no `__init__`: torch.compile cannot trace one, and would raise its own error in place of this one

    def __str__(self) -> str:
        return self.worded(str)

    @property
    def options(self) -> tuple[Option, ...]:
        """The arguments that the message speaks of, such as those that would help."""
        return tuple(part for part in self.args if isinstance(part, Option))

    def worded(self, say: Callable[[Option], str]) -> str:
        """Return the message.

        Args:
            say: how to name an argument.
        """
        return _join(self.args, say)


class ConfigError(MonoQuantError):
    """An argument or option is wrong."""


class SettingError(ConfigError, ValueError):
    """An environment variable of ours has a value that means nothing here."""


class PatternError(ConfigError):
    """A skip pattern matches no module."""


class MissingDependencyError(MonoQuantError):
    """An optional package is needed for this input."""


class SourceNotFoundError(MonoQuantError):
    """The source names nothing that exists."""


class UnsupportedModelError(MonoQuantError):
    """The model cannot be converted as it was given."""


class StateDictError(UnsupportedModelError):
    """Weights were given without the architecture they belong to."""


class TorchScriptError(UnsupportedModelError):
    """A scripted, traced or compiled module was given."""


class WrappedModelError(UnsupportedModelError):
    """A DataParallel, DDP or FSDP wrapper was given."""


class AdapterAttachedError(UnsupportedModelError):
    """PEFT adapters are attached to the model."""


class MetaTensorError(UnsupportedModelError):
    """Weights have no data: they are on the meta device or offloaded."""


class AlreadyQuantizedError(UnsupportedModelError):
    """The weights are quantized already."""


class RemoteCodeError(UnsupportedModelError):
    """The model needs code from its repository."""


class UnsafeInputError(MonoQuantError):
    """The input points outside itself or carries code."""


class PickleOnlyError(UnsafeInputError):
    """There are only pickle weights, which can run code when read."""


class CorruptCheckpointError(MonoQuantError):
    """The files of a checkpoint contradict themselves."""


class MissingFileError(CorruptCheckpointError):
    """A file that the folder promises is not there."""


class LimitExceededError(MonoQuantError):
    """The input asks for unreasonable resources."""


class NonFiniteWeightError(MonoQuantError):
    """A weight holds NaN or infinity."""


class Fp16RangeError(MonoQuantError):
    """A value does not fit float16."""


class FormatVersionError(MonoQuantError):
    """The saved format is newer than this package."""


class InputError(MonoQuantError):
    """A converted layer got an input that it cannot take."""


class FrozenWeightError(MonoQuantError):
    """A weight of a converted layer was to be changed or trained."""


class OutputError(MonoQuantError):
    """The result could not be written."""


class OutputExistsError(OutputError):
    """Something that is not ours is at the output path."""


class OutputBusyError(OutputError):
    """Another run is writing to the output path."""


class ResumeError(OutputError):
    """What a stopped run left was made with other settings or from another source."""


class OutputWriteError(OutputError):
    """The file system refused a write."""


class HubError(MonoQuantError):
    """The Hub refused or did not answer."""


class HubAuthError(HubError):
    """The token is missing, wrong or too weak."""


class HubGatedError(HubError):
    """Access to the repository must be requested first."""


class HubNotFoundError(HubError):
    """No such repository, revision or file on the Hub."""


class HubConflictError(HubError):
    """The repository changed meanwhile or holds foreign weights."""


class HubOfflineError(HubError):
    """The file is not in the cache and the network is switched off."""


class HubTransientError(HubError):
    """The Hub failed for now; the same call may work later."""
