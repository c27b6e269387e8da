"""The card of a saved model: a pure function of the report and the source's facts, and a check that a card is true.

Every string that comes from outside (names, licences, tags) is put on one line, cut, and set in a code span or written by the YAML
library, so that it cannot become structure. There is no template that could be filled with code.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from huggingface_hub import ModelCardData

from mono_quant.artifact.card_text import mark, split
from mono_quant.io.hub.metadata import parse_metadata
from mono_quant.io.text import one_line
from mono_quant.kernels import AUTO
from mono_quant.planning.report import KeptLayer, QuantReport, gap_text, human_bytes
from mono_quant.sources.origin import Origin

_FACTS = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
_OPEN = ("language", "datasets", "pipeline_tag")
# What the forward of a transformers model takes, as far as a card speaks of it.
INPUTS = ("input_ids", "pixel_values", "input_features", "input_values", "inputs", "past_values")
_MAX_KEPT_LINES = 60
# What was run, not what should work: the table in docs/interop.md, made by scripts/interop.
_VLLM = "vLLM 0.32 ran tiny models of 37 architectures from files of this layout, on a CPU; `docs/interop.md` of mono_quant lists them."
# What was run: tests/journeys/test_vanilla.py, and docs/interop.md for other versions.
_UNPACKED = (
    "It turns the weights back into float: they take the memory of the original then, and activations are not rounded, so outputs "
    "differ a little from mono_quant's."
)
# What a pipeline of diffusers calls a model of a class.
_SLOTS = (
    ("ControlNet", "controlnet"),
    ("UNet", "unet"),
    ("Autoencoder", "vae"),
    ("Transformer", "transformer"),
)
# Characters of a gated repository's terms.
_MAX_TERMS = 100_000


@dataclass(frozen=True)
class CardFacts:
    """Everything a card is made from.

    Attributes:
        report: of the conversion.
        origin: of the model.
        layout: `compressed-tensors`, `mono_quant` or `plain`.
        kind: `module`, `transformers`, `diffusers` or `sentence_transformer`.
        settings: options of the request that differ from the defaults.
        versions: of mono_quant, torch and transformers.
        has_tokenizer: the folder brings a tokenizer.
        inputs: what the model's forward takes, of `input_ids`, `pixel_values` and the like; empty when that is not known.
        generates: it has `generate`.
        encoder: class of sentence-transformers; empty for other models.
        repo_id: where the model is published; None for a folder.
    """

    report: QuantReport
    origin: Origin
    layout: str
    kind: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    has_tokenizer: bool = False
    repo_id: str | None = None
    inputs: tuple[str, ...] = ()
    generates: bool = False
    encoder: str = ""


def render(facts: CardFacts) -> str:
    """Return the card as Markdown with a YAML head."""
    return f"{_head(facts)}\n\n{render_lines(facts)}\n"


def render_lines(facts: CardFacts) -> str:
    """Return what a card says below its head, between the marks that say who wrote it."""
    sections = [
        _summary(facts),
        _section("What is quantized and what is not", _account_lines(facts.report)),
        _section("How close it is to the original", _fidelity_lines(facts.report)),
        _section("How to load it", _loading_lines(facts)),
        _section("How to make it again", _recipe_lines(facts)),
    ]
    return mark("\n\n".join(sections))


def lint(text: str, facts: CardFacts) -> list[str]:
    """Compare a card with the facts it should state.

    Args:
        text: the card, perhaps edited by hand.
        facts: of the model.

    Returns:
        One line per contradiction; empty when the card is true. Text that was added is not judged.
    """
    try:
        data = parse_metadata(split(text).yaml)
    except ValueError as e:
        return [f"its YAML head cannot be read: {one_line(str(e))}"]
    expected = metadata(facts).to_dict()
    problems = contradictions(data, expected, facts.origin.repo_id is None)
    lost = [tag for tag in expected["tags"] if tag not in as_list(data.get("tags"))]
    if lost:
        problems.append(f"the tags lack {', '.join(lost)}")
    own = {x.casefold() for x in (facts.repo_id,) if x}
    if str(data.get("base_model", "")).casefold() in own:
        problems.append(f"base_model is {data.get('base_model')!r}, the repository itself")
    shown = re.sub(r"(?<!`)<!--.*?(?:-->|\Z)", "", text, flags=re.DOTALL)
    lines = [line.rstrip() for line in shown.splitlines()]
    for part in (
        _summary(facts).split("\n")[1:],
        _account_lines(facts.report),
        _fidelity_lines(facts.report),
        _loading_lines(facts),
        _recipe_lines(facts),
    ):
        missing = [line for line in part if line.strip() and line.rstrip() not in lines]
        problems += [f"this line is missing or differs: {line[:160]}" for line in missing[:5]]
        if not missing:
            problems += _mixed(part, lines)
    return problems


def contradictions(data: Mapping[str, Any], expected: Mapping[str, Any], is_local: bool) -> list[str]:
    """Compare the metadata of a card with what it should be.

    Args:
        data: of the card.
        expected: from `metadata`; or from `stated`, for the part of `data` that it speaks of.
        is_local: the model has no repository, so nothing is known but what its folder says.

    Returns:
        One line per contradiction. What the source does not say, another may add: of a local model anything, else language, data
        and task, but no licence.
    """
    return [
        f"{key} is {repr(data.get(key))[:200]}, but the model's is {expected.get(key)!r}"
        for key in ("base_model", "base_model_relation", "library_name", *_FACTS)
        if as_list(data.get(key)) != as_list(expected.get(key))
        and not (expected.get(key) is None and (is_local or key in _OPEN))
    ]


def as_list(value: Any) -> list[Any]:
    """Return a value of a card's metadata as the list that it is short for."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _mixed(part: list[str], lines: list[str]) -> Iterator[str]:
    """Find the tables and code blocks that hold other lines than they should."""
    for block in re.findall(r"^```.*?^```|(?:^\|[^\n]*\n?)+", "\n".join(part), re.DOTALL | re.MULTILINE):
        wanted = block.rstrip().split("\n")
        size = len(wanted)
        found = [i for i in range(len(lines)) if lines[i : i + size] == wanted]
        if not found or (
            wanted[-1].startswith("|") and any("".join(lines[i + size : i + size + 1]) for i in found)
        ):
            yield f"there are other lines in the block that starts with: {wanted[0][:80]}"


