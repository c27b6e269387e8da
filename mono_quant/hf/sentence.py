"""SentenceTransformer folders: what lies around the transformer that does the work."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant.errors import MissingDependencyError, UnsupportedModelError
from mono_quant.hf.models import quiet
from mono_quant.hf.quantizer import classes, loading_method, unmark_
from mono_quant.io.disk.output import OutputFolder
from mono_quant.io.tensors.checkpoint import open_checkpoint


def check_modules(model: nn.Module) -> None:
    """Refuse a SentenceTransformer whose own saving would fail.

    Raises:
        UnsupportedModelError: a module in it cannot be saved.
    """
    for name, module in model.named_children():
        if not callable(getattr(module, "save", None)):
            raise UnsupportedModelError(
                f"module {name} of the SentenceTransformer is a {type(module).__name__}, which has no save(path); give it one, as "
                f"sentence-transformers asks of its modules, or quantize model[0].auto_model by itself"
            )


def write_modules(folder: OutputFolder, model: Any, core: nn.Module) -> None:
    """Write everything of a SentenceTransformer except the weights and config of its transformer.

    Args:
        folder: the output.
        model: the SentenceTransformer.
        core: the transformer inside, which is written by `saving`.
    """
    # sentence-transformers saves its transformer by this method; that part is ours
    core.__dict__["save_pretrained"] = lambda *args, **kwargs: None
    # what the library does itself: a converted model would come back here
    write = inspect.unwrap(type(model).save_pretrained)
    try:
        folder.adopt(lambda path: write(model, str(path), create_model_card=False))
    finally:
        del core.__dict__["save_pretrained"]


def load_modules(
    folder: Path,
    headers: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    dtype: torch.dtype,
    built: torch.dtype,
    is_int8: bool,
) -> nn.Module:
    """Load a SentenceTransformer whose transformer has int8 layers where the file has int8 codes.

    Args:
        folder: in the standard or the plain layout.
        headers: dtype and shape of every tensor of the transformer in the file, by name.
        dtype: of most of its float tensors, and what int8 weights read as.
        built: dtype that its class is built in.
        is_int8: its config names a quantization method, which ours has to stand in for.

    Raises:
        MissingDependencyError: sentence-transformers is not installed.
    """
    config_class, _ = classes()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as e:
        raise MissingDependencyError(
            f"{folder} is a SentenceTransformer; install it with: pip install sentence-transformers"
        ) from e
    method = loading_method(headers, dtype)
    # transformers takes a method from the config where that names one, and from the caller elsewhere
    instead = {"quantization_config": method} if is_int8 else {}
    added = {} if is_int8 else {"quantization_config": config_class(**method)}
    with quiet():
        model: Any = SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            config_kwargs=instead,
            model_kwargs={"dtype": built, **added},
        )
    unmark_(model[0].auto_model)
    _fill_others_(model, folder)
    loaded: nn.Module = model.eval()
    return loaded


def _fill_others_(model: nn.Module, folder: Path) -> None:
    """Give the modules behind the transformer what their files hold: they were cast to the dtype of its first weight."""
    for index, module in list(model.named_children())[1:]:
        for file in folder.glob(f"{index}_*/model.safetensors"):
            with open_checkpoint(file.parent) as checkpoint:
                for name, tensor in module.state_dict(keep_vars=True).items():
                    if name in checkpoint:
                        tensor.data = checkpoint[name]
