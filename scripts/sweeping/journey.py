"""The whole way of one model in one dtype, through public names alone."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mono_quant
from mono_quant.artifact.inspection import verify
from sweeping import checks, streams
from sweeping.findings import Findings
from sweeping.outputs import differences, run
from sweeping.subject import Subject
from sweeping.untouched import changes, state_of


def travel(subject: Subject, dtype: str, home: Path) -> Findings:
    """Plan, quantize, save, load, compare and verify.

    Args:
        subject: to convert.
        dtype: `int8` or `fp16`.
        home: an empty folder to work in.
    """
    found = Findings()
    if subject.own_road:
        found.notes.append(f"transformers alone: {subject.own_road}")
    if subject.inputs is None:
        found.notes.append(f"not run: {subject.silence}")
    before = state_of(subject.model)
    planned = found.attempt("plan the object", mono_quant.plan, subject.model, dtype)
    result = found.attempt("quantize the object", mono_quant.quantize, subject.model, dtype)
    found.check("the original is untouched", changes(before, subject.model))
    if subject.folder is not None:
        _take_the_folder_road(found, subject, result, dtype, home)
    if result is not None:
        found.check("the plan of the object is what was done", checks.other_rows(planned, result.report))
        found.check("the report accounts for every tensor", checks.unaccounted(subject.model, result.report))
        _follow(found, subject, result, home)
    return found


def _take_the_folder_road(
    found: Findings, subject: Subject, from_object: Any, dtype: str, home: Path
) -> None:
    planned = found.attempt("plan the folder", mono_quant.plan, subject.folder, dtype)
    result = found.attempt("quantize the folder", mono_quant.quantize, subject.folder, dtype)
    assert subject.folder is not None
    streams.follow(found, result, subject.folder, dtype, home)
    if result is None:
        return
    found.check("the plan of the folder is what was done", checks.other_rows(planned, result.report))
    if from_object is not None and not subject.own_road:
        equal = differences(checks.held(from_object.model), checks.held(result.model))
        found.check("object and folder give equal tensors", equal)


def _follow(found: Findings, subject: Subject, result: Any, home: Path) -> None:
    """Everything that comes after a conversion; the forwards last, because one may write into its model."""
    half = subject.own_half() if result.report.dtype == "fp16" else None
    if half is not None:
        found.check("float16 where transformers has float16", checks.other_dtypes(half, result.report))
    folder = found.attempt("save", result.save, home / "saved")
    loaded = theirs = None
    if folder is not None:
        _save_again(found, subject, result, folder, home)
        loaded = _reload(found, result, folder)
        theirs = _outside(found, subject, folder, result.report)
    if subject.inputs is None:
        return
    output = found.attempt("run the result", run, result.model, subject.inputs)
    if output is None:
        return
    found.check("the output is close", checks.far(subject, result.report, output, half))
    if loaded is not None:
        again = found.attempt("run what was loaded", run, loaded, subject.inputs)
        found.check("load gives the output bit for bit", differences(output, again or {}))
    if theirs is not None:
        _compare_outside(found, subject, result.report, output, theirs)


def _save_again(found: Findings, subject: Subject, result: Any, folder: Path, home: Path) -> None:
    first = checks.files(folder)
    second = found.attempt("save again", result.save, home / "again", may_refuse=False)
    if second is not None:
        found.check("a second save has the same bytes", checks.other_files(first, checks.files(second)))
        shutil.rmtree(second)
    opened = found.attempt("reopen", mono_quant.QuantizedModel.from_folder, folder, may_refuse=False)
    third = opened and found.attempt("save what was loaded", opened.save, home / "third", may_refuse=False)
    if third:
        names = [
            n for n in first if n.endswith(".safetensors") or (n == "config.json" and subject.own_config)
        ]
        before, now = ({n: b for n, b in f.items() if n in names} for f in (first, checks.files(third)))
        found.check("what was loaded is saved with the same bytes", checks.other_files(before, now))
        shutil.rmtree(third)


def _reload(found: Findings, result: Any, folder: Path) -> Any:
    found.check("the report has the bytes of the file", checks.other_bytes(folder, result.report))
    found.attempt("verify", verify, folder, may_refuse=False)
    loaded = found.attempt("load", mono_quant.load, folder, may_refuse=False)
    if loaded is not None:
        found.check("load gives the class that was saved", checks.other_class(result.model, loaded))
        equal = differences(checks.held(result.model), checks.held(loaded))
        found.check("load gives every tensor bit for bit", equal)
    return loaded


def _outside(found: Findings, subject: Subject, folder: Path, report: Any) -> nn.Module | None:
    """Let transformers load the folder without us: it must where the card says so; else an error protects the user."""
    cls: Any = type(subject.model)
    # in float32, the arithmetic on a float16 file is exact but for the order of sums
    options = {"dtype": torch.float32} if report.dtype == "fp16" else {}
    if "library_name: transformers" in (folder / "README.md").read_text(encoding="utf-8"):
        name = "load with transformers, as the card says"
        theirs = found.attempt(name, cls.from_pretrained, folder, may_refuse=False, **options)
    else:
        try:
            theirs = cls.from_pretrained(folder, **options)
        except Exception:  # noqa: BLE001 - any error will do
            return None
    return None if theirs is None else theirs.eval()  # type: ignore[no-any-return]


def _compare_outside(
    found: Findings, subject: Subject, report: Any, output: Mapping[str, Tensor], theirs: nn.Module
) -> None:
    other = found.attempt("run what transformers loaded", run, theirs, subject.inputs)
    if other is None:
        return
    if report.dtype == "fp16":
        found.check(
            "transformers computes the same from the float16 file", checks.noisy(other, output, report)
        )
    else:
        found.check(
            "transformers computes the same from the int8 file", checks.far(subject, report, other, None)
        )
