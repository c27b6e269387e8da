"""From a checkpoint in files to a checkpoint in files: looked at, planned, converted shard by shard, saved, published."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mono_quant.api.apart import original_apart, result_apart
from mono_quant.api.recipe import NOT_ASKED, measured, reference_of
from mono_quant.api.stream_plan import StreamPlan, plan_stream, with_values
from mono_quant.artifact.saving import MAX_SHARD_SIZE, check_save, save_with
from mono_quant.convert.fidelity import Output
from mono_quant.convert.probes import Probe
from mono_quant.convert.schemes import SCHEMES
from mono_quant.io.disk.output import OutputFolder
from mono_quant.io.phases import phase
from mono_quant.io.tensors.checkpoint import open_files
from mono_quant.io.tensors.shards import write_index
from mono_quant.io.tensors.tensor_file import TensorEntry
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.report import QuantReport
from mono_quant.sources.opening import place_of, preview
from mono_quant.sources.source import Access, Subject
from mono_quant.sources.streamed import Streamed, open_streamed
from mono_quant.stream.crew import Crew, meet
from mono_quant.stream.ledger import Ledger
from mono_quant.stream.shard import convert_shard
from mono_quant.stream.spec import Found, ShardRecord
from mono_quant.stream.work import convert_all
from mono_quant.stream.workspace import forget_published, open_workspace
from mono_quant.version import __version__

_FROM_HUB = (
    "the weights came from the Hub file by file; download the repository and convert the folder to measure it"
)


@dataclass(frozen=True)
class StreamResult:
    """What became of a checkpoint.

    Attributes:
        report: of the conversion; None for a worker whose shards are done, while another one finishes.
        folder: with the result; None where it was pushed alone, or another worker writes it.
    """

    report: QuantReport | None
    folder: Path | None


def stream(
    source: str | Path,
    access: Access,
    request: QuantizationConfig,
    output: str | Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> StreamResult:
    """Convert a checkpoint into a folder, without its model in memory.

    Args:
        source: a folder or a Hub id.
        access: how to reach it.
        request: the conversion.
        output: the folder; it appears whole or not at all.
        overwrite: replace an older result.
        restart: discard what an earlier run of another kind left unfinished.
        max_shard_size: as for `save`.

    Raises:
        MonoQuantError: what was finished stays beside the folder, and the same command goes on from there.
    """
    if place_of(source, access) == "local":
        access = replace(access, place="local")  # so that it is said once
    forget_published(output)
    check_save(output, preview(source, access).origin, overwrite=overwrite)
    with open_streamed(source, access) as opened:
        identity = _identity(opened, request, max_shard_size)
        sources = [opened.source.subject.folder] if opened.source.subject.folder else []
        crew = meet()
        with (
            open_workspace(
                output, identity, run=crew.run, rank=crew.rank, restart=restart, sources=sources
            ) as ledger,
            _hashed(opened.source.subject) as hashed,
        ):
            reference = _measure_original(opened, request)
            done = _converted(opened, request, ledger, crew, max_shard_size, reference.written)
            if done is None:
                return StreamResult(None, None)
            plan, records = done
            seen = [one for record in records.values() for one in record.seen]
            report = with_values(plan, seen, opened.source.notes)
            with open_files(ledger.folder, [ledger.path(file).name for file in records]) as saved:
                made = result_apart(plan.subject, report, saved)
                report = measured(report, SCHEMES[request.dtype], made, reference.output, reference.note)
            subject = replace(plan.subject, origin=hashed().origin, weights=())
            put = _putter(plan, records, ledger)
            folder = save_with(output, subject, report, request, put, overwrite=overwrite)
    return StreamResult(report, folder)


class _Reference(NamedTuple):
    """What the float model gives, or why nobody knows; and the names of the tensors that it writes into."""

    output: tuple[Probe, Output] | None
    note: str
    written: frozenset[str] = frozenset()


def _measure_original(opened: Streamed, request: QuantizationConfig) -> _Reference:
    if request.fidelity is False:
        return _Reference(None, NOT_ASKED)
    if opened.checkpoint is None:
        return _Reference(None, _FROM_HUB)
    written: set[str] = set()
    output, note = reference_of(original_apart(opened.source, opened.checkpoint), request, None, written)
    return _Reference(output, note, frozenset(written))


def _converted(
    opened: Streamed,
    request: QuantizationConfig,
    ledger: Ledger,
    crew: Crew,
    max_shard_size: int | str,
    written: Collection[str],
) -> tuple[StreamPlan, Mapping[str, ShardRecord]] | None:
    """Convert all shards; None where another worker finishes. What values say that was not known is planned with."""
    while True:
        found = ledger.found
        with phase("Planning"):
            plan = plan_stream(
                opened.source, opened.pieces, request, found, ledger.seen, max_shard_size, written
            )
        with phase(f"Converting {type(plan.subject.core).__name__}") as went:
            done = convert_all(
                plan.shards, opened.supply, ledger, crew, convert_shard, planned=found, progress=went
            )
        if done is None:
            return None
        if not isinstance(done, Found):
            return plan, done


def _putter(
    plan: StreamPlan, records: Mapping[str, ShardRecord], ledger: Ledger
) -> Callable[[OutputFolder, Sequence[TensorEntry], str], None]:
    """Return what puts the finished files into the folder that is saved."""

    def put(folder: OutputFolder, entries: Sequence[TensorEntry], stem: str) -> None:
        del entries
        for file, record in records.items():
            folder.take(file, ledger.path(file), {"size": record.size, "sha256": record.sha256})
        if len(plan.shards) > 1:
            write_index(folder, plan.weight_map(), plan.total_bytes(), stem)

    return put


@contextmanager
def _hashed(subject: Subject) -> Iterator[Callable[[], Subject]]:
    """Hash the files of a source beside the work, which reads them too."""
    with ThreadPoolExecutor(1) as pool:
        future: Future[Subject] = pool.submit(subject.with_hashes)
        yield future.result


def _identity(opened: Streamed, request: QuantizationConfig, max_shard_size: int | str) -> dict[str, Any]:
    """Return what a result depends on, to tell whether unfinished work is of the same."""
    packages = ("torch", "transformers", "safetensors")
    return {
        "source": opened.identity,
        "settings": request.to_dict(),
        "max_shard_size": max_shard_size,
        "versions": {"mono_quant": __version__} | {name: metadata.version(name) for name in packages},
    }
