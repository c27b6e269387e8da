"""sentence-transformers: the transformer that does the work, and what lies around it."""

import inspect
from typing import Any

from torch import nn

from mono_quant.errors import (
    UnsupportedModelError,
)
from mono_quant.hf.encoders import ENCODERS, ROUTERS, Encoder
from mono_quant.io.disk.output import OutputFolder

# Where transformers keeps which class is made for what, by the words of sentence-transformers.
_CLASSES = {
    "feature-extraction": "MODEL_MAPPING",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "fill-mask": "MODEL_FOR_MASKED_LM_MAPPING",
    "text-generation": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "any-to-any": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
}
# Of these it takes the encoder alone.
_ENCODER_ALONE = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop")


def is_encoder(model: nn.Module) -> bool:
    """True for a model of sentence-transformers, without importing it."""
    return any(
        c.__name__ in ENCODERS and c.__module__.startswith("sentence_transformers.")
        for c in type(model).mro()
    )


def transformer_in(model: Any) -> nn.Module:
    """Return the transformer that does the work of an encoder.

    Raises:
        UnsupportedModelError: its first module is something else.
    """
    name, first = type(model).__name__, model[0]
    core = getattr(first, "auto_model", None)
    if isinstance(core, nn.Module):
        return core
    kind = type(first).__name__
    part = "model[0].sub_modules['query'][0].auto_model" if kind in ROUTERS else "model[1]"
    raise UnsupportedModelError(
        f"{name}: its first module ({kind}) holds no transformer to quantize; convert the part that has the weights in its place, "
        f"such as {part} = dynamic_quantize({part})[0]"
    )


def core_class(config: Any, encoder: Encoder, named: type[Any]) -> type[Any]:
    """Return the class of transformers that an encoder has inside.

    Args:
        config: of the transformer.
        encoder: what its files say.
        named: the class that config.json names, which may have another head.
    """
    import transformers

    if encoder.task not in _CLASSES:
        return named
    known = getattr(transformers, _CLASSES[encoder.task], {})
    found = known.get(type(config), named)
    if encoder.task == "feature-extraction" and config.model_type in _ENCODER_ALONE:
        found = getattr(transformers, found.__name__.removesuffix("Model") + "EncoderModel")
    choices = found if isinstance(found, tuple) else (found,)
    return named if named in choices else choices[0]


def check_modules(model: nn.Module) -> None:
    """Refuse an encoder whose own saving would fail.

    Raises:
        UnsupportedModelError: a module in it cannot be saved.
    """
    for name, module in model.named_children():
        if not callable(getattr(module, "save", None)):
            raise UnsupportedModelError(
                f"module {name} of the {type(model).__name__} is a {type(module).__name__}, which has no save(path); give it one, as "
                f"sentence-transformers asks of its modules, or quantize model[0].auto_model by itself"
            )


def write_modules(folder: OutputFolder, model: Any, core: nn.Module) -> None:
    """Write everything of an encoder except the weights and config of its transformer.

    Args:
        folder: the output.
        model: the encoder.
        core: the transformer inside, which is written by `saving`.
    """
    # sentence-transformers saves its transformer by this method; that part is ours
    core.__dict__["save_pretrained"] = lambda *args, **kwargs: None
    # what the library does itself: a converted model would come back here
    write = inspect.unwrap(type(model).save)
    try:
        folder.adopt(lambda path: write(model, str(path), create_model_card=False))
    finally:
        del core.__dict__["save_pretrained"]


def settings_of(model: Any) -> dict[str, Any]:
    """Return what is said of an encoder beside its weights, so that a change to it can be seen."""
    told = {n: m.get_config_dict() for n, m in model.named_modules() if hasattr(m, "get_config_dict")}
    return {
        "config": {k: v for k, v in model._get_model_config().items() if k != "__version__"},  # noqa: SLF001
        "classes": [type(module) for module in model.children()],
        # SpladePooling takes note of it when it first runs
        "modules": {
            n: {k: v for k, v in own.items() if k != "embedding_dimension"} for n, own in told.items()
        },
        "length": model.max_seq_length,
        "processor": id(model[0].processor),
    }
