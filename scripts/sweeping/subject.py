"""One class as the journeys need it: the model, inputs, a float folder, and what transformers itself makes of that folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sweeping.building import build
from sweeping.inputs import Inputs, NoInputsError, find_inputs
from sweeping.outputs import differences, run
from sweeping.special import INPUTS


@dataclass
class Subject:
    """What both dtypes share.

    Attributes:
        model: float, in evaluation mode.
        inputs: that it runs on; None when none were found, and `silence` says what it said.
        output: of the model on them.
        folder: written by transformers' `save_pretrained`; None when it refused.
        own_road: what is lost between `save_pretrained` and `from_pretrained` without us; empty when nothing is.
        own_half: the model that transformers loads in float16, and its output; None when it does not.
    """

    model: nn.Module
    inputs: Inputs | None
    silence: str
    output: dict[str, Tensor] | None
    folder: Path | None
    own_road: str
    own_half: nn.Module | None = None

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.model.parameters())


def prepare(kind: str, name: str, home: Path, dtype: str) -> Subject:
    """Build the model of a class and write its float folder.

    Args:
        kind: model type.
        name: of the class.
        home: an empty folder.
        dtype: of the float model: float32, or bfloat16 as transformers loads it.
    """
    model: Any = build(kind, name)
    if dtype != "float32":
        model.save_pretrained(home / "first")
        model = type(model).from_pretrained(home / "first", dtype=getattr(torch, dtype)).eval()
    inputs, silence = None, ""
    try:
        inputs = find_inputs(model, INPUTS.get(name, INPUTS.get(kind)))
    except NoInputsError as e:
        silence = str(e)
    subject = Subject(model, inputs, silence, None, None, "")
    if inputs is not None:
        subject.output = run(model, inputs)
    subject.folder, subject.own_road = _own_road(subject, home / "float")
    if subject.folder is not None:
        subject.own_half = _loaded(subject, torch.float16)
    return subject


def _own_road(subject: Subject, folder: Path) -> tuple[Path | None, str]:
    """Save and load with transformers alone, and say what differs afterwards."""
    model: Any = subject.model
    try:
        model.save_pretrained(folder)
    except Exception as e:  # noqa: BLE001 - whatever transformers raises says that this road is closed
        return None, f"save_pretrained: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
    try:
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True, dtype="auto")
    except Exception as e:  # noqa: BLE001
        return folder, f"from_pretrained: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
    lost = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if lost:
        return folder, f"{len(lost)} weights are lost, such as {lost[0]}"
    changed = differences(model.state_dict(), loaded.eval().state_dict())
    if not changed and subject.inputs is not None and subject.output is not None:
        changed = [f"output {line}" for line in differences(subject.output, run(loaded, subject.inputs))]
    return folder, changed[0] if changed else ""


def _loaded(subject: Subject, dtype: torch.dtype) -> nn.Module | None:
    cls: Any = type(subject.model)
    try:
        loaded: nn.Module = cls.from_pretrained(subject.folder, dtype=dtype)
    except Exception:  # noqa: BLE001 - `own_road` says so already
        return None
    return loaded.eval()
