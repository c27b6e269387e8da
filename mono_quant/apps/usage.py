"""How the command line is used: one function per verb with its options; the work itself is in `commands`."""

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mono_quant.apps import screen
from mono_quant.apps.interrupt import INTERRUPTED, leave, unwinding
from mono_quant.apps.late import Late
from mono_quant.errors import MonoQuantError, Option
from mono_quant.planning.rules import DEFAULTS
from mono_quant.version import __version__

if TYPE_CHECKING:
    from mono_quant.apps import commands
else:
    commands = Late("mono_quant.apps.commands")

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes would take as long as the rest of --help
    help="Quantize any Hugging Face or PyTorch model to INT8 or FP16, without calibration data.",
)
LIFTABLE = [rule for rule in DEFAULTS if rule != "tied"]


def _choice(values: Sequence[str], *names: str, **more: Any) -> Any:
    """Return an option that a shell completes with some values; the library says which it takes."""
    return typer.Option(*names, autocompletion=lambda: list(values), **more)


SourceArg = Annotated[
    str, typer.Argument(help="A local model folder, or a Hub id such as org/model.", metavar="SOURCE")
]
PlaceArg = Annotated[
    str, typer.Argument(help="A folder that mono_quant saved, or a Hub id.", metavar="MODEL")
]
AnyPlaceArg = Annotated[str, typer.Argument(help="A model folder, or a Hub id.", metavar="MODEL")]
FolderArg = Annotated[Path, typer.Argument(help="A folder that mono_quant saved.", metavar="FOLDER")]
DtypeOption = Annotated[str, _choice(("int8", "fp16"), help="int8 or fp16.", metavar="DTYPE")]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Keep this layer in float: a name, part of a name, a glob, or re:EXPRESSION. Repeatable.",
        metavar="PATTERN",
    ),
]
OriginOption = Annotated[
    str | None,
    _choice(
        ("hub", "local"),
        help="hub or local, to say what a name means. Default: a folder that is here wins over a Hub id.",
        metavar="PLACE",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id.", metavar="REVISION")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
EmbeddingsOption = Annotated[
    bool, typer.Option("--embeddings", help="Quantize embeddings too (int8, per row).")
]
KeptOption = Annotated[
    str,
    _choice(
        ("same", "fp16", "bf16"),
        "--kept",
        help="Store matrices that int8 leaves in float as: same, fp16 or bf16.",
        metavar="DTYPE",
    ),
]
ActivationsOption = Annotated[
    list[str] | None,
    _choice(
        ("auto", "int8", "int8-g128", "int8-g64", "int12", "measured"),
        "--activations",
        help="How inputs become codes: auto, int8, int8-g128, int8-g64, int12 or measured; or PATTERN=SCHEME for some layers, "
        "repeatable.",
        metavar="SCHEME",
    ),
]
DisableOption = Annotated[
    list[str] | None,
    _choice(
        LIFTABLE,
        "--disable-default",
        help=f"Lift a default rule: {', '.join(LIFTABLE)}. Repeatable.",
        metavar="RULE",
    ),
]
MinParamsOption = Annotated[
    int, typer.Option(help="Keep layers with fewer weights than this.", metavar="NUMBER")
]
NonfiniteOption = Annotated[
    str,
    _choice(
        ("error", "keep"),
        help="error, or keep: leave a layer with NaN or infinity as it is.",
        metavar="error|keep",
    ),
]
OverflowOption = Annotated[
    str,
    _choice(
        ("keep", "error"),
        help="keep, or error: for a layer whose values do not fit float16.",
        metavar="keep|error",
    ),
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code from the repository.")]
PickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickle weights in a guarded process.")
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        help="Access token; better: the saved login or HF_TOKEN.", metavar="TOKEN", show_default=False
    ),
]
PrivateOption = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Visibility of a new repository. Default: as the source."),
]
PrOption = Annotated[
    bool, typer.Option("--create-pr", help="Open a pull request instead of changing the branch.")
]

# How a command says no to what the library calls so.
FLAGS = {
    "private": "--public",
    "fidelity": "--no-fidelity",
}
# What is given once for each, and has the name of one.
SINGULAR = {"disable_defaults": "disable_default"}
UsageError: Any = typer.BadParameter.__bases__[0]  # of click, or of the copy in typer, by its version


