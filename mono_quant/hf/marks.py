"""What a converted model says to transformers: how it is saved and pushed, that it is not trained, how it becomes float again.

The classes need transformers as their base, so they are made when they are first asked for.
"""

import copy
import functools
import inspect
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mono_quant.errors import ConfigError, FrozenWeightError, Option, UnsupportedModelError
from mono_quant.hf import adapters
from mono_quant.hf.adapters import is_adapter
from mono_quant.hf.arithmetic import asked_for_dtype, tell_arithmetic_
from mono_quant.hf.floats import dequantize_
from mono_quant.hf.placing import parse_float
from mono_quant.hf.quantizer import unmark_
from mono_quant.hf.ties import holds_ties
from mono_quant.planning.walk import is_diffusers_model

# whoever makes a converted model comes by here, and PEFT may come later
adapters.register()

METHOD = "mono_quant"
_NAMES = ("ConvertedConfig", "Int8Converted", "HalfConverted")
# What `save_pretrained` of the libraries takes that makes no difference to a folder of ours.
_WITHOUT_EFFECT = {
    "is_main_process": (True,),
    "save_peft_format": (True, False),
    "save_original_format": (True,),
    "safe_serialization": (True, None),
    "create_model_card": (True, False),
    "variant": (None,),
    "use_flashpack": (False,),
    "distributed_checkpoint": (False,),
    "model_name": None,
    "train_datasets": None,
}
_SAVERS = ("save_pretrained", "push_to_hub", "save", "save_to_hub")
# The loop of sentence-transformers that asks nobody before it trains.
_TRAINERS = ("old_fit",)
_ASKED = (*_SAVERS, *_TRAINERS, "tie_weights")
_PUSH = ("private", "create_pr", "revision", "commit_message")


class Keeper(Protocol):
    """Knows all that a saved folder holds beside the weights of its model."""

    def save(self, model: nn.Module, folder: Path, max_shard_size: int | str | None) -> None:
        """Write a converted model into a folder, beside what is there."""

    def push(
        self, model: nn.Module, repo_id: str, token: str | bool | None, options: Mapping[str, Any]
    ) -> Any:
        """Push a converted model in one commit."""

    def around(self, name: str) -> "Keeper":
        """Return one that saves an encoder of sentence-transformers, of which the model is the part called `name`."""


def __getattr__(name: str) -> Any:
    # pickle needs to find them here
    if name in _NAMES:
        return classes()[_NAMES.index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def mark_(model: nn.Module, core: nn.Module, dtype: str, keeper: Keeper | None = None) -> None:
    """Tell transformers that a model is converted: Trainer asks before it trains, and saving writes what `save` writes.

    Args:
        model: of transformers, or a SentenceTransformer around one.
        core: the model of transformers.
        dtype: `int8` or `fp16`.
        keeper: saves the model; None where what belongs to it is not known.
    """
    config_class, int8_class, half_class = classes()
    for part in dict.fromkeys((core, model)):
        unmark_(part)
        quantizer = (int8_class if dtype == "int8" else half_class)(config_class(dtype), pre_quantized=True)
        quantizer.watch(part, keeper if part is model else None)
        part.hf_quantizer = quantizer
        for name in _ASKED:
            _ask_first_(type(part), name)


def _ask_first_(cls: type[Any], name: str) -> None:
    """Let a method of a library's class ask the quantizer of a converted model to do its work.

    On the class, where the library has it: held by the model, it would have to hold the model, too, and keep it alive.
    """
    owner = next((c for c in cls.mro() if name in vars(c)), None)
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "asks_first"):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        quantizer = vars(self).get("hf_quantizer")
        # transformers saves the adapters alone then, diffusers everything
        adapters_alone = getattr(self, "_hf_peft_config_loaded", False) and not is_diffusers_model(self)
        if isinstance(quantizer, classes()[1:]) and not adapters_alone:
            return getattr(quantizer, name)(*args, **options)
        return original(self, *args, **options)

    method.asks_first = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def mark_encoders_() -> None:
    """Let encoders that sentence-transformers builds around a converted transformer say what they are, too."""
    from sentence_transformers.base.model import BaseModel

    original: Any = BaseModel.__init__
    if hasattr(original, "marks"):
        return

    @functools.wraps(original)
    def built(self: Any, *args: Any, **options: Any) -> None:
        with asked_for_dtype():
            original(self, *args, **options)
        core = self.transformers_model
        inner = None if core is None else vars(core).get("hf_quantizer")
        if isinstance(inner, classes()[1:]) and inner.keeper is not None:
            name = next(path for path, module in self.named_modules() if module is core)
            mark_(self, core, inner.quantization_config.dtype, inner.keeper.around(name))

    built.marks = True  # type: ignore[attr-defined]
    BaseModel.__init__ = built
    tell_arithmetic_(BaseModel)


