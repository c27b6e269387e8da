"""SentenceTransformer folders: what lies around the transformer that does the work."""

from pathlib import Path
from typing import Any

from torch import nn

from mono_quant.errors import MissingDependencyError
from mono_quant.hf.models import quiet
from mono_quant.hf.quantizer import METHOD, mark_int8_, register
from mono_quant.io.disk.output import OutputFolder


def write_modules(folder: OutputFolder, model: Any, core: nn.Module) -> None:
    """Write everything of a SentenceTransformer except the weights and config of its transformer.

    Args:
        folder: the output.
        model: the SentenceTransformer.
        core: the transformer inside, which is written by `saving`.
    """
    # sentence-transformers saves its transformer by this method; that part is ours
    core.__dict__["save_pretrained"] = lambda *args, **kwargs: None
    try:
        folder.adopt(lambda path: model.save_pretrained(str(path), create_model_card=False))
    finally:
        del core.__dict__["save_pretrained"]


def load_modules(folder: Path, codes: list[str], half: bool) -> nn.Module:
    """Load a SentenceTransformer whose transformer has int8 layers where the file has int8 codes.

    Args:
        folder: in the standard layout.
        codes: names of the int8 tensors in the file.
        half: the transformer is in float16.

    Raises:
        MissingDependencyError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as e:
        raise MissingDependencyError(
            f"{folder} is a SentenceTransformer; install it with: pip install sentence-transformers"
        ) from e
    register()
    config = {} if half else {"quantization_config": {"quant_method": METHOD, "codes": codes}}
    with quiet():
        model: Any = SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            config_kwargs=config,
            model_kwargs={"dtype": "auto"},
        )
    if not half:
        mark_int8_(model[0].auto_model)
    loaded: nn.Module = model.eval()
    return loaded
