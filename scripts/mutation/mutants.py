"""Small changes to a file, made by mutmut's operators: one operator, number, key, argument or keyword at a time.

mutmut's own runner is not used: it changes functions alone, so no limit at the top of a room and no decorated function, and
wraps each in another one, which a package that reads signatures would notice.
"""

import difflib
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import libcst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation import mutators

# Left out: `x = None` in place of any assignment or lambda, which hardly a test can miss.
OPERATORS = [
    (kind, operator)
    for kind, operator in mutators.mutation_operators
    if operator not in (mutators.operator_assignment, mutators.operator_lambda)
]
# Types are mypy's, and a decorator or an import that breaks stops every test at once.
SKIPPED = libcst.Annotation | libcst.Decorator | libcst.Import | libcst.ImportFrom


@dataclass(frozen=True)
class Site:
    """A node of a file with what one operator makes of it, and the statement around it."""

    node: libcst.CSTNode
    variants: tuple[libcst.CSTNode, ...]
    line: int
    statement: range


@dataclass(frozen=True)
class Mutant:
    """One changed file; `removed` and `added` are the lines of its diff without their indentation."""

    file: str
    line: int
    statement: range
    code: str
    removed: str
    added: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What names the mutant also after its lines have moved within the file."""
        return self.file, self.removed, self.added


class Collector(libcst.CSTVisitor):
    """Gather the sites of a module; a node without a position, as that of `is`, lies where its parent does."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self._lines = [1]
        self._statements = [range(1, 2)]

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, SKIPPED):
            return False
        position = self.get_metadata(PositionProvider, node, None)
        self._lines.append(position.start.line if position else self._lines[-1])
        if isinstance(node, libcst.BaseCompoundStatement | libcst.SimpleStatementLine):
            self._statements.append(self._own_lines(node))
        for kind, operator in OPERATORS:
            if isinstance(node, kind) and not _is_prose(node):
                variants = tuple(operator(node))
                if variants:
                    self.sites.append(Site(node, variants, self._lines[-1], self._statements[-1]))
        return True

    def on_leave(self, node: libcst.CSTNode) -> None:
        if isinstance(node, SKIPPED):
            return
        self._lines.pop()
        if isinstance(node, libcst.BaseCompoundStatement | libcst.SimpleStatementLine):
            self._statements.pop()

    def _own_lines(self, statement: libcst.BaseCompoundStatement | libcst.SimpleStatementLine) -> range:
        """Return the lines of a statement; of a compound one those before its body."""
        position = self.get_metadata(PositionProvider, statement)
        body = getattr(statement, "body", None)
        if isinstance(body, libcst.IndentedBlock):
            last = self.get_metadata(PositionProvider, body.body[0]).start.line - 1
        else:
            last = position.end.line
        return range(position.start.line, max(last, position.start.line) + 1)


def _is_prose(node: libcst.CSTNode) -> bool:
    """Tell whether a string is a sentence, whose spelling no test should hold; a key or a suffix has no blank."""
    return isinstance(node, libcst.SimpleString) and any(map(str.isspace, node.value))


def sample(root: Path, files: Iterable[Path], count: int, seed: int) -> list[Mutant]:
    """Draw `count` mutants of different sites, every site of the files equally likely.

    Args:
        root: what the names of files in the result are relative to.
        files: to draw from.
    """
    modules, sites = {}, []
    for path in sorted(files):
        module = libcst.parse_module(path.read_text(encoding="utf-8"))
        collector = Collector()
        # without a copy, since the nodes found are to be replaced in this very module
        MetadataWrapper(module, unsafe_skip_copy=True).visit(collector)
        file = path.relative_to(root).as_posix()
        modules[file] = module
        sites += [(file, site) for site in collector.sites]
    dice = random.Random(seed)
    dice.shuffle(sites)
    drawn = (_mutant(file, modules[file], site, dice) for file, site in sites)
    found = itertools.islice((mutant for mutant in drawn if mutant), count)
    return sorted(found, key=lambda mutant: (mutant.file, mutant.line, mutant.added))


def _mutant(file: str, module: libcst.Module, site: Site, dice: random.Random) -> Mutant | None:
    """Apply one of a site's variants; None where Python would not compile it."""
    changed = module.deep_replace(site.node, dice.choice(site.variants))
    assert isinstance(changed, libcst.Module)
    try:
        compile(changed.code, file, "exec")
    except SyntaxError:
        return None
    diff = list(difflib.unified_diff(module.code.splitlines(), changed.code.splitlines(), n=0, lineterm=""))[
        2:
    ]
    removed, added = ("\n".join(line[1:].strip() for line in diff if line.startswith(sign)) for sign in "-+")
    return Mutant(file, site.line, site.statement, changed.code, removed, added)
