"""What belongs to a converted model, kept with it, so that it can be saved and pushed by itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mono_quant.artifact.changes import samples_of
from mono_quant.artifact.facts import Manifest, read_report
from mono_quant.artifact.loading import loaded_subject
from mono_quant.artifact.publishing import publish
from mono_quant.artifact.saving import MAX_SHARD_SIZE, save, save_beside
from mono_quant.convert.savers import refuse_savers_
from mono_quant.errors import MissingFileError
from mono_quant.hf.marks import mark_
from mono_quant.hf.sentence import is_encoder, transformer_in
from mono_quant.hf.state import at_rest
from mono_quant.io.disk.manifest import MANIFEST
from mono_quant.io.disk.output import temporary_folder
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.target import PushOptions
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.report import QuantReport
from mono_quant.planning.walk import is_transformers_model
from mono_quant.sources.source import Subject


@dataclass(frozen=True)
class Keeper:
    """A `hf.marks.Keeper`.

    Attributes:
        subject: what belongs to the model, with another module in its place: a model would keep itself alive.
        report: of the conversion; None where it is in the folder of the subject.
        config: the request; None as well.
    """

    subject: Subject
    report: QuantReport | None = None
    config: QuantizationConfig | None = None

    def __deepcopy__(self, memo: object) -> "Keeper":
        # a copy of the model is the same conversion
        return self

    def __getstate__(self) -> dict[str, Any]:
        # tokenizers cannot all be pickled
        return self.__dict__ | {"subject": replace(self.subject, processor=None)}

    def save(self, model: nn.Module, folder: Path, max_shard_size: int | str | None) -> None:
        """Write the model into a folder, beside what others wrote there.

        Raises:
            MonoQuantError: as `QuantizedModel.save`; nothing was written.
        """
        report, config = self._facts()
        save_beside(folder, self._of(model), report, config, max_shard_size=max_shard_size or MAX_SHARD_SIZE)

    def push(
        self, model: nn.Module, repo_id: str, token: str | bool | None, options: Mapping[str, Any]
    ) -> Any:
        """Push the model in one commit; see `mono_quant.push_to_hub`."""
        report, config = self._facts()
        with temporary_folder() as scratch:
            folder = save(scratch / "model", self._of(model), report, config)
            return publish(folder, repo_id, PushOptions.of(options), model=model, client=Hub(token=token))

    def around(self, name: str) -> "Keeper":
        """Return the keeper of an encoder of sentence-transformers, of which the model is the part called `name`."""
        subject = replace(self.subject, kind="sentence_transformer", core_name=name, settings={})
        return replace(self, subject=subject)

    def _of(self, model: nn.Module) -> Subject:
        return replace(self.subject, model=model)

    def _facts(self) -> tuple[QuantReport, QuantizationConfig]:
        if self.report is not None and self.config is not None:
            return self.report, self.config
        folder = self.subject.folder
        if folder is None or not (folder / MANIFEST).exists():
            raise MissingFileError(
                f"{folder} is gone, where the report and the card of this model were; load it again from where it is now"
            )
        return read_report(folder), QuantizationConfig.from_dict(Manifest.read(folder).settings)


def keep_(
    subject: Subject, dtype: str, report: QuantReport | None = None, config: QuantizationConfig | None = None
) -> None:
    """Let a converted model of transformers or diffusers, or a SentenceTransformer, save and push itself; others refuse.

    Args:
        subject: the model and what belongs to it.
        dtype: `int8` or `fp16`.
        report, config: of the conversion; None where they are in `subject.folder`.
    """
    with at_rest(subject.model):
        subject.samples = samples_of(subject.model)
    if subject.kind == "diffusers" or is_transformers_model(subject.core):
        mark_(subject.model, subject.core, dtype, Keeper(replace(subject, model=nn.Module()), report, config))
    else:
        refuse_savers_(subject.model)


def keep_loaded_(folder: Path, model: nn.Module, manifest: Manifest | None) -> None:
    """Do the same for a model that was loaded from a folder; one that others made (no manifest) refuses to be saved."""
    if manifest is None:
        mark_(model, transformer_in(model) if is_encoder(model) else model, "int8")
    else:
        keep_(loaded_subject(folder, model, manifest), manifest.dtype)
