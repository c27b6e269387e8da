"""Running a model to see how close it is, and where more bits would pay."""

from dataclasses import replace
from typing import Any

from torch import nn

from mono_quant.convert.crest import measure_layers
from mono_quant.convert.diffusion_probes import make_diffusion_probe
from mono_quant.convert.probes import Probe, ProbeError, given_probe, make_probe
from mono_quant.errors import ConfigError, Option
from mono_quant.io.phases import phase
from mono_quant.planning.suggestion import Suggestion, suggest_for
from mono_quant.sources.source import Subject


def probe_for(work: Subject, given: Any) -> tuple[Probe, nn.Module]:
    """Return inputs, and the module that takes them: the whole model for those that the user gave.

    Args:
        work: the model and what belongs to it.
        given: inputs that the user gave to measure with, or None.

    Raises:
        ProbeError: none are given, and what the model takes is not known.
    """
    if given is not None:
        return given_probe(given), work.model
    core = work.core
    probe = make_diffusion_probe(core) if work.kind == "diffusers" else make_probe(core, _processor(work))
    return probe, core


def suggestion(work: Subject, given: Any) -> Suggestion:
    """Measure for which int8 layers of a converted model more bits pay; it is left as it is.

    Args:
        work: the model and what belongs to it.
        given: inputs that the user gave to measure with, or None.

    Raises:
        ConfigError: it cannot be run.
    """
    try:
        probe, model = probe_for(work, given)
        with phase("Measuring the layers"):
            layers = measure_layers(model, probe)
    except ProbeError as e:
        raise ConfigError(
            f"the layers cannot be measured: {e}; pass other inputs as ", Option("probe")
        ) from e
    if not any(layer.work for layer in layers):
        raise ConfigError(
            "there is nothing to measure: no int8 layer saw a value. Convert the model to int8, or pass inputs that are not empty as ",
            Option("probe"),
        )
    prefix = "" if model is work.model or not work.core_name else f"{work.core_name}."
    return suggest_for([replace(layer, name=f"{prefix}{layer.name}") for layer in layers], probe.name)


def _processor(work: Subject) -> Any:
    if work.processor is None and work.kind == "sentence_transformer":
        return getattr(work.model, "tokenizer", None)
    return work.find_processor()
