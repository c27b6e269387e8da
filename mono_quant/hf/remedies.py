"""Which values of a config would make it describe the model that is to be saved."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from mono_quant.errors import UnsupportedModelError
from mono_quant.hf.configs import refuse_own_files
from mono_quant.hf.described import Differences, differences

# Tried first, because they usually are what was meant.
_LIKELY = ("num_labels", "vocab_size", "num_hidden_layers", "tie_word_embeddings")
# Each trial builds a skeleton.
_TRIALS = 30
_UNDO = (
    (r"weight_(orig|mask)$", "Make the pruning permanent: torch.nn.utils.prune.remove(layer, 'weight')"),
    (r"weight_[gv]$", "Compute the weight once: torch.nn.utils.remove_weight_norm(layer)"),
    (r"parametrizations\.", "Compute the weight once: parametrize.remove_parametrizations(layer, 'weight')"),
)

Settings = dict[str, Any]
ConfigJson = Callable[[Any], Mapping[str, Any]]


def check_described(
    model: Any, state: Mapping[str, Tensor], to_json: ConfigJson, where: str, otherwise: str = ""
) -> None:
    """Refuse a model that `load` would not build from its config, or would build as another one.

    Args:
        model: a converted transformers model, of a class that transformers has.
        state: what is to be written, by checkpoint name.
        to_json: makes the `config.json` that is to be written from a config.
        where: how the user reaches the config.
        otherwise: what can be done when no config says it, but to undo the change.

    Raises:
        UnsupportedModelError: names what differs, and the values of the config that would describe the model.
    """
    refuse_own_files(type(model), model.config, "it cannot be saved")
    found = differences(model, state, to_json(model.config))
    if not found.count and not found.ties:
        return
    settings = _settings(model.config, found, lambda config: differences(model, state, to_json(config)))
    name = type(model).__name__
    if settings:
        values = " and ".join(f"{where}.{path} = {value!r}" for path, value in settings.items())
        remedy = f"Set {values}, and save again"
    elif found.count:
        undo = (what for pattern, what in _UNDO if any(re.search(pattern, n) for n in state))
        remedy = next(undo, "Undo that") + (f", or {otherwise}" if otherwise else "")
    else:
        # ties that no config can tell of: transformers keeps what is in the file
        return
    raise UnsupportedModelError(
        f"{name} cannot be saved: built from its config, it would be another model "
        f"({'; '.join([*found.sentences, *found.ties][:4])}). {remedy}"
    )


def _settings(config: Any, found: Differences, trial: Callable[[Any], Differences]) -> Settings:
    """Return values that leave no difference, found one after the other; none when that cannot be reached."""
    settings: Settings = {}
    trials = 0
    candidates = _candidates(config, found)
    while found.count or found.ties:
        values = next(candidates, None)
        if values is None or trials == _TRIALS:
            return {}
        changed = copy.deepcopy(config)
        for path, value in values.items():
            _set(changed, path, value)
        rest, trials = trial(changed), trials + 1
        if (rest.count, len(rest.ties)) < (found.count, len(found.ties)):
            settings |= values
            config, found = changed, rest
            candidates = _candidates(config, found)
    return settings


def _candidates(config: Any, found: Differences) -> Iterator[Settings]:
    """Yield values that are not those of the config, the likely ones first."""
    for prefix, part in _parts(config):
        numbers = [name for name, value in vars(part).items() if type(value) is int]
        for name in dict.fromkeys([*_LIKELY, *numbers]):
            value = _value(part, name)
            if isinstance(value, bool):
                yield from [{prefix + name: not value}] if found.ties else []
                continue
            for new in sorted(found.sizes.get(value, ())) if isinstance(value, int) else ():
                yield {prefix + name: new}
                lists = {
                    prefix + n: v[:new]
                    for n, v in vars(part).items()
                    if isinstance(v, list) and len(v) == value
                }
                if lists:
                    # one entry per layer
                    yield {prefix + name: new, **lists}


def _value(config: Any, name: str) -> Any:
    """Return a value of a config; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        # transformers' word for a value that differs from layer to layer (Gemma 4)
        return None


def _parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a config and the configs in it, with the way there."""
    yield prefix, config
    for name, value in vars(config).items():
        if hasattr(value, "to_diff_dict"):
            yield from _parts(value, f"{prefix}{name}.")


def _set(config: Any, path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, last, value)
