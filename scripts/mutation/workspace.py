"""A copy of the tree to spoil, so that the checkout is never touched."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mutation.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mono_quant"
_LEFT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist"
)


class Workspace:
    """The copy: `tree` is its root, `scratch` is where processes put their own files."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        shutil.copytree(ROOT, self.tree, ignore=_LEFT, symlinks=True)

    def test_files(self) -> list[str]:
        return sorted(p.relative_to(self.tree).as_posix() for p in self.tree.glob("tests/**/test_*.py"))

    def package_files(self) -> list[Path]:
        return sorted(self.tree.glob(f"{PACKAGE}/**/*.py"))

    def files_of(self, path: str) -> list[Path]:
        """Return the Python files at a path inside the package."""
        place = self.tree / PACKAGE / path
        found = [place] if place.is_file() else sorted(place.glob("**/*.py"))
        if not found:
            raise FileNotFoundError(f"{PACKAGE}/{path} is no Python file and no folder with one")
        return found

    def fingerprint(self) -> str:
        """Of all that a test can depend on besides its own file."""
        tests = set(self.test_files())
        found = hashlib.sha256()
        for path in sorted(
            p for top in (PACKAGE, "tests") for p in self.tree.glob(f"{top}/**/*") if p.is_file()
        ):
            name = path.relative_to(self.tree).as_posix()
            if name not in tests and "__pycache__" not in name:
                found.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return found.hexdigest()[:16]

    def digest(self, file: str) -> str:
        return hashlib.sha256(file.encode() + b"\n" + (self.tree / file).read_bytes()).hexdigest()[:16]

    def forget_compiled(self) -> None:
        """Drop the compiled package: a change within a second that keeps a file's size would not be seen."""
        for folder in list(self.tree.glob(f"{PACKAGE}/**/__pycache__")):
            shutil.rmtree(folder)

    @contextmanager
    def spoilt(self, mutant: Mutant) -> Iterator[None]:
        path = self.tree / mutant.file
        before = path.read_bytes()
        path.write_text(mutant.code, encoding="utf-8")
        try:
            yield
        finally:
            path.write_bytes(before)
