"""Every model class of the installed transformers, tiny and random, goes the whole way through mono_quant.

    scripts/sweep                                  # hours on two cores; goes on where the last run ended
    scripts/sweep --only bert,LlamaForCausalLM --dtype int8 --again
    scripts/sweep --source bfloat16                # the float models as bfloat16 checkpoints
    scripts/sweep --streams                        # only whether what is streamed is what is saved: an hour
    scripts/sweep --table                          # only the tables of what is known

Each class is built from a shrunk config and, for int8 and fp16, planned, quantized, saved, loaded, compared and verified. The end
is a table of works, typed refusal and fault, and of what could not be built and why. The exit status is 1 where there is a fault.
"""

import argparse
import importlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sweeping import results
from sweeping.classes import architectures
from sweeping.findings import FAULT, NOT_BUILT, Findings
from sweeping.journey import travel
from sweeping.pool import Job, Limits, Record, run_all
from sweeping.streams import travel_in_files
from sweeping.subject import prepare

DTYPES = ("int8", "fp16")
# What most model classes import; imported once, before the forks.
_SHARED = ("bert", "detr", "llama", "mixtral", "qwen2_vl", "t5", "vit", "wav2vec2")


def main() -> int:
    options = _options()
    jobs = [j for j in architectures(options.every) if not options.only or options.only & set(j)]
    dtypes = [options.dtype] if options.dtype else list(DTYPES)
    known = {} if options.again else results.read(options.results)
    known = {key: record for key, record in known.items() if record["verdict"] != NOT_BUILT}
    todo = [job for job in jobs if any((job[1], d, options.source) not in known for d in dtypes)]
    if not options.table:
        _sweep(todo, dtypes, options)
    names = {name for _, name in jobs}
    records = [
        record
        for (name, dtype, source), record in sorted(results.read(options.results).items())
        if name in names and dtype in dtypes and source == options.source
    ]
    print("\n".join(results.summary(records)))
    return int(any(record["verdict"] == FAULT for record in records))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_names, help="model types or class names, with commas")
    parser.add_argument("--every", action="store_true", help="every class of an architecture, not one")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument(
        "--source", choices=("float32", "bfloat16"), default="float32", help="dtype of the float model"
    )
    parser.add_argument(
        "--streams", action="store_true", help="only: the streamed folder is the saved one, byte for byte"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=int, default=900, help="for one class")
    parser.add_argument("--gigabytes", type=int, default=6, help="of memory for one class")
    parser.add_argument("--results", type=Path, default=Path("sweep.jsonl"), help="where they are kept")
    parser.add_argument("--again", action="store_true", help="do what is known already anew")
    parser.add_argument("--table", action="store_true", help="do nothing, show what is known")
    return parser.parse_args()


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(",") if name.strip()}


def _sweep(jobs: list[Job], dtypes: list[str], options: argparse.Namespace) -> None:
    _warm()

    def work(job: Job, home: Path) -> Iterator[Record]:
        examine = _examine_streams if options.streams else _examine
        yield from examine(job, home, dtypes, options.source)

    limits = Limits(options.seconds, options.gigabytes)
    with options.results.open("a", encoding="utf-8") as file:
        for job, records, end in run_all(jobs, work, options.jobs, limits):
            for record in [*records, *_unanswered(job, records, end, dtypes, options.source)]:
                file.write(results.to_line(record) + "\n")
                file.flush()
                print(results.line(record), flush=True)


def _warm() -> None:
    """Import what every class needs; nothing is computed, so that forks find no threads."""
    import transformers  # noqa: PLC0415

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in _SHARED:
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _examine(job: Job, home: Path, dtypes: list[str], source: str) -> Iterator[Record]:
    start = time.monotonic()
    try:
        subject = prepare(*job, home, source)
    except Exception as e:  # noqa: BLE001 - why a class cannot be built is the result
        found = Findings([(NOT_BUILT, "build", f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")])
        for dtype in dtypes:
            yield _record(job, dtype, source, NOT_BUILT, found, start)
        return
    for dtype in dtypes:
        place = home / dtype
        place.mkdir()
        found = travel(subject, dtype, place)
        yield _record(job, dtype, source, found.verdict, found, start, parameters=subject.parameters)
        start = time.monotonic()


def _examine_streams(job: Job, home: Path, dtypes: list[str], source: str) -> Iterator[Record]:
    for dtype in dtypes:
        start = time.monotonic()
        place = home / dtype
        place.mkdir()
        try:
            found = travel_in_files(*job, dtype, source, place)
        except Exception as e:  # noqa: BLE001 - why a class cannot be built is the result
            found = Findings([(NOT_BUILT, "build", f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")])
        yield _record(job, dtype, source, found.verdict, found, start)


def _unanswered(
    job: Job, records: list[Record], end: str, dtypes: list[str], source: str
) -> Iterator[Record]:
    """Yield a fault for each dtype that a process did not live to answer for."""
    for dtype in dtypes if end else ():
        if dtype not in {record["dtype"] for record in records}:
            yield _record(
                job, dtype, source, FAULT, Findings([(FAULT, "the process", end)]), time.monotonic()
            )


def _record(
    job: Job, dtype: str, source: str, verdict: str, found: Findings, start: float, **more: Any
) -> Record:
    return {
        "model_type": job[0],
        "class": job[1],
        "dtype": dtype,
        "source": source,
        "verdict": verdict,
        "entries": found.entries,
        "notes": found.notes,
        "seconds": round(time.monotonic() - start, 1),
        **more,
    }


if __name__ == "__main__":
    raise SystemExit(main())
