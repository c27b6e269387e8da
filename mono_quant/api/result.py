"""The object that a verb returns: the converted model with everything that belongs to it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mono_quant.api.measuring import suggestion
from mono_quant.artifact import loading
from mono_quant.artifact.facts import read_report
from mono_quant.artifact.keeping import keep_
from mono_quant.artifact.publishing import publish
from mono_quant.artifact.saving import MAX_SHARD_SIZE, render_card, save
from mono_quant.errors import ConfigError, MissingFileError, MonoQuantError, UnsupportedModelError
from mono_quant.graphs.backend import mono_quant
from mono_quant.hf.processors import pipeline
from mono_quant.io.disk.manifest import MANIFEST
from mono_quant.io.disk.output import temporary_folder
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.push import PushResult
from mono_quant.io.hub.target import PushOptions
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.report import QuantReport
from mono_quant.planning.suggestion import Suggestion
from mono_quant.planning.walk import is_transformers_model
from mono_quant.sources.source import Subject


@dataclass(repr=False)
class QuantizedModel:
    """A converted model.

    Attributes:
        model: the module itself, of the class it was.
        report: what became of every parameter, and how close the output is.
        config: the request.
    """

    model: nn.Module
    report: QuantReport
    config: QuantizationConfig
    _subject: Subject

    def __repr__(self) -> str:
        return f"<QuantizedModel {type(self.model).__name__}: {self.report.summary}>"

    @property
    def processor(self) -> Any:
        """The tokenizer or processor: the one given, else the one of the source folder; None when there is none."""
        return self._subject.find_processor()

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> Path:
        """Write the model as a folder that appears whole or not at all.

        Args:
            folder: must not exist, unless `overwrite` and mono_quant wrote all that is in it.
            overwrite: replace an older result. What its owner wrote on its card stays.
            max_shard_size: of one weight file, in bytes or text such as `5GB`.

        Returns:
            The folder.

        Raises:
            OutputError: it could not be written; what was there before is untouched.
        """
        return save(
            folder,
            self._subject,
            self.report,
            self.config,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
        )

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, **options: Any) -> PushResult:
        """Save, load back, compare, and push in one commit.

        Args:
            repo_id: target; the token's account when it has no owner. Created when missing.
            token: the saved login when None.
            **options: `private`, `overwrite`, `create_pr`, `revision`, `commit_message`, as for `mono_quant.push_to_hub`.

        Returns:
            The commit that holds the files.

        Raises:
            HubError: the Hub refused; nothing was changed, or it says what was.
        """
        return self.publish(repo_id, PushOptions.of(options), Hub(token=token))

    def publish(self, repo_id: str, options: PushOptions, client: Hub) -> PushResult:
        """Push, with all options in one value; see `push_to_hub`."""
        with temporary_folder() as scratch:
            return publish(self.save(scratch / "model"), repo_id, options, model=self.model, client=client)

    def suggest(self, probe: Any = None) -> Suggestion:
        """Measure for which layers a wider scheme of activations pays; see `mono_quant.suggest`. The model is left as it is.

        Args:
            probe: inputs to measure with: a tensor, a tuple of arguments or a dict of keyword arguments.

        Raises:
            ConfigError: it cannot be run.
        """
        return suggestion(self._subject, probe)

    def compile(self, *, dynamic: bool | None = None, fullgraph: bool = False) -> None:
        """Compile the model in place, as `torch.compile(model, backend="mono_quant")` does; no compiler is needed.

        What the model does in a forward becomes a few fused calls: attention, and layers with their norms, activations and
        residuals. The first call of each kind of shape takes seconds. Everything else about the model stays as it is.

        Args:
            dynamic: whether sizes vary. None: those that did vary, from then on.
            fullgraph: raise where the model cannot be one graph, instead of compiling the parts.
        """
        self.model.compile(backend=mono_quant, dynamic=dynamic, fullgraph=fullgraph)

    def card(self) -> str:
        """Return the README that `save` writes."""
        return render_card(self._subject, self.report, self.config)

    def pipeline(self, task: str) -> Any:
        """Return a transformers pipeline around the model and its processor.

        Args:
            task: a transformers task, e.g. `text-classification` or `feature-extraction`.

        Raises:
            ConfigError: transformers has no such task.
            UnsupportedModelError: the model is not a transformers model, or not one for this task.
        """
        if not isinstance(task, str):
            raise ConfigError(f"task is {task!r}; give the name of one, such as 'feature-extraction'")
        core = self._subject.core
        if not is_transformers_model(core):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} is no transformers model, so it has no pipeline; call .model itself"
            )
        try:
            return pipeline(task, core, self.processor)
        except MonoQuantError:
            raise
        except KeyError as e:
            raise ConfigError(
                f"task {task!r}: {e.args[0]}. Choose one that this version of transformers has"
            ) from e
        except Exception as e:
            # transformers raises a bare Exception when a tokenizer or processor is missing
            raise UnsupportedModelError(
                f"{type(self.model).__name__} makes no {task!r} pipeline ({type(e).__name__}: {e}). Choose the task that the "
                f"model was made for, quantize it with processor=, or call .model itself"
            ) from e

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        model: nn.Module | Callable[[], nn.Module] | None = None,
        *,
        verify: bool = True,
    ) -> "QuantizedModel":
        """Load a saved folder with its report and processor; see `mono_quant.load` for the model alone.

        Args:
            folder: that `save` wrote.
            model: for a plain module, an instance or a function that makes one.
            verify: compare every file with the manifest's sha256 first.

        Raises:
            MonoQuantError: a typed error for a missing, tampered, foreign or newer folder.
        """
        path = Path(folder)
        loaded, manifest = loading.load(path, model, verify=verify)
        if manifest is None:
            raise MissingFileError(f"{path} has no {MANIFEST}; load the model alone with mono_quant.load")
        report = read_report(path)
        subject = loading.loaded_subject(path, loaded, manifest)
        config = QuantizationConfig.from_dict(manifest.settings)
        keep_(subject, manifest.dtype, report, config)
        return cls(loaded, report, config, subject)
