"""The command line: one function per verb; results on stdout, everything else on stderr."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mono_quant import kernels
from mono_quant.api import verbs
from mono_quant.api.delivery import Order, after_saving, deliver
from mono_quant.artifact import cards, inspection, publishing
from mono_quant.artifact.facts import read_card_facts
from mono_quant.errors import ConfigError, MissingFileError, MonoQuantError, Option
from mono_quant.io.disk.manifest import README
from mono_quant.io.hub.client import Hub, check_repo_id
from mono_quant.io.hub.push import PushResult
from mono_quant.io.hub.target import PushOptions
from mono_quant.planning.config import merge
from mono_quant.planning.report import QuantReport, human_bytes
from mono_quant.sources.source import Access
from mono_quant.version import __version__

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Quantize any Hugging Face or PyTorch model to INT8 or FP16, without calibration data.",
)

SourceArg = Annotated[
    str, typer.Argument(help="A local model folder, or a Hub id such as org/model.", metavar="SOURCE")
]
PlaceArg = Annotated[str, typer.Argument(help="A model folder, or a Hub id.", metavar="DIR")]
FolderArg = Annotated[Path, typer.Argument(help="A folder that mono_quant saved.", metavar="DIR")]
DtypeOption = Annotated[str, typer.Option(help="int8 or fp16.")]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Keep this layer in float: a name, part of a name, a glob, or re:EXPRESSION. Repeatable."
    ),
]
OriginOption = Annotated[
    str | None, typer.Option(help="hub or local: what SOURCE means where it could be both.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
EmbeddingsOption = Annotated[
    bool, typer.Option("--embeddings", help="Quantize embeddings too (int8, per row).")
]
KeptOption = Annotated[
    str, typer.Option("--kept", help="Store matrices that int8 leaves in float as: same, fp16 or bf16.")
]
DisableOption = Annotated[
    list[str] | None, typer.Option("--disable-default", help="Lift a default rule, e.g. head. Repeatable.")
]
MinParamsOption = Annotated[int, typer.Option(help="Keep layers with fewer weights than this.")]
NonfiniteOption = Annotated[
    str, typer.Option(help="error, or keep: leave a layer with NaN or infinity as it is.")
]
OverflowOption = Annotated[
    str, typer.Option(help="keep, or error: for a layer whose values do not fit float16.")
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code from the repository.")]
TokenOption = Annotated[
    str | None, typer.Option(help="Access token; better: the saved login or HF_TOKEN.", show_default=False)
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
# where the client library keeps what it downloaded
CACHED = re.compile(r"[^\s'\"]*/models--([^/\s]+)/snapshots/([0-9a-f]{12})[0-9a-f]{28}")
INTERRUPTED = 130
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
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


# `--version` alone is a whole command
app.info.invoke_without_command = True


@app.command()
def quantize(
    source: SourceArg,
    dtype: DtypeOption = "int8",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write. Default: <name>-<dtype>, unless pushing."),
    ] = None,
    push_to: Annotated[
        str | None, typer.Option("--push-to", help="Repository to publish the result in.")
    ] = None,
    private: PrivateOption = None,
    create_pr: PrOption = False,
    skip: SkipOption = None,
    min_params: MinParamsOption = 0,
    disable_default: DisableOption = None,
    embeddings: EmbeddingsOption = False,
    kept: KeptOption = "same",
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
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickle weights in a guarded process.")
    ] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a model, save it as a folder, and publish it where asked."""
    if push_to is None and (private is not None or create_pr):
        raise ConfigError(
            "--private, --public and --create-pr are about the repository that is pushed to; name it with --push-to, or "
            "leave them out"
        )
    given = _options(skip, min_params, disable_default, embeddings, kept) | {
        "on_nonfinite": on_nonfinite,
        "on_overflow": on_overflow,
        "fidelity": "auto" if fidelity else False,
    }
    request = merge({"dtype": dtype}, given)
    target = output if output or push_to else Path(f"{_name(source)}-{request.dtype}")
    push = PushOptions(private=private, overwrite=overwrite, create_pr=create_pr)
    access = Access(revision, Hub(token=token), trust_remote_code, allow_pickle, origin)
    with _told():
        done = deliver(source, access, Order(request, target, push_to, push))
    told: dict[str, Any] = {}
    if done.folder is not None:
        told |= {"folder": str(done.folder), "folder_bytes": _folder_bytes(done.folder)}
    if done.pushed is not None:
        told |= asdict(done.pushed)
    result = done.result
    if as_json:
        print(json.dumps({**result.report.to_dict(), **told}, indent=2, sort_keys=True))
        return
    print(result.report.table())
    if done.folder is not None:
        print(f"\nsaved   {told['folder']} ({human_bytes(told['folder_bytes'])} on disk)")
    if done.pushed is not None:
        print(_pushed_line(done.pushed))


