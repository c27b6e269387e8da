"""One model to convert with what belongs to it, and how to reach it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant.convert.arrival import Arrival
from mono_quant.hf.names import Placement
from mono_quant.hf.processors import load_processor
from mono_quant.io.hub.client import HUB, Hub
from mono_quant.io.hub.repo import RepoFile
from mono_quant.io.tensors.blockwise import Blockwise
from mono_quant.io.tensors.checkpoint import WeightFile
from mono_quant.sources.origin import Origin


@dataclass
class Subject:
    """A model with what belongs to it: to be converted, or converted and to be saved.

    Attributes:
        model: the module; on meta for a plan, and while its weights are in their files.
        kind: `module`, `transformers`, `diffusers` or `sentence_transformer`, which stands for every encoder of sentence-transformers.
        core_name: name of the part of `model` that is converted: the transformer inside a SentenceTransformer; empty for the
            whole.
        folder: where its files are; None for a model in memory.
        config: the `config.json` it was read from; None for a model in memory.
        side_files: names of the files in `folder` that belong to the result: tokenizer, processor, licence.
        processor: tokenizer or processor given by the user.
        settings: what is said of a SentenceTransformer beside its weights, as it was when it was read; empty for one from memory.
        origin: where it came from, and what its card says.
        weights: the files that it was read from, where nobody hashed them yet.
        samples: values of the tensors of a converted model, by which it is seen whether somebody changed them.
    """

    model: nn.Module
    kind: str
    core_name: str = ""
    folder: Path | None = None
    config: Mapping[str, Any] | None = None
    side_files: tuple[str, ...] = ()
    processor: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=lambda: Origin("model"))
    weights: tuple[WeightFile, ...] = ()
    samples: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def core(self) -> nn.Module:
        """The part of the model that is converted."""
        return self.model.get_submodule(self.core_name)

    def with_hashes(self) -> "Subject":
        """Return the same with the hashes of its weight files in its origin; of those that are as they were."""
        found = {file.path.name: file.sha256() for file in sorted(self.weights)}
        files = {name: digest for name, digest in found.items() if digest is not None}
        return replace(self, origin=replace(self.origin, files=files), weights=()) if self.weights else self

    def find_processor(self) -> Any:
        """Return the given processor, the one that the model brings, or the one in the folder; None when there is none."""
        if self.processor is None and self.kind == "sentence_transformer":
            return getattr(self.model, "processor", None)
        if self.processor is None and self.folder is not None and self.kind == "transformers":
            self.processor = load_processor(self.folder)
        return self.processor


@dataclass(frozen=True)
class Stored:
    """Weights that are still in their files.

    Attributes:
        fill: reads them into a new model, all of them float, or some int8 as they arrive.
        unfinite: reads them and names those, in the model, that hold NaN or infinity.
    """

    fill: Callable[[Arrival | None], nn.Module]
    unfinite: Callable[[], frozenset[str]]


@dataclass
class Source:
    """What the user gave, opened.

    Attributes:
        subject: the float model with what belongs to it.
        owned: True when nobody else holds the model, so that it may be changed.
        dtypes: that transformers would give the float tensors, by name: one that files hold in another dtype is in the model
            as they hold it. Empty for a model in memory, which is what it is.
        notes: what the user should know.
        stored: the weights, where the model is a skeleton that has none yet.
        placed: where the tensors of the checkpoint go in the core of the model; nothing for a model in memory.
        codes: which tensors of the files are fp8 and read as floats, where some are.
    """

    subject: Subject
    owned: bool = False
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stored: Stored | None = None
    placed: Placement = field(default_factory=Placement)
    codes: Blockwise | None = None

    def read(self) -> "Source":
        """Return the same with the weights, where they are still in their files."""
        if self.stored is None:
            return self
        subject = replace(self.subject, model=self.stored.fill(None))
        return replace(self, subject=subject, owned=True, stored=None)


@dataclass(frozen=True)
class Preview:
    """What is known of a source before it is opened.

    Attributes:
        origin: where it comes from; the class is not known yet.
        side_files: what will travel along byte for byte, by name.
        rewritten: files that a result holds under the same name with another content.
    """

    origin: Origin
    side_files: Mapping[str, RepoFile] = field(default_factory=dict)
    rewritten: tuple[str, ...] = ()

    def replaces(self, path: str, there: RepoFile) -> bool:
        """Tell whether the result will surely put another content in the place of a file."""
        mine = self.side_files.get(path)
        return path in self.rewritten or (mine is not None and mine.differs(there))


@dataclass(frozen=True)
class Access:
    """How to reach a source.

    Attributes:
        revision: branch, tag or commit of a Hub id.
        client: where the Hub is and who asks.
        trust_remote_code: run code from the repository where its config asks for it.
        allow_pickle: read pickle weights, in a guarded process.
        place: `hub` or `local` to say what a text means; None to decide by looking.
    """

    revision: str | None = None
    client: Hub = HUB
    trust_remote_code: bool = False
    allow_pickle: bool = False
    place: str | None = None


ACCESS = Access()
