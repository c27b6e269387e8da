"""What people call that does not go through the forward of the outermost model, as another program runs it.

As a program (`roads.py BASE`), it loads the folders below BASE as transformers and sentence-transformers do that never heard of
mono_quant, and writes what comes out, or what was raised, to `BASE/theirs.pt`.
"""

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers as hf
from torch import Tensor

SENTENCES = ["The weather is lovely today.", "He drove to the stadium, and it was late."]


def _random(*shape: int, high: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(3, high, shape, generator=generator)
        if high
        else torch.randn(shape, generator=generator)
    )


IDS, PIXELS, SOUND = _random(2, 7, high=190), _random(2, 3, 32, 32), _random(2, 20, 80)


def first_logits(model: Any, **inputs: Any) -> Tensor:
    """Return the logits of the first token that greedy search writes."""
    out = model.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.logits[0]


def _features(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.pooler_output


ROADS: Mapping[str, Callable[[Any], Tensor]] = {
    "t5": lambda m: first_logits(m, input_ids=IDS, decoder_start_token_id=0),
    "bart": lambda m: first_logits(m, input_ids=IDS),
    "whisper": lambda m: first_logits(m, input_features=SOUND),
    "trocr": lambda m: first_logits(m, pixel_values=PIXELS),
    "llama": lambda m: m.model(IDS).last_hidden_state,
    "clip": lambda m: torch.cat([
        _features(m.get_text_features(IDS)),
        _features(m.get_image_features(PIXELS)),
    ]),
    "siglip": lambda m: torch.cat([
        _features(m.get_text_features(IDS)),
        _features(m.get_image_features(PIXELS)),
    ]),
    "detr": lambda m: m(PIXELS).logits,
    "sentence": lambda m: m.encode(SENTENCES, convert_to_tensor=True),
    "pipeline": lambda m: m(SENTENCES[0], return_tensors=True)[0],
}


def vanilla(name: str, folder: Path) -> Any:
    """Load a folder as its own library does."""
    if name == "sentence":
        return sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    if name == "pipeline":
        return hf.pipeline("feature-extraction", str(folder), device="cpu")
    cls = getattr(hf, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, found = cls.from_pretrained(folder, output_loading_info=True)
    if found["missing_keys"] or found["unexpected_keys"]:
        raise ValueError(f"{found}")
    return model.eval()


def main() -> None:
    base = Path(sys.argv[1])
    theirs: dict[str, Tensor | str] = {}
    for folder in sorted(base.iterdir()):
        name = folder.name.partition("-")[0]
        try:
            model = vanilla(name, folder)
            with torch.no_grad():
                theirs[folder.name] = ROADS[name](model).clone()
        except Exception as e:  # noqa: BLE001 - what it raises is what is asked
            theirs[folder.name] = f"{type(e).__name__}: {e}"
    assert not any(module.startswith("mono_quant") for module in sys.modules)
    torch.save(theirs, base / "theirs.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
