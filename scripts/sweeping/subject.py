"""One class as the journeys need it: the model, inputs, a float folder, and what transformers itself makes of that folder."""

import copy
from collections.abc import Callable
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
        make: makes the float model, the same every time; a forward may write into the one that runs it.
        model: the one that is converted, which nobody ran.
        inputs: that it runs on; None when none were found, and `silence` says what it said.
        output: of the float model on them.
        folder: written by transformers' `save_pretrained`; None when it refused.
        own_road: what is lost between `save_pretrained` and `from_pretrained` without us; empty when nothing is.
        own_config: whether the config comes back as it was on that road (Levit's model changes it when it is built).
    """

    make: Callable[[], nn.Module]
    model: nn.Module
    inputs: Inputs | None = None
    silence: str = ""
    output: dict[str, Tensor] | None = None
    folder: Path | None = None
    own_road: str = ""
    own_config: bool = True

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def own_half(self) -> nn.Module | None:
        """Return the model that transformers itself loads in float16 from the float folder; None when it does not."""
        cls: Any = type(self.model)
        try:
            loaded: nn.Module = cls.from_pretrained(self.folder, dtype=torch.float16)
        except Exception:  # noqa: BLE001 - `own_road` says so already
            return None
        return loaded.eval()


def prepare(kind: str, name: str, home: Path, dtype: str) -> Subject:
    """Build the model of a class and write its float folder.

    Args:
        kind: model type.
        name: of the class.
        home: an empty folder.
        dtype: of the float model: float32, or bfloat16 as transformers loads it.
    """

    def make() -> nn.Module:
        model: Any = build(kind, name)
        if dtype == "float32":
            return model  # type: ignore[no-any-return]
        if not (home / "first").exists():
            model.save_pretrained(home / "first")
        return type(model).from_pretrained(home / "first", dtype=getattr(torch, dtype)).eval()  # type: ignore[no-any-return]

    subject = Subject(make, make())
    try:
        subject.inputs = find_inputs(make(), INPUTS.get(name, INPUTS.get(kind)))
    except NoInputsError as e:
        subject.silence = str(e)
    else:
        subject.output = run(make(), subject.inputs)
    subject.folder, subject.own_road = _own_road(subject, home / "float")
    subject.own_config = _own_config(subject.model)
    return subject


def _own_config(model: Any) -> bool:
    """Tell whether another model of the class leaves the config as it is."""
    before = model.config.to_dict()
    twin = copy.deepcopy(model.config)
    with torch.device("meta"):
        type(model)(twin)
    return bool(twin.to_dict() == before)


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
