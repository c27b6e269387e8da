"""From a checkpoint in files to a checkpoint in files: looked at, planned, converted shard by shard, saved, published."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mono_quant.api.apart import original_apart, result_apart
from mono_quant.api.origins import check_twins
from mono_quant.api.recipe import NOT_ASKED, measured, reference_of
from mono_quant.api.stream_plan import StreamPlan, plan_stream, with_values
from mono_quant.artifact.publishing import check_publish, publish_gathered
from mono_quant.artifact.saving import MAX_SHARD_SIZE, check_save, save_with
from mono_quant.convert.fidelity import Output
from mono_quant.convert.probes import Probe
from mono_quant.convert.schemes import SCHEMES
from mono_quant.errors import ConfigError, Option
from mono_quant.io.disk.json_text import canonical_json
from mono_quant.io.disk.output import OutputFolder
from mono_quant.io.hub.branch import WorkBranch
from mono_quant.io.hub.push import PushResult
from mono_quant.io.hub.target import PUSH, PushOptions, full_id, open_target
from mono_quant.io.memory import free_bytes
from mono_quant.io.phases import phase
from mono_quant.io.tensors.checkpoint import open_files
from mono_quant.io.tensors.shards import write_index
from mono_quant.io.tensors.tensor_file import TensorEntry
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.report import QuantReport, human_bytes
from mono_quant.sources.opening import place_of, preview
from mono_quant.sources.source import Access, Subject
from mono_quant.sources.streamed import Streamed, open_streamed, weight_bytes
from mono_quant.stream.crew import Crew, meet
from mono_quant.stream.hub_delivery import HubDelivery
from mono_quant.stream.ledger import Ledger
from mono_quant.stream.shard import convert_shard
from mono_quant.stream.spec import Found, ShardRecord
from mono_quant.stream.work import convert_all
from mono_quant.stream.workspace import forget_published, open_workspace
from mono_quant.version import __version__

_GONE = "the files of the result were sent away as they were made; write a folder as well to measure it"
_FROM_HUB = (
    "the weights came from the Hub file by file; download the repository and convert the folder to measure it"
)

# What says only which values are refused, and what is measured of a result: finished files stay what they are. A user who was
# refused changes it, and goes on.
_LATER = ("on_nonfinite", "on_overflow", "fidelity")


@dataclass(frozen=True)
class StreamOrder:
    """What shall become of a checkpoint.

    Attributes:
        request: the conversion.
        output: folder to write; None for none.
        push_to: repository to publish in; None for none.
        push: how to push; `overwrite` goes for the folder too.
        restart: discard what an earlier run of another kind left unfinished.
        max_shard_size: as for `save`.
    """

    request: QuantizationConfig
    output: str | Path | None = None
    push_to: str | None = None
    push: PushOptions = PUSH
    restart: bool = False
    max_shard_size: int | str = MAX_SHARD_SIZE


@dataclass(frozen=True)
class StreamResult:
    """What became of a checkpoint.

    Attributes:
        report: of the conversion; None for a worker whose shards are done, while another one finishes.
        folder: with the result; None where it was pushed alone, or another worker writes it.
        pushed: the commit, where it was asked for.
    """

    report: QuantReport | None = None
    folder: Path | None = None
    pushed: PushResult | None = None


def stream(source: str | Path, access: Access, order: StreamOrder) -> StreamResult:
    """Convert a checkpoint without its model in memory, into a folder, a repository, or both.

    Folder and repository are looked at before a weight is read. Unfinished work stays beside the folder (of a push alone: beside
    where a folder of that name would be) and on a branch of the repository; the same command goes on from there.

    Args:
        source: a folder or a Hub id.
        access: how to reach it, and who pushes.
        order: what to do.

    Raises:
        MonoQuantError: what was finished stays, and the same command goes on from there.
    """
    if order.output is None and order.push_to is None:
        raise ConfigError("there is nowhere to write to; give ", Option("output"), " or ", Option("push_to"))
    if place_of(source, access) == "local":
        access = replace(access, place="local")  # so that it is said once
    coming = preview(source, access)
    overwrite = order.push.overwrite
    place = Path(order.output) if order.output is not None else _beside(str(order.push_to), order.request)

    def check() -> None:
        if order.output is not None:
            check_save(place, coming.origin, overwrite=overwrite)

    if order.output is not None:
        forget_published(place)
    check()
    if order.push_to is not None:
        check_publish(order.push_to, order.push, coming, access.client)
    access = replace(access, revision=coming.origin.sha or access.revision)
    with open_streamed(source, access) as opened:
        identity = _identity(opened, order)
        folder = opened.source.subject.folder
        crew = meet()
        with open_workspace(
            place,
            identity,
            run=crew.run,
            rank=crew.rank,
            restart=order.restart,
            sources=[folder] if folder else [],
            check=check,
        ) as ledger:
            return _Run(opened, order, access, ledger, crew, place, identity).result()


def why_stream(source: str | Path, access: Access) -> str:
    """Return why a checkpoint should be streamed; empty where the model can just as well be in memory.

    Args:
        source, access: as for `stream`.

    Raises:
        MonoQuantError: the source cannot be found.
    """
    world = meet().world
    if world > 1:
        return f"{world} processes share the work"
    size, free = weight_bytes(source, access), free_bytes()
    if size <= free // 2:
        return ""
    return f"its weights have {human_bytes(size)}, and {human_bytes(free)} of memory are free"


def _beside(repo_id: str, request: QuantizationConfig) -> Path:
    """Return where the work of a push lies that writes no folder."""
    return Path(f"{repo_id.rpartition('/')[2]}-{request.dtype}")


class _Run:
    """One conversion in its workspace."""

    def __init__(
        self,
        opened: Streamed,
        order: StreamOrder,
        access: Access,
        ledger: Ledger,
        crew: Crew,
        place: Path,
        identity: Mapping[str, Any],
    ) -> None:
        self._opened, self._order, self._ledger, self._crew = opened, order, ledger, crew
        self._place, self._request = place, order.request
        self._branch: WorkBranch | None = None
        if order.push_to is not None:
            origin = opened.source.subject.origin
            target = open_target(
                full_id(order.push_to, access.client), order.push, source=origin, hub=access.client
            )
            name = hashlib.sha256(canonical_json(dict(identity), "identity").encode()).hexdigest()
            self._branch = WorkBranch.open(target, name)

    def result(self) -> StreamResult:
        """Measure, convert, save and publish."""
        with _hashed(self._opened.source.subject) as hashed:
            reference = self._measure_original()
            done = self._converted(reference.written)
            if done is None:
                return StreamResult()
            plan, records = done
            report = self._report(plan, records, reference)
            subject = replace(plan.subject, origin=hashed().origin, weights=())
            folder = self._save(plan, records, subject, report)
        pushed = None
        if self._branch is not None:
            pushed = publish_gathered(folder, self._branch, list(records), self._order.push)
        return StreamResult(report, folder if self._order.output is not None else None, pushed)

    def _measure_original(self) -> "_Reference":
        request = self._request
        if request.fidelity is False:
            return _Reference(None, NOT_ASKED)
        if self._opened.checkpoint is None:
            return _Reference(None, _FROM_HUB)
        written: set[str] = set()
        made = original_apart(self._opened.source, self._opened.checkpoint)
        output, note = reference_of(made, request, None, written)
        return _Reference(output, note, frozenset(written))

    def _converted(self, written: Collection[str]) -> tuple[StreamPlan, Mapping[str, ShardRecord]] | None:
        """Convert all shards; None where another worker finishes. What values say that was not known is planned with."""
        opened, ledger = self._opened, self._ledger
        supply = opened.supply(ledger.new_scratch())
        check_twins(opened.source, opened.pieces, supply)
        delivery = None if self._branch is None else HubDelivery(self._branch)
        if delivery is not None:
            ledger.learn_sent(delivery.records())
        while True:
            found = ledger.found
            with phase("Planning"):
                plan = plan_stream(
                    opened.source,
                    opened.pieces,
                    self._request,
                    found,
                    ledger.seen,
                    self._order.max_shard_size,
                    written,
                )
            with phase(f"Converting {type(plan.subject.core).__name__}", in_bytes=True) as went:
                done = convert_all(
                    plan.shards,
                    supply,
                    ledger,
                    self._crew,
                    convert_shard,
                    planned=found,
                    room=opened.room,
                    delivery=delivery,
                    keep=self._order.output is not None,
                    progress=went,
                )
            if done is None:
                return None
            if not isinstance(done, Found):
                return plan, done

    def _report(
        self, plan: StreamPlan, records: Mapping[str, ShardRecord], reference: "_Reference"
    ) -> QuantReport:
        seen = [one for record in records.values() for one in record.seen]
        report = with_values(plan, seen, self._opened.source.notes)
        if reference.output is None:
            return report.with_fidelity(None, reference.note)
        ledger = self._ledger
        if any(not ledger.path(file).exists() for file in records):
            return report.with_fidelity(None, _GONE)
        with open_files(ledger.folder, [ledger.path(file).name for file in records]) as saved:
            made = result_apart(plan.subject, report, saved)
            return measured(report, SCHEMES[self._request.dtype], made, reference.output, reference.note)

    def _save(
        self,
        plan: StreamPlan,
        records: Mapping[str, ShardRecord],
        subject: Subject,
        report: QuantReport,
    ) -> Path:
        """Write everything around the finished files; where there is to be no folder, into the workspace and without them."""
        ledger, is_kept = self._ledger, self._order.output is not None

        def put(folder: OutputFolder, entries: Sequence[TensorEntry], stem: str) -> None:
            del entries
            for file, record in records.items():
                facts = {"size": record.size, "sha256": record.sha256}
                if is_kept:
                    folder.take(file, ledger.path(file), facts)
                else:
                    folder.leave_elsewhere(file, facts)
            if len(plan.shards) > 1:
                write_index(folder, plan.weight_map(), plan.total_bytes(), stem)

        place = self._place if is_kept else ledger.new_scratch() / "around"
        overwrite = self._order.push.overwrite
        return save_with(place, subject, report, self._request, put, overwrite=overwrite)


class _Reference(NamedTuple):
    """What the float model gives, or why nobody knows; and the names of the tensors that it writes into."""

    output: tuple[Probe, Output] | None
    note: str
    written: frozenset[str] = frozenset()


@contextmanager
def _hashed(subject: Subject) -> Iterator[Callable[[], Subject]]:
    """Hash the files of a source beside the work, which reads them too."""
    with ThreadPoolExecutor(1) as pool:
        future: Future[Subject] = pool.submit(subject.with_hashes)
        yield future.result


def _identity(opened: Streamed, order: StreamOrder) -> dict[str, Any]:
    """Return what a result depends on, to tell whether unfinished work is of the same."""
    packages = ("torch", "transformers", "safetensors")
    return {
        "source": opened.identity,
        "settings": {key: value for key, value in order.request.to_dict().items() if key not in _LATER},
        "max_shard_size": order.max_shard_size,
        "versions": {"mono_quant": __version__} | {name: metadata.version(name) for name in packages},
    }
