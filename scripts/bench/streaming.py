"""What it takes to convert a checkpoint in files into another: time and memory, beside a copy and beside llm-compressor."""

import argparse
import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.synthetic import WIDE, Sizes, write_llama
from bench.timing import Row

HEADER = """\
A sharded bfloat16 Llama with random weights in the sizes of Llama 3 8B, `wide` one with single tensors of 1.1 and 2.1 GB; to int8.
Every way in processes of its own, in turn, round after round, from and to one disk that has nothing to write when a run begins.
hot: every byte of the source was read just before; cold: it was dropped from the page cache (the share that is there is given).
s: until the way is done; durable: and its files are on the disk, by fsync (ours are when it is done). Ratios are to cp -r.
MiB: the peak of RssAnon, looked at every 5 ms, over that of the process with torch, transformers and the library imported."""
COPY, PEER = "cp -r", "llm-compressor"
WAYS = (COPY, "stream", "stream, measured", "quantize(folder).save", PEER)
CACHES = ("hot", "cold")
_PAUSE = 0.005


def run_stream(options: argparse.Namespace) -> Row:
    """Measure every way on every checkpoint."""
    print(HEADER)
    sizes = {f"{number:g}": Sizes.of(number) for number in options.gigabytes}
    if options.wide:
        sizes["wide"] = WIDE
    rows = []
    for name, wanted in sizes.items():
        with _checkpoint(options, name, wanted) as source, _folder(options.scratch) as scratch:
            rows += _measured(name, source, scratch, options)
    return {"rows": rows}


@contextmanager
def _checkpoint(options: argparse.Namespace, name: str, sizes: Sizes) -> Iterator[Path]:
    """Make a checkpoint, or take the one that an earlier run kept."""
    if options.keep is None:
        with _folder(options.scratch) as folder:
            write_llama(folder / name, sizes)
            yield folder / name
        return
    place = options.keep / name
    if not (place / "config.json").is_file():
        shutil.rmtree(place, ignore_errors=True)
        write_llama(place, sizes)
    yield place


@contextmanager
def _folder(where: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=where, prefix="mono_quant-bench-") as folder:
        yield Path(folder)


def _measured(name: str, source: Path, scratch: Path, options: argparse.Namespace) -> list[Row]:
    size = sum(file.stat().st_size for file in source.iterdir()) / 1e9
    found: dict[tuple[str, str], list[Row]] = {(c, way): [] for c in options.cache for way in options.ways}
    for number in range(options.rounds):
        for (cache, way), runs in found.items():
            if number == 0 or way not in options.once:
                runs.append(_run(way, cache, source, scratch / "target", options))
    print(
        f"\n{name}: {size:.1f} GB\n{'':<6} {'':<22} {'there':>5} {'s':>6} {'of cp':>6} {'durable':>7} {'of cp':>6} "
        f"{'MiB':>6} {'GB out':>6}"
    )
    statistic = min if options.best else statistics.median
    rows: list[Row] = []
    for (cache, way), runs in found.items():
        row: Row = {"checkpoint": name, "gigabytes": size, "cache": cache, "way": way, "runs": runs}
        problem = next((run["skipped"] for run in runs if "skipped" in run), "")
        if problem:
            row["skipped"] = problem
        else:
            row |= {key: statistic(run[key] for run in runs) for key in ("seconds", "durable")}
            row |= {key: max(run[key] for run in runs) for key in ("anonymous", "written")}
            row["there"] = statistics.mean(run["there"] for run in runs)
        rows.append(row)
        _compare(row, rows)
    return rows


def _compare(row: Row, rows: list[Row]) -> None:
    """Print a row, with its ratios to the copy."""
    if "skipped" in row:
        print(f"{row['cache']:<6} {row['way']:<22} {row['skipped']}")
        return
    text = f"{row['cache']:<6} {row['way']:<22} {row['there']:>5.0%}"
    copy = next((r for r in rows if (r["cache"], r["way"]) == (row["cache"], COPY)), {})
    for key, width in (("seconds", 6), ("durable", 7)):
        text += f" {row[key]:>{width}.1f}"
        if key in copy:
            row[f"{key}_of_copy"] = row[key] / copy[key]
            text += f" {row[f'{key}_of_copy']:>5.2f}x"
        else:
            text += f" {'':>6}"
    print(f"{text} {row['anonymous']:>6.0f} {row['written']:>6.1f}", flush=True)


def _run(way: str, cache: str, source: Path, target: Path, options: argparse.Namespace) -> Row:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    share = _prepare(source, cache)
    if way == COPY:
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, target], check=True)
        found: Row = {"seconds": time.perf_counter() - start, "anonymous": 0.0}
    else:
        found = _convert(way, source, target, options)
        if "skipped" in found:
            return found
    start = time.perf_counter()
    files = [file for file in target.rglob("*") if file.is_file()]
    for file in files:
        _fsync(file)
    found["durable"] = found["seconds"] + time.perf_counter() - start
    found |= {"written": sum(file.stat().st_size for file in files) / 1e9, "there": share}
    shutil.rmtree(target)
    return found


def _convert(way: str, source: Path, target: Path, options: argparse.Namespace) -> Row:
    """Run a way that is told when to begin, and watch its memory."""
    places = [str(source), str(target), str(options.threads)]
    command = [sys.executable, "-m", "bench.converting", way, *places]
    variables = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    if way == PEER:
        if options.llmcompressor is None:
            return {"skipped": "it runs in an environment of its own: give --llmcompressor PYTHON"}
        command = [options.llmcompressor, str(Path(__file__).with_name("with_llmcompressor.py")), *places]
        variables.pop("PYTHONPATH", None)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        lines: list[str] = []
        for line in iter(process.stdout.readline, ""):
            lines.append(line)
            if line == "ready\n":
                break
        before = _anonymous(process.pid)
        watched = _Watch(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        lines += process.stdout.readlines()
        process.wait()
        watched.stop()
        errors.seek(0)
        said = errors.read().strip()
    if process.returncode:
        return {"skipped": said.splitlines()[-1][:150] if said else "it failed"}
    return {"seconds": float(lines[-1]), "anonymous": watched.peak - before, "base": before}


class _Watch:
    """Looks at the memory of a process again and again.

    Attributes:
        peak: the largest RssAnon seen, in MiB.
    """

    def __init__(self, process: int) -> None:
        self.peak = 0.0
        self._process, self._ended = process, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_PAUSE):
            self.peak = max(self.peak, _anonymous(self._process))


def _anonymous(process: int) -> float:
    """Return the RssAnon of a process in MiB; 0 of one that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return int((status.partition("RssAnon:")[2].split() or ["0"])[0]) / 1024


def _prepare(source: Path, cache: str) -> float:
    """Bring the source into the page cache, or out of it; return the share that is there then."""
    there = total = 0
    for file in sorted(source.iterdir()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            if cache == "hot":
                window = memoryview(bytearray(1 << 22))
                while os.readv(descriptor, [window]):
                    pass
            else:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            total += os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    for file in source.iterdir():
        there += _resident(file)
    return there / total


def _resident(file: Path) -> int:
    """Return how many bytes of a file are in the page cache."""
    size = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages
        )
        # the mapping cannot be closed while something points into it
        del start
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return min(size, sum(page & 1 for page in pages) * mmap.PAGESIZE)


def _fsync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
