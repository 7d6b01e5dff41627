"""Run the seeded faults of table.toml, each against the tests that must catch it; outcome.json says which test did.

python tests/mutants/run.py            every mutant; exit with 1 if one survives
python tests/mutants/run.py NAME ...   these; the others keep their outcome if their entry in the table is unchanged
python tests/mutants/run.py --check    only look whether the table fits the source

A mutant is a copy of the package with one text replaced. It is killed by a failing test, a signal or the timeout. One
that does not even run proves nothing, since any test would kill it: that is an error. The package as it is must pass.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "palkernels"
OUTCOME = HERE / "outcome.json"
AT_ONCE = 2
TIMEOUT = 480  # seconds, per mutant; all tests together take half of it while another mutant runs
DOES_NOT_RUN = {"AttributeError", "CompilationError", "ImportError", "NameError", "SyntaxError", "TypeError"}


@dataclass(frozen=True)
class Mutant:
    """One entry of table.toml, which says what its fields mean."""

    name: str
    kind: str
    file: str
    old: str
    new: str
    count: int = 1
    tests: str = "attention"
    first: str = ""

    @property
    def hash(self) -> str:
        """Changes with the fault, not with its name, its tests or the lines around it."""
        fault = json.dumps([self.kind, self.file, self.old, self.new, self.count])
        return hashlib.sha256(fault.encode()).hexdigest()[:16]

    def apply(self, source: str) -> str:
        if (count := source.count(self.old)) != self.count:
            text = f"the old text must occur {self.count} times in {self.file}, got {count}"
            raise ValueError(f"mutant {self.name!r}: {text}")
        return source.replace(self.old, self.new)


TABLE = tomllib.loads((HERE / "table.toml").read_text())
MUTANTS = [Mutant(**entry) for entry in TABLE["mutants"]]


@dataclass(frozen=True)
class Result:
    """How a mutant's run ended, and what ended it."""

    outcome: str  # "killed" or "survived"
    by: str | None = None  # the test
    how: str | None = None  # "failed", a signal's name, or "timeout"


def check_table(mutants: list[Mutant] = MUTANTS) -> None:
    """Raise with every mutant whose text does not occur in its file as it must, and the files that have the text."""
    names = [mutant.name for mutant in mutants]
    problems = [f"names must differ, got {name!r} more than once" for name in {*names} if names.count(name) > 1]
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    for mutant in mutants:
        try:
            mutant.apply(sources.get(mutant.file, ""))
        except ValueError as error:
            files = [f"{file} ({n})" for file, source in sources.items() if (n := source.count(mutant.old))]
            problems.append(f"{error}; it occurs in {', '.join(files) or 'no file'}")
    if problems:
        raise ValueError("\n".join(problems))


def run(mutant: Mutant | None, package: Path) -> Result:
    """Run the tests of a mutant on a copy of the package; without a mutant every selection, which must pass."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve()
        shutil.copytree(package, copy / "palkernels")
        shutil.copy(HERE / "plugin.py", copy / "mutant_plugin.py")
        if mutant is not None:
            target = copy / "palkernels" / mutant.file
            target.write_text(mutant.apply(target.read_text()))
        environment = {
            "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            "MUTANT_FIRST": mutant.first if mutant else "",
        }  # fmt: skip
        selections = [mutant.tests] if mutant else TABLE["selections"]
        tests = dict.fromkeys(test for name in selections for test in TABLE["selections"][name])
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "mutant_plugin", *tests],
            cwd=HERE.parents[1], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,  # so that a timeout ends the tests' own children too
        )  # fmt: skip
        code: int | None = None
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        report_file = copy / "report.json"
        report = json.loads(report_file.read_text()) if report_file.is_file() else {}
    try:
        return judge(code, report, must_pass=mutant is None)
    except RuntimeError as error:
        raise RuntimeError(f"{mutant.name if mutant else 'the package as it is'}: {error}\n{output[-4000:]}") from None


def judge(code: int | None, report: dict, must_pass: bool = False) -> Result:
    """The result by pytest's exit code (None: timeout) and the plugin's report; raise where they prove nothing."""
    if not report.get("modules"):
        raise RuntimeError("the copy was not imported")
    if code == 0:
        return Result("survived")
    if must_pass:
        raise RuntimeError(f"every test must pass, got exit code {code}")
    if code is None or code < 0:
        return Result("killed", report["test"], "timeout" if code is None else signal.Signals(-code).name)
    if code != 1 or report["failed"] is None:
        raise RuntimeError(f"pytest must exit with 0 or 1, got {code}")
    if DOES_NOT_RUN.intersection(report["errors"]):
        raise RuntimeError(f"it does not run: {', '.join(report['errors'])}")
    return Result("killed", report["failed"], "failed")


def read_outcome() -> dict[str, Result]:
    """The committed results of mutants whose entry in the table is unchanged."""
    rows = {row.pop("name"): row for row in (json.loads(OUTCOME.read_text()) if OUTCOME.is_file() else [])}
    unchanged = [m.name for m in MUTANTS if m.name in rows and rows[m.name].pop("hash") == m.hash]
    return {name: Result(**rows[name]) for name in unchanged}


def write_outcome(results: dict[str, Result]) -> None:
    """Write the results in the table's order and without times: runs that end alike give the same file."""
    rows = [{"name": m.name, "hash": m.hash, **asdict(results[m.name])} for m in MUTANTS if m.name in results]
    part = OUTCOME.with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(OUTCOME)


def run_all(mutants: list[Mutant], results: dict[str, Result]) -> bool:
    """Run the mutants, write every result as it comes, and return whether each one was killed."""
    killed = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        package = Path(folder) / "palkernels"  # as it is now: a long run must not see later edits
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        futures = {pool.submit(run, mutant, package): mutant for mutant in (None, *mutants)}
        try:
            for future in as_completed(futures):
                mutant = futures[future]
                try:
                    result = future.result()
                except RuntimeError as error:
                    if mutant is None:  # then no result means anything
                        raise
                    print(f"error: {error}", flush=True)
                    continue
                if mutant is not None:
                    results[mutant.name] = result
                    write_outcome(results)
                    killed += result.outcome == "killed"
                    print(f"{result.outcome}: {mutant.name}", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"{killed} of {len(mutants)} mutants killed")
    return killed == len(mutants)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the seeded faults of table.toml against the tests.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="run these alone")
    parser.add_argument("--check", action="store_true", help="only look whether the table fits the source")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise ValueError(f"mutants must be in the table, got {', '.join(sorted(unknown))}")
    check_table()
    chosen = [mutant for mutant in MUTANTS if not arguments.names or mutant.name in arguments.names]
    if not arguments.check and not run_all(chosen, read_outcome() if arguments.names else {}):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