def metadata(facts: CardFacts) -> ModelCardData:
    """Return the YAML head's fields."""
    return ModelCardData(
        library_name=library_of(facts),
        tags=["mono_quant", "int8", "w8a8"] if facts.report.dtype == "int8" else ["mono_quant", "fp16"],
        **stated(facts.origin, facts.repo_id),
    )


def stated(origin: Origin, repo_id: str | None) -> dict[str, Any]:
    """Return the fields that depend on nothing but where the model came from, and where the card is."""
    known = {k: _clean(getattr(origin.card, k)) for k in _FACTS}
    if origin.repo_id is not None and origin.repo_id.casefold() != (repo_id or "").casefold():
        known |= {"base_model": origin.repo_id, "base_model_relation": "quantized"}
    terms = {
        k: _clean(v, _clean_text)
        for k, v in sorted(origin.card.extra_gated.items())
        if re.fullmatch(r"extra_gated_[a-z_]+", k)
    }
    return {k: v for k, v in known.items() if v} | terms


def library_of(facts: CardFacts) -> str:
    """Return the library whose own loader really loads the model."""
    if facts.kind == "sentence_transformer":
        return "mono_quant" if facts.layout == "mono_quant" else "sentence-transformers"
    if facts.kind == "diffusers":
        return "diffusers" if facts.layout == "plain" else "mono_quant"
    fused = any(row.kind == "experts" and row.action == "quantized" for row in facts.report.rows)
    return (
        "transformers"
        if facts.kind == "transformers" and facts.layout != "mono_quant" and not fused
        else "mono_quant"
    )


def _clean(value: Any, text: Callable[[str], str] = one_line) -> Any:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, (list, tuple)):
        return [_clean(v, text) for v in value]
    if isinstance(value, Mapping):
        return {one_line(str(k)): _clean(v, text) for k, v in value.items()}
    return value


