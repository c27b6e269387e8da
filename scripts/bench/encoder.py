"""One sentence encoder in a process of its own: python encoder.py BACKEND JOB, then a line on stdin for every round.

Runs in environments that do not have mono_quant, so it imports nothing of ours but what a backend needs.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

Job = dict[str, Any]


def torch_fp32(job: Job) -> tuple[Any, str]:
    return SentenceTransformer(job["model"], device="cpu"), f"torch {torch.__version__}"


def ours(job: Job, fused: bool = False) -> tuple[Any, str]:
    import mono_quant  # noqa: PLC0415
    from mono_quant import kernels  # noqa: PLC0415

    folder = Path(job["scratch"]) / "int8"
    if not folder.exists():
        mono_quant.quantize(job["model"], fidelity=False).save(folder)
    model = mono_quant.load(folder)
    if fused:
        if "mono_quant" not in torch.compiler.list_backends():
            raise ModuleNotFoundError("this mono_quant has no graph backend", name="mono_quant.graphs")
        model.compile(backend="mono_quant")
    return model, f"{kernels.describe()}, {kernels.activation_scheme()}"


def ours_fused(job: Job) -> tuple[Any, str]:
    return ours(job, fused=True)


def openvino_static(job: Job) -> tuple[Any, str]:
    """Load the calibrated file that sentence-transformers documents; calibration is on texts like those that follow."""
    from sentence_transformers.backend import export_static_quantized_openvino_model  # noqa: PLC0415

    folder = _saved(job, "openvino")
    calibration = folder.with_name("calibration")
    calibration.mkdir(exist_ok=True)
    lines = [json.dumps({"sentence": text}) for text in job["calibration"]]
    (calibration / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    export_static_quantized_openvino_model(
        SentenceTransformer(str(folder), backend="openvino", device="cpu"),
        None,
        str(folder),
        dataset_name=str(calibration),
        dataset_config_name="default",
        dataset_split="train",
        column_name="sentence",
    )
    return _openvino(folder, file_name="openvino/openvino_model_qint8_quantized.xml")


def openvino_weights(job: Job) -> tuple[Any, str]:
    """Compress the weights alone; OpenVINO quantizes activations at run time where the processor has VNNI."""
    return _openvino(Path(job["model"]), export=True, load_in_8bit=True)


def onnx_dynamic(job: Job) -> tuple[Any, str]:
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model  # noqa: PLC0415

    folder = _saved(job, "onnx")
    source = SentenceTransformer(str(folder), backend="onnx", device="cpu")
    export_dynamic_quantized_onnx_model(source, "avx512_vnni", str(folder))
    found = {"file_name": "onnx/model_qint8_avx512_vnni.onnx", "provider": "CPUExecutionProvider"}
    model = SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs=found)
    return model, "qint8, avx512_vnni"


def _saved(job: Job, backend: str) -> Path:
    """Return a folder with the float model in a backend's format."""
    folder = Path(job["scratch"]) / backend
    SentenceTransformer(job["model"], backend=backend, device="cpu").save_pretrained(str(folder))
    return folder


def _openvino(folder: Path, **options: Any) -> tuple[Any, str]:
    model = SentenceTransformer(str(folder), backend="openvino", device="cpu", model_kwargs=options)
    names = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_NUM_THREADS")
    inner = next(part for part in model.modules() if hasattr(part, "auto_model")).auto_model
    inner.compile()
    compiled = inner.request if hasattr(inner.request, "get_property") else inner.request.get_compiled_model()
    values = [compiled.get_property(name) for name in names]
    values[0] = getattr(values[0], "get_type_name", lambda: values[0])()
    return model, "{}, groups of {}, {} threads".format(*values)


BACKENDS = {
    "fp32": torch_fp32,
    "ours": ours,
    "ours-fused": ours_fused,
    "openvino-static": openvino_static,
    "openvino-weights": openvino_weights,
    "onnx": onnx_dynamic,
}


def main(backend: str, file: Path) -> None:
    """Say that the model is there, encode once for every line, and write the embeddings at the end."""
    warnings.simplefilter("ignore")
    # what libraries print is not an answer
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job: Job = json.loads(file.read_text(encoding="utf-8"))
    # what takes as many threads as there are processors is held to as many as the others
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    torch.set_num_threads(job["threads"])

    def answer(row: Job) -> None:
        print(json.dumps(row), file=answers, flush=True)

    try:
        model, note = BACKENDS[backend](job)
    except ModuleNotFoundError as e:
        answer({"skipped": f"{e.name} is not installed"})
        return
    start = time.perf_counter()
    model.encode(job["texts"][:32], batch_size=32)
    answer({"note": note, "first_s": time.perf_counter() - start})
    for _ in sys.stdin:
        start = time.perf_counter()
        found = model.encode(job["texts"], batch_size=32, convert_to_tensor=True)
        answer({"seconds": time.perf_counter() - start})
    queries = model.encode(job["queries"], batch_size=32, convert_to_tensor=True)
    torch.save({"texts": found.double(), "queries": queries.double()}, file.with_name(f"{backend}.pt"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