@app.command()
def plan(
    source: SourceArg,
    dtype: DtypeOption = "int8",
    skip: SkipOption = None,
    min_params: MinParamsOption = 0,
    disable_default: DisableOption = None,
    embeddings: EmbeddingsOption = False,
    kept: KeptOption = "same",
    revision: RevisionOption = None,
    origin: OriginOption = None,
    token: TokenOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what quantize would do, from the config and the file headers alone."""
    report = verbs.plan(
        source,
        dtype,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        origin=origin,
        **_options(skip, min_params, disable_default, embeddings, kept),
    )
    _show(report, as_json)


@app.command()
def inspect(
    folder: PlaceArg,
    revision: RevisionOption = None,
    origin: OriginOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what is quantized in a model and what is not, from its files alone; of a Hub id only the headers are fetched."""
    seen = verbs.inspect(folder, revision=revision, token=token, origin=origin)
    print(json.dumps(seen.to_dict(), indent=2, sort_keys=True) if as_json else seen.table())


@app.command()
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
    with _told(), after_saving(None, repo):
        pushed = verbs.push_to_hub(
            folder, repo, private=private, create_pr=create_pr, overwrite=overwrite, token=token
        )
    print(json.dumps(asdict(pushed), indent=2) if as_json else _pushed_line(pushed))


@app.command()
def card(
    folder: FolderArg,
    repo: Annotated[str | None, typer.Option("--repo", help="Write it for this repository.")] = None,
    lint: Annotated[
        bool, typer.Option("--lint", help="Check the folder's README.md against its report instead.")
    ] = False,
) -> None:
    """Print the card of a saved folder, or check the one it has."""
    if repo is not None:
        check_repo_id(repo)
    if not lint:
        print(cards.render(read_card_facts(folder, repo)), end="")
        return
    publishing.checked_card(folder, repo)
    readme = folder / README
    if not readme.is_file():
        raise MissingFileError(
            f"{readme} is missing, so there is no card to check; leave out --lint to print one"
        )
    print(f"ok      {readme} says what the report says")


@app.command()
def verify(folder: FolderArg, as_json: JsonOption = False) -> None:
    """Check a saved folder: its files against the manifest, its report, and that it loads."""
    passed = inspection.verify(folder)
    if as_json:
        print(json.dumps({"folder": str(folder), "ok": True, "passed": passed}, indent=2))
    else:
        print("\n".join(f"ok      {line}" for line in passed))


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Show which int8 kernels run on this machine, and why others do not."""
    facts = {"mono_quant": __version__, **kernels.environment()}
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(f"{key:<16} {_plain(value)}" for key, value in facts.items()))


def main() -> None:
    """Run the command line; a known error is one line on stderr and exit code 2."""
    try:
        code = app(prog_name="mono-quant", standalone_mode=False)
    except (MonoQuantError, UsageError) as e:
        _leave(2, _one_line(e))
    except _Interrupted as e:
        _leave(INTERRUPTED, f"interrupted; {e}")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _leave(INTERRUPTED, "interrupted; nothing was written")
    raise SystemExit(code or 0)


def _leave(code: int, line: str) -> NoReturn:
    print(f"mono-quant: {line}", file=sys.stderr)
    raise SystemExit(code) from None


def _one_line(error: Exception) -> str:
    """Return the message of an error in the words of the command line."""
    if isinstance(error, UsageError):
        command = getattr(error.ctx, "command_path", "mono-quant")
        return f"{' '.join(error.format_message().split()).rstrip('.')}; see {command} --help"
    text = error.worded(_flag) if isinstance(error, MonoQuantError) else str(error)
    text = " ".join(text.split())
    return CACHED.sub(lambda m: f"{m[1].replace('--', '/')}@{m[2]}", text)


def _flag(option: Option) -> str:
    """Say an argument of the library as a flag; one that no command takes, as Python."""
    commands = [command.callback for command in app.registered_commands if command.callback]
    if all(option.name not in signature(command).parameters for command in commands):
        return str(option)
    flag = f"--{option.name.replace('_', '-')}"
    if option.value is False:
        return FLAGS.get(option.name, f"no {flag}")
    return flag if option.value in (None, True) else f"{flag} {option.value}"


@contextmanager
def _told() -> Iterator[None]:
    """Let an interrupted command say what is there already."""
    try:
        yield
    except KeyboardInterrupt as e:
        notes = getattr(e, "__notes__", [])
        if not notes:
            raise
        raise _Interrupted("; ".join(notes)) from None


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return "-" if value is None else str(value)


def _show(report: QuantReport, as_json: bool) -> None:
    print(report.to_json() if as_json else report.table(), end="" if as_json else "\n")


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


def _name(source: str) -> str:
    return Path(source).resolve().name if Path(source).exists() else source.rpartition("/")[2]


def _folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _pushed_line(pushed: PushResult) -> str:
    what = "already at" if pushed.already_there else "pull request" if pushed.pr_url else "pushed to"
    return f"{what} {pushed.pr_url or pushed.url} (commit {pushed.commit_sha[:12]})"