class _Interrupted(Exception):
    """Ctrl-C at a moment when something is there already."""


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if version:
        screen.put(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


# `--version` alone is a whole command
app.info.invoke_without_command = True


@app.command(short_help="Convert a model, save it, publish it where asked.")
def quantize(
    source: SourceArg,
    dtype: DtypeOption = "int8",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder to write. Default: <name>-<dtype>, unless pushing.",
            metavar="FOLDER",
        ),
    ] = None,
    push_to: Annotated[
        str | None, typer.Option("--push-to", help="Repository to publish the result in.", metavar="REPO")
    ] = None,
    private: PrivateOption = None,
    create_pr: PrOption = False,
    skip: SkipOption = None,
    min_params: MinParamsOption = 0,
    disable_default: DisableOption = None,
    embeddings: EmbeddingsOption = False,
    kept: KeptOption = "same",
    activations: ActivationsOption = None,
    on_nonfinite: NonfiniteOption = "error",
    on_overflow: OverflowOption = "keep",
    revision: RevisionOption = None,
    origin: OriginOption = None,
    token: TokenOption = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace what is in the way: an older result; with --push-to, files of somebody else.",
        ),
    ] = False,
    fidelity: Annotated[bool, typer.Option(help="Measure the output against the original.")] = True,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Convert file by file, without the model in memory. Default: where its weights have more than half of the "
            "memory that is free.",
        ),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="Discard what an earlier --stream with other settings left unfinished."
        ),
    ] = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a model, save it as a folder, and publish it where asked."""
    options = _options(skip, min_params, disable_default, embeddings, kept) | {
        "on_nonfinite": on_nonfinite,
        "on_overflow": on_overflow,
        "fidelity": "auto" if fidelity else False,
    }
    with _work():
        access = commands.access(revision, origin, token, trust_remote_code, allow_pickle)
        options["activations"] = commands.schemes(activations or ())
        push = commands.push_options(push_to, private, overwrite, create_pr)
        answer = commands.quantize(source, access, dtype, options, output, push_to, push, stream, restart)
    _show(answer, as_json)


@app.command(short_help="Say what quantize would do, from headers alone.")
def plan(
    source: SourceArg,
    dtype: DtypeOption = "int8",
    skip: SkipOption = None,
    min_params: MinParamsOption = 0,
    disable_default: DisableOption = None,
    embeddings: EmbeddingsOption = False,
    kept: KeptOption = "same",
    activations: ActivationsOption = None,
    revision: RevisionOption = None,
    origin: OriginOption = None,
    token: TokenOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what quantize would do, from the config and the file headers alone."""
    options = _options(skip, min_params, disable_default, embeddings, kept)
    with _work():
        answer = commands.plan(
            source,
            dtype,
            activations=commands.schemes(activations or ()),
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            origin=origin,
            **options,
        )
    _show(answer, as_json)


