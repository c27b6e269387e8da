"""From a source to a saved folder and a repository: what can be refused is refused before the work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mono_quant.api.recipe import convert_source
from mono_quant.api.result import QuantizedModel
from mono_quant.artifact.publishing import check_publish
from mono_quant.artifact.saving import check_save
from mono_quant.errors import MonoQuantError
from mono_quant.io.hub.push import PushResult
from mono_quant.io.hub.target import PUSH, PushOptions
from mono_quant.planning.config import QuantizationConfig
from mono_quant.sources.opening import open_source, place_of, preview
from mono_quant.sources.source import Access


@dataclass(frozen=True)
class Order:
    """What shall become of a source.

    Attributes:
        request: the conversion.
        output: folder to save to; None for none.
        push_to: repository to publish in; None for none.
        push: how to push; `overwrite` goes for the folder too.
        processor, probe: tokenizer or processor, and inputs to measure the output with, where the user gives them.
    """

    request: QuantizationConfig
    output: str | Path | None = None
    push_to: str | None = None
    push: PushOptions = PUSH
    processor: Any = None
    probe: Any = None


@dataclass(frozen=True)
class Delivery:
    """What became of it: the converted model, the folder and the commit where they were asked for."""

    result: QuantizedModel
    folder: Path | None = None
    pushed: PushResult | None = None


def deliver(source: Any, access: Access, order: Order) -> Delivery:
    """Convert a source, save it and push it.

    Folder and repository are looked at before anything is downloaded. What is pushed is read from the commit that the
    repository was checked against.

    Args:
        source: a folder, a Hub id or a module.
        access: how to reach it, and who pushes.
        order: what to do.

    Raises:
        MonoQuantError: one that comes after the folder was saved says where it is.
    """
    if place_of(source, access) == "local":
        access = replace(access, place="local")  # so that it is said once
    if order.output is not None or order.push_to is not None:
        coming = preview(source, access)
        if order.output is not None:
            check_save(order.output, coming.origin, overwrite=order.push.overwrite)
        if order.push_to is not None:
            check_publish(order.push_to, order.push, coming, access.client)
            access = replace(access, revision=coming.origin.sha or access.revision)
    opened = open_source(source, access, processor=order.processor)
    result = convert_source(opened, order.request, inplace=opened.owned, probe=order.probe)
    folder = pushed = None
    if order.output is not None:
        folder = result.save(order.output, overwrite=order.push.overwrite)
    if order.push_to is not None:
        with after_saving(folder, order.push_to):
            pushed = result.publish(order.push_to, order.push, access.client)
    return Delivery(result, folder, pushed)


@contextmanager
def after_saving(folder: Path | None, repo_id: str) -> Iterator[None]:
    """Let a push that fails say what is there already: the folder saved before it, perhaps the commit."""
    try:
        yield
    except MonoQuantError as e:
        if folder is None:
            raise
        saved = (
            f" The model itself is saved in {folder}; push it from there: mono-quant push {folder} {repo_id}"
        )
        raise type(e)(*e.args, saved) from e
    except KeyboardInterrupt as e:
        if folder is not None:
            e.add_note(f"the model is saved in {folder}")
        e.add_note(f"look at {repo_id} on the Hub: its files are all new or all old")
        raise