def _refuse_training(model: nn.Module, what: str) -> None:
    """Refuse to train a converted model, whose weights would stay as they are while the rest of it changes."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    free = sum(size for size, trains in sizes if trains)
    if free and not any(is_adapter(module) for module in model.modules()):
        raise FrozenWeightError(
            f"{type(model).__name__} holds {what} weights, which cannot be trained: only {free:,} of its "
            f"{sum(size for size, _ in sizes):,} parameters would be. Train LoRA adapters on it instead: "
            f"model.add_adapter(peft.LoraConfig(target_modules='all-linear')). What is to be trained whole has to stay in float: "
            f"convert with skip=. To evaluate alone, call model.requires_grad_(False) first"
        )


class Speaking:
    """What a quantizer says for its model, which it knows without keeping it alive, and is copied and pickled with."""

    what = ""
    keeper: Keeper | None
    quantization_config: Any
    _model: "weakref.ref[nn.Module]"

    def watch(self, model: nn.Module, keeper: Keeper | None) -> None:
        """Speak for a model."""
        self._model, self.keeper = weakref.ref(model), keeper

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            UnsupportedModelError: it is gone.
        """
        found = self._model()
        if found is None:
            raise UnsupportedModelError("the converted model is gone; keep it as long as its hf_quantizer")
        return found

    @property
    def is_trainable(self) -> bool:
        """Whether there is something to train beside the converted weights; Trainer asks this first.

        Raises:
            FrozenWeightError: there is not, and why.
        """
        _refuse_training(self.model, self.what)
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile it."""
        return True

    def is_serializable(self) -> bool:
        """Whether transformers may write the model by itself; it asks before it makes anything.

        Raises:
            UnsupportedModelError: it may not, and has no adapters that it could write alone.
        """
        if getattr(self.model, "_hf_peft_config_loaded", False):
            # then transformers saves the adapters alone
            return False
        raise UnsupportedModelError(
            f"{type(self.model).__name__} holds {self.what} weights, which this way of saving does not know how to write; call "
            f"model.save_pretrained(folder), or quantize(...).save(folder)"
        )

    def save_pretrained(
        self,
        save_directory: Any,
        *args: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> None:
        """Write the folder that `QuantizedModel.save` writes; files of others in it stay.

        Args:
            save_directory: the folder; made when missing.
            *args: `is_main_process`, of which only the main process writes.
            state_dict: of this model; only its own can be saved.
            push_to_hub: push it as well, to `repo_id` or the name of the folder.
            max_shard_size: of one weight file.
            token: to push with.
            **options: of the class's `save_pretrained`; those that would change what is written are refused.

        Raises:
            MonoQuantError: as `QuantizedModel.save`; nothing was written.
        """
        model = self.model
        pushing = {name: options.pop(name) for name in ("repo_id", *_PUSH) if name in options}
        if args:
            options["is_main_process"] = args[0]
        if options.pop("is_main_process", True) is False:
            return
        _refuse_options(options)
        _refuse_foreign_state(model, state_dict)
        keeper = self._keeper()
        keeper.save(model, Path(save_directory), max_shard_size)
        if push_to_hub:
            repo_id = pushing.pop("repo_id", Path(save_directory).name)
            keeper.push(model, repo_id, token, pushing)

    # sentence-transformers has both
    save = save_pretrained

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, **options: Any) -> Any:
        """Push what `save_pretrained` writes in one commit, as `mono_quant.push_to_hub` does.

        Raises:
            MonoQuantError: as `mono_quant.push_to_hub`.
        """
        pushing = {name: options.pop(name) for name in _PUSH if name in options}
        _refuse_options({n: v for n, v in options.items() if n not in ("tags", "commit_description") or v})
        return self._keeper().push(self.model, repo_id, token, pushing)

    save_to_hub = push_to_hub

    def old_fit(self, *args: Any, **options: Any) -> None:
        """Train an encoder in the way of sentence-transformers before 3, where there is something to train."""
        model: Any = self.model
        _refuse_training(model, self.what)
        inspect.unwrap(type(model).old_fit)(model, *args, **options)

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """Tie what is not converted, as the class does it; converted layers have been tied."""
        model: Any = self.model
        if not holds_ties(model):
            inspect.unwrap(type(model).tie_weights)(model, *args, **options)

    def _keeper(self) -> Keeper:
        if self.keeper is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} was not converted here, so there is no report or card to save with it. Copy the "
                f"folder that it came from, or quantize the original model in float"
            )
        return self.keeper

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Make the model float again; without `dtype`, in the one that its weights read as."""
        # not the one that its config names, which stays what it was when a model is cast
        dequantize_(model, parse_float(dtype))
        unmark_(model)
        # that is of the model which it was
        model.__dict__.pop("mono_quant_report", None)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        """Take off a model what says that it is converted."""
        unmark_(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = copy.copy(self)
        twin.quantization_config = copy.deepcopy(self.quantization_config, memo)
        twin.watch(memo.get(id(self.model), self.model), self.keeper)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = weakref.ref(state["_model"])
        for name in _ASKED:
            _ask_first_(type(state["_model"]), name)


@functools.cache
def classes() -> tuple[type[Any], type[Any], type[Any]]:
    """Make the classes that transformers wants of a quantized model.

    Returns:
        The config, and the quantizers of int8 and float16 models.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class ConvertedConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """The method and the dtype of a converted model."""

        def __init__(self, dtype: str = "int8", **_: Any) -> None:
            self.quant_method = METHOD
            self.dtype = dtype

    class Converted(Speaking, HfQuantizer):  # type: ignore[misc]
        """The quantizer of a converted model."""

    class Int8Converted(Converted):
        """Of a model with int8 layers."""

        what = "int8"

    class HalfConverted(Converted):
        """Of a float16 model."""

        what = "float16"

    for cls in (ConvertedConfig, Int8Converted, HalfConverted):
        cls.__module__, cls.__qualname__ = __name__, cls.__name__
    return ConvertedConfig, Int8Converted, HalfConverted


def _refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse arguments of other savers that would be without effect here though they ask for something."""
    for name, value in options.items():
        if name not in _WITHOUT_EFFECT:
            raise ConfigError("a converted model is saved without ", Option(name), "; leave it out")
        allowed = _WITHOUT_EFFECT[name]
        if allowed is not None and value not in allowed:
            raise ConfigError(
                "a converted model cannot be saved with ",
                Option(name, value),
                "; leave it out: weights are safetensors under their one name",
            )


def _refuse_foreign_state(model: nn.Module, given: Mapping[str, Tensor] | None) -> None:
    if given is None:
        return
    own = model.state_dict()
    strange = given.keys() ^ own.keys()
    strange |= {n for n in given.keys() & own.keys() if not torch.equal(given[n].cpu(), own[n].cpu())}
    if strange:
        raise ConfigError(
            f"state_dict= is not that of this {type(model).__name__}: {min(strange)} differs. A converted model is saved as it "
            f"is; leave it out"
        )
