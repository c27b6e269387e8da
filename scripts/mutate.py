"""Ask whether the tests can fail: change one thing of the package at random, and see whether a test notices it.

    scripts/mutate                       200 mutants of planning/, convert/, hf/, artifact/ and io/
    scripts/mutate --seed 2 --count 50   others, and fewer
    scripts/mutate --again mutants.json  only those that were not noticed, after mending tests; --seconds inf
                                         asks every test that runs the changed line

Everything runs in a copy of the tree. Which test runs which line is measured first and kept in .mutation_cache; that takes as long
as the whole suite, twice over. The exit status is 0 when 90 % are noticed and every survivor is explained in mutation/explained.toml.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from mutation import mutants, processes, recording, results, verdicts
from mutation.workspace import ROOT, Workspace

FOLDERS = ("planning", "convert", "hf", "artifact", "io")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--count", type=int, default=200)
    top.add_argument("--seed", type=int, default=1)
    top.add_argument(
        "--seconds",
        type=float,
        default=20,
        help="of tests for each mutant, after which no file of tests is begun",
    )
    top.add_argument("--json", type=Path, default=Path("mutants.json"), help="write the result here")
    top.add_argument("--again", type=Path, help="a result whose noticed mutants are not tried again")
    top.add_argument(
        "paths",
        nargs="*",
        default=FOLDERS,
        help="folders or files of the package (not given: the five folders)",
    )
    return top


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    options = parser().parse_args()
    explained = results.read_explained()
    noticed = results.read_noticed(options.again) if options.again else {}
    with tempfile.TemporaryDirectory(prefix="mono-quant-mutation-") as folder:
        workspace = Workspace(Path(folder).resolve())
        processes.prepare(workspace)
        processes.warm(processes.FIRST)
        files = [file for path in options.paths for file in workspace.files_of(path)]
        drawn = mutants.sample(workspace.tree, files, options.count, options.seed)
        record = recording.record(workspace, ROOT / ".mutation_cache", say)
        if record.failed:
            say(f"left out, since they fail without a change: {', '.join(record.failed)}")
        processes.warm(sorted(record.modules))
        workspace.forget_compiled()
        found = []
        for number, mutant in enumerate(drawn, 1):
            verdict = noticed.get(mutant.key)
            if verdict is None:
                tests = verdicts.choose(mutant, record, workspace, options.seconds)
                verdict = verdicts.judge(mutant, tests, record, workspace)
                say(f"{number:4} of {len(drawn)} {verdict.kind:9} {verdict.seconds:6.1f} s  {mutant.place}")
            found.append(results.Result(mutant, verdict, explained.get(mutant.key, "")))
            results.write(options.json, found)
        killers = sorted({result.verdict.by for result in found} & record.seconds.keys())
        unreliable = verdicts.unreliable(killers, record, workspace)
    say(results.table(found))
    return results.conclude(found, unreliable, say)


if __name__ == "__main__":
    sys.exit(main())
