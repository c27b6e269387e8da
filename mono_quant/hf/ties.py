"""Which weights of a converted transformers model share one parameter, and whether they are those that its class ties."""

from typing import Any

from torch import nn

from mono_quant.convert.stored import StoredModule
from mono_quant.errors import FrozenWeightError


def holds_ties(model: Any) -> bool:
    """Say whether the ties of a model are up to its converted layers: then they have been made, and nothing is left to do.

    transformers would tie a weight that is made when it is read, which is no parameter.

    Raises:
        FrozenWeightError: its config asks for a tie between a converted layer and one with a weight of its own.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    converted = [
        pair for pair in tied.items() if any(isinstance(_owner(model, n), StoredModule) for n in pair)
    ]
    for target, source in converted:
        if _held(model, target) is not _held(model, source):
            raise FrozenWeightError(
                f"{target} cannot be tied to {source}: one of them is converted, and they are two weights. Tie them in the "
                f"float model and convert that one (quantize), or set tie_word_embeddings=False in the config"
            )
    return bool(converted)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _held(model: nn.Module, name: str) -> nn.Parameter | None:
    return _owner(model, name)._parameters.get(name.rpartition(".")[2])  # noqa: SLF001
