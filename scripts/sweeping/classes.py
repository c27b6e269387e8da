"""Which classes there are: one for each architecture that transformers' auto classes know."""

from collections.abc import Iterator
from typing import Any

# The class that has most of an architecture comes first: the one that generates, then the one with a head.
_FIRST = (
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_MULTIMODAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_TEXT_TO_WAVEFORM",
    "MODEL_FOR_TEXT_TO_SPECTROGRAM",
    "MODEL_FOR_CTC",
    "MODEL_FOR_RNNT",
    "MODEL_FOR_TDT",
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "MODEL_FOR_IMAGE_CLASSIFICATION",
    "MODEL_FOR_VIDEO_CLASSIFICATION",
    "MODEL_FOR_AUDIO_CLASSIFICATION",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
    "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION",
    "MODEL_FOR_OBJECT_DETECTION",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION",
    "MODEL_FOR_SEMANTIC_SEGMENTATION",
    "MODEL_FOR_DEPTH_ESTIMATION",
    "MODEL_FOR_MASK_GENERATION",
    "MODEL_FOR_VISUAL_QUESTION_ANSWERING",
    "MODEL_FOR_TABLE_QUESTION_ANSWERING",
    "MODEL_FOR_DOCUMENT_QUESTION_ANSWERING",
)
_LAST = ("MODEL_FOR_PRETRAINING", "MODEL", "MODEL_FOR_TEXT_ENCODING", "MODEL_FOR_BACKBONE")


def architectures(every: bool = False) -> list[tuple[str, str]]:
    """Return (model type, class name), one class for each model type, or `every` class that it has."""
    found: dict[str, list[str]] = {}
    for table in _tables():
        for kind, names in table.items():
            known = found.setdefault(kind, [])
            known += [n for n in (names if isinstance(names, (tuple, list)) else [names]) if n not in known]
    pairs = [(kind, name) for kind, names in found.items() for name in (names if every else names[:1])]
    # several model types may share a class; its own has the shortest name
    unique = {name: (kind, name) for kind, name in sorted(pairs, key=lambda pair: -len(pair[0]))}
    return sorted(unique.values())


def _tables() -> Iterator[dict[str, Any]]:
    from transformers.models.auto import modeling_auto  # noqa: PLC0415

    names = [n for n in vars(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING_NAMES")]
    names.sort(key=lambda name: _rank(name.removesuffix("_MAPPING_NAMES")))
    for name in names:
        yield getattr(modeling_auto, name)


def _rank(task: str) -> int:
    if task in _FIRST:
        return _FIRST.index(task)
    return len(_FIRST) + (1 + _LAST.index(task) if task in _LAST else 0)