@app.command(short_help="Measure which layers need activations with more bits.")
def suggest(
    source: SourceArg,
    skip: SkipOption = None,
    min_params: MinParamsOption = 0,
    disable_default: DisableOption = None,
    embeddings: EmbeddingsOption = False,
    revision: RevisionOption = None,
    origin: OriginOption = None,
    token: TokenOption = None,
    allow_pickle: PickleOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a model in int8 and measure for which layers a wider scheme of activations pays: what --activations takes."""
    options = _options(skip, min_params, disable_default, embeddings, "same")
    with _work():
        answer = commands.suggest(
            source,
            revision=revision,
            token=token,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            origin=origin,
            **options,
        )
    _show(answer, as_json)


@app.command(short_help="List what is quantized in a model, and what is not.")
def inspect(
    folder: AnyPlaceArg,
    revision: RevisionOption = None,
    origin: OriginOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what is quantized in a model and what is not, from its files alone; of a Hub id only the headers are fetched."""
    with _work():
        answer = commands.inspect(folder, commands.access(revision, origin, token))
    _show(answer, as_json)


@app.command(short_help="Publish a saved folder in one commit.")
def push(
    folder: FolderArg,
    repo: Annotated[
        str, typer.Argument(help="Repository to publish in, e.g. me/model-int8.", metavar="REPO")
    ],
    private: PrivateOption = None,
    create_pr: PrOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of somebody else.")] = False,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a saved folder in one commit, after loading it back."""
    with _work():
        answer = commands.push(
            folder, repo, private=private, create_pr=create_pr, overwrite=overwrite, token=token
        )
    _show(answer, as_json)


@app.command(short_help="Print the card of a saved model, or check it.")
def card(
    folder: PlaceArg,
    repo: Annotated[
        str | None,
        typer.Option("--repo", help="Write it for this repository. Default: where it is.", metavar="REPO"),
    ] = None,
    lint: Annotated[
        bool, typer.Option("--lint", help="Check the folder's README.md against its report instead.")
    ] = False,
    revision: RevisionOption = None,
    origin: OriginOption = None,
    token: TokenOption = None,
) -> None:
    """Print the card of a saved model, or check the one it has; of a Hub id only the small files are fetched."""
    with _work():
        answer = commands.card(folder, commands.access(revision, origin, token), repo, lint)
    _show(answer)


@app.command(short_help="Check the files and the report, and that it loads.")
def verify(
    folder: PlaceArg,
    revision: RevisionOption = None,
    origin: OriginOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a saved model: its files against the manifest, its report, and that it loads."""
    with _work():
        answer = commands.verify(folder, revision=revision, origin=origin, token=token)
    _show(answer, as_json)


@app.command(short_help="Show which int8 kernels run here, and whether threads starve.")
def env(as_json: JsonOption = False) -> None:
    """Show which int8 kernels run on this machine, why others do not, and what holds its threads up."""
    with _work():
        answer = commands.env()
    _show(answer, as_json)


def main() -> None:
    """Run the command line; a known error is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a name that a terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="mono-quant", standalone_mode=False)
    except (MonoQuantError, UsageError) as e:
        leave(2, _one_line(e))
    except _Interrupted as e:
        leave(INTERRUPTED, f"interrupted; {e}")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        leave(INTERRUPTED, "interrupted; nothing was written")
    raise SystemExit(code or 0)


@contextmanager
def _work() -> Iterator[None]:
    """Import what works, and show its phases; an interrupt says what is there already."""
    with screen.starting():
        seen = commands.seen
    unwinding()
    try:
        with seen(say):
            yield
    except KeyboardInterrupt as e:
        notes = getattr(e, "__notes__", [])
        if not notes:
            raise
        raise _Interrupted("; ".join(notes)) from None


def _show(answer: "commands.Answer", as_json: bool = False) -> None:
    if as_json and answer.json:
        screen.put(answer.json)
    elif answer.parts and not as_json:
        screen.show(answer.parts, say)


def say(option: Option) -> str:
    """Say an argument of the library as a flag; one that no command takes, as Python."""
    name = SINGULAR.get(option.name, option.name)
    verbs = [command.callback for command in app.registered_commands if command.callback]
    if all(name not in signature(verb).parameters for verb in verbs):
        return str(option)
    flag = f"--{name.replace('_', '-')}"
    if option.value is False:
        return FLAGS.get(option.name, f"no {flag}")
    return flag if option.value in (None, True) else f"{flag} {option.value}"


def _one_line(error: Exception) -> str:
    """Return the message of an error in the words of the command line."""
    if isinstance(error, UsageError):
        command = getattr(error.ctx, "command_path", "mono-quant")
        said = " ".join(error.format_message().split()).rstrip(".")
        return f"{said}{'' if said.endswith('?') else ';'} see {command} --help"
    said = error.worded(say) if isinstance(error, MonoQuantError) else str(error)
    return screen.tidy("; ".join([said, *getattr(error, "__notes__", ())]))


def _options(
    skip: list[str] | None, min_params: int, disable_default: list[str] | None, embeddings: bool, kept: str
) -> dict[str, Any]:
    return {
        "skip": skip or (),
        "min_params": min_params,
        "disable_defaults": disable_default or (),
        "embeddings": embeddings,
        "kept": kept,
    }