def _clean_text(text: str) -> str:
    """Keep the lines of a text, such as the terms of a gated repository, without control and direction characters."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)[:_MAX_TERMS]


def _head(facts: CardFacts) -> str:
    return f"---\n{metadata(facts).to_yaml()}\n---"


def _summary(facts: CardFacts) -> str:
    report, origin = facts.report, facts.origin
    title = facts.repo_id.rpartition("/")[2] if facts.repo_id else f"{one_line(origin.name)} {report.dtype}"
    what = "INT8 (W8A8, dynamic)" if report.dtype == "int8" else "FP16"
    if origin.repo_id:
        source = f"[{_code(origin.repo_id)}](https://huggingface.co/{origin.repo_id}) at commit {_code(str(origin.sha))}"
    else:
        files = ", ".join(f"{_code(n)} with sha256 {_code(h)}" for n, h in list(origin.files.items())[:4])
        more = f" and {len(origin.files) - 4} more files" if len(origin.files) > 4 else ""
        source = f"a local {_code(origin.name)}" + (f" ({files}{more})" if files else "")
    if report.dtype == "int8":
        how = "Weights are int8 with one scale per output channel; activations are quantized per token at run time. "
        how += "".join(f"Matrices that stay in float are stored in {name}. " for name in _narrowed(report))
    else:
        how = "Weights are float16. "
    return (
        f"# {_escape(title)}\n\n{what} version of {source}. {how}No calibration data was used.\n\n"
        f"- **{report.quantized_parameters:,} of {report.parameters:,} parameters ({report.coverage:.1%})** are {report.dtype}\n"
        f"- **{human_bytes(report.bytes_before)} -> {human_bytes(report.bytes_after)}** of weights "
        f"({report.bytes_before / max(report.bytes_after, 1):.2f}x smaller)"
    )


def _narrowed(report: QuantReport) -> list[str]:
    """Return the dtype, if any, that matrices which stay in float are stored in on request."""
    return sorted({row.dtype_after for row in report.rows if row.narrowed})


def _section(name: str, lines: Iterable[str]) -> str:
    return "\n".join([f"## {name}", "", *lines])


def _account_lines(report: QuantReport) -> list[str]:
    lines = ["| | kind or reason | tensors | parameters | before | after |", "|---|---|---:|---:|---:|---:|"]
    for action, label, rows in report.groups():
        what = report.dtype if action == "quantized" else action
        lines.append(
            f"| {what} | {_cell(label)} | {len(rows)} | {sum(r.numel for r in rows):,} | "
            f"{human_bytes(sum(r.bytes_before for r in rows))} | {human_bytes(sum(r.bytes_after for r in rows))} |"
        )
    return [*lines, *_scheme_lines(report), *_kept_lines(report.kept_layers)]


def _scheme_lines(report: QuantReport) -> Iterator[str]:
    schemes = report.schemes()
    if not schemes:
        return
    yield ""
    yield "How activations become codes while the model runs:"
    yield ""
    yield "| scheme | layers | why |"
    yield "|---|---:|---|"
    for scheme, why, layers in schemes:
        here = f"; {report.auto_activations} where it was made" if report.auto_activations else ""
        reason = f"what suits the processor that runs{here}" if scheme == AUTO else why
        yield f"| {_code(scheme)} | {len(layers)} | {_cell(reason)} |"


def _kept_lines(kept: Iterable[KeptLayer]) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[KeptLayer]] = defaultdict(list)
    for layer in kept:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.name)
        groups[pattern, layer.dtype, layer.reason].append(layer)
    if not groups:
        return
    yield ""
    yield "Layers that stay in float, each with its reason (`*` stands for layer numbers):"
    yield ""
    yield "| layer | count | dtype | weights | reason |"
    yield "|---|---:|---|---:|---|"
    for i, ((pattern, dtype, reason), layers) in enumerate(groups.items()):
        if i == _MAX_KEPT_LINES:
            rest = list(groups.values())[i:]
            yield f"| and {len(rest)} more kinds, listed in `mono_quant_report.json` | {sum(map(len, rest))} | | | |"
            return
        name = pattern if len(layers) > 1 else layers[0].name
        weights = sum(layer.weights for layer in layers)
        yield f"| {_cell(_code(name))} | {len(layers)} | {_cell(dtype)} | {weights:,} | {_cell(reason)} |"


def _fidelity_lines(report: QuantReport) -> list[str]:
    lines = []
    if report.fidelity is None:
        lines.append(f"The output was not measured: {_escape(report.fidelity_note)}.")
    else:
        lines += [
            f"{_code(str(report.fidelity['output']))} of this model against the original, on {_escape(str(report.fidelity['probe']))} "
            f"({report.fidelity['positions']:,} positions), measured when it was made (kernel: {_escape(report.kernel)}):",
            "",
            "| measure | value |",
            "|---|---:|",
            *(f"| {name} | {value} |" for name, value in report.measured()),
        ]
        if "given" not in str(report.fidelity["probe"]):
            lines += [
                "",
                "A synthetic probe says how close the arithmetic is; it is no benchmark of the model's abilities.",
            ]
        if report.fidelity.get("relative_error_by_scheme"):
            lines += [
                "",
                '"Everywhere" is the error with one scheme in all layers. Other engines compute with int8; int12 is the most accurate. A '
                "scheme that has a name gives the same bits on every processor.",
            ]
    if report.overflow_warning:
        lines += ["", f"Warning: {_escape(report.overflow_warning)}."]
    worst = report.worst
    if worst is not None and worst.sqnr_db is not None:
        lines += [
            "",
            f"Lowest weight SQNR: {worst.sqnr_db:.1f} dB ({_code(worst.name)}), {gap_text(worst)}.",
        ]
    flushed = sum(r.flushed for r in report.rows)
    if flushed:
        lines += [
            "",
            f"{flushed:,} non-zero weights ({flushed / report.parameters:.2%}) became zero in float16.",
        ]
    return lines + [line for note in report.notes for line in ("", f"Note: {_escape(note)}.")]


def _loading_lines(facts: CardFacts) -> list[str]:
    where = facts.repo_id or "path/to/this/folder"
    if facts.kind == "module":
        body = [
            "import mono_quant",
            "",
            f'model = mono_quant.load("{where}", model={_code_name(facts)}(...))  # your own class',
        ]
    elif facts.has_tokenizer and facts.kind == "transformers" and facts.inputs == ("input_ids",):
        body = [
            "import mono_quant",
            "from transformers import AutoTokenizer",
            "",
            f'model = mono_quant.load("{where}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
            'inputs = tokenizer("Hello, world.", return_tensors="pt")',
        ]
        if facts.generates:
            body += [
                "output = model.generate(**inputs, max_new_tokens=20)",
                "print(tokenizer.decode(output[0], skip_special_tokens=True))",
            ]
        else:
            body.append("output = model(**inputs)")
    elif facts.kind == "sentence_transformer":
        body = [
            "import mono_quant",
            "",
            f'model = mono_quant.load("{where}")',
            encoder_call(facts.encoder),
        ]
    elif facts.kind == "diffusers":
        slot = next((slot for word, slot in _SLOTS if word in facts.origin.name), "component")
        body = [
            "import mono_quant",
            "",
            f'model = mono_quant.load("{where}")  # for a pipeline: DiffusionPipeline.from_pretrained(..., {slot}=model)',
        ]
    else:
        takes = f"  # takes {' and '.join(facts.inputs)}" if facts.inputs else ""
        body = ["import mono_quant", "", f'model = mono_quant.load("{where}"){takes}']
    return ["```python", *body, "```", "", *_reader_lines(facts)]


def encoder_call(name: str) -> str:
    """Return a line that uses a model of sentence-transformers.

    Args:
        name: of its class.
    """
    if name == "CrossEncoder":
        return 'scores = model.predict([("a question", "a passage")])'
    if name == "MultiVectorEncoder":
        return 'embeddings = model.encode_query(["a question"])'
    return 'embedding = model.encode("Hello, world.")'


def _reader_lines(facts: CardFacts) -> Iterator[str]:
    if facts.layout == "plain":
        yield "This is a plain float16 checkpoint: every loader of the original reads it."
        kept = [r for r in facts.report.rows if r.action == "kept" and "float16 cannot hold" in r.reason]
        if kept:
            yield ""
            yield (
                f"{len(kept)} tensors do not fit float16 and are stored in their own dtype. `mono_quant.load` keeps them so; a loader "
                f"that casts everything to float16 turns their largest values into infinity."
            )
    elif facts.layout == "mono_quant":
        yield (
            "The int8 codes are stored in mono_quant's own layout, because the standard one cannot hold all of these layers. "
            "Other loaders refuse the file rather than read codes as weights."
        )
    elif library_of(facts) == "mono_quant":
        yield (
            "The files are a standard compressed-tensors checkpoint with one int8 matrix per expert. transformers by itself cannot load "
            "int8 experts and stops with an error about the automatic conversion of the weights; mono_quant keeps them in int8."
        )
    elif facts.kind == "sentence_transformer":
        yield (
            "The transformer in it is a standard compressed-tensors checkpoint: sentence-transformers loads it too (with "
            f"`compressed-tensors` installed). {_UNPACKED}"
        )
    else:
        yield (
            "The files are a standard compressed-tensors checkpoint: transformers loads them too (5.23 or newer, most models from 5.5 "
            f"on; with `compressed-tensors` installed). {_UNPACKED} {_vllm_line(facts.report)}"
        )
    if facts.layout == "compressed-tensors":
        for name in _narrowed(facts.report):
            yield ""
            yield (
                f"What is stored in {name} counts in the model's own dtype, which loaders cast it to; transformers before 5.21 does not "
                f"where it renames tensors, as for another class than the saved one, and may stop with an error about dtypes."
            )


def _vllm_line(report: QuantReport) -> str:
    tables = any(row.kind == "embedding" and row.action == "quantized" for row in report.rows)
    return (
        "vLLM cannot read int8 embeddings and stops with an error when it reads config.json."
        if tables
        else _VLLM
    )


def _recipe_lines(facts: CardFacts) -> list[str]:
    options = "".join(f", {k}={v!r}" for k, v in sorted(facts.settings.items()))
    options += "".join(f", {name}=True" for name in facts.origin.access)
    dtype = facts.report.dtype
    if facts.origin.repo_id:
        call = f'mono_quant.quantize_from_hub("{facts.origin.repo_id}", "{dtype}", revision="{facts.origin.sha}"{options})'
        lines = [f"result = {call}"]
    else:
        lines = [
            f"model = ...  # the original {_code_name(facts)}"
            + (", or its folder" if facts.origin.files else ""),
            f'result = mono_quant.quantize(model, "{dtype}"{options})',
        ]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    return [
        "```python",
        "import mono_quant",
        "",
        *lines,
        'result.save("output-folder")',
        "```",
        "",
        f"Made with {_escape(versions)}. `mono_quant_report.json` lists every tensor; `mono_quant.json` has the sha256 of "
        f"every file.",
    ]


def _code_name(facts: CardFacts) -> str:
    """Return the class of the model as a word of Python."""
    name = facts.origin.name
    return name if name.isidentifier() and not iskeyword(name) else "YourModel"


def _code(text: str) -> str:
    """Set foreign text in a code span that it cannot leave."""
    line = one_line(text)
    ticks = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _escape(text: str) -> str:
    """Escape what Markdown and HTML would take for structure."""
    escaped = re.sub(r"([\\`*_\[\]<>{}|#!~])", r"\\\1", one_line(text, 400))
    # bare addresses would become links
    return re.sub(r"(?i)(www)\.", r"\1\\.", escaped.replace("://", ":\\//"))


def _cell(text: str) -> str:
    """Make text safe inside a table cell: a bar ends a cell even inside a code span."""
    if text.startswith("`"):
        return text.replace("|", "\\|")
    return _escape(text)
