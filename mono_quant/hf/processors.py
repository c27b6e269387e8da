"""Tokenizers and processors of a folder, and pipelines around a model."""

from pathlib import Path
from typing import Any

from torch import nn


def pipeline(task: str, model: nn.Module, processor: Any) -> Any:
    """Return a transformers pipeline around the model.

    Args:
        task: a transformers pipeline task, e.g. `text-classification`.
        model: a transformers model.
        processor: tokenizer, image processor, feature extractor or processor; None for tasks that need none.
    """
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin

    kinds = {
        "tokenizer": transformers.PreTrainedTokenizerBase,
        "image_processor": ImageProcessingMixin,
        "feature_extractor": transformers.FeatureExtractionMixin,
        "processor": transformers.ProcessorMixin,
    }
    parts = {name: processor for name, kind in kinds.items() if isinstance(processor, kind)}
    if "processor" in parts:
        for name in ("tokenizer", "image_processor", "feature_extractor"):
            if getattr(processor, name, None) is not None:
                parts[name] = getattr(processor, name)
    return transformers.pipeline(task, model=model, **parts)


def load_processor(folder: Path) -> Any:
    """Load the tokenizer or processor of a folder; None when it has none."""
    import transformers

    names = {p.name for p in folder.iterdir()}
    if not names & {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
                    "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"}:  # fmt: skip
        return None
    try:
        return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
        return None
