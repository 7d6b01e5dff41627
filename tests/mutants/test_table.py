"""The table of mutants fits the source, and its committed outcome says that a test killed every one of them."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("mutants_run", Path(__file__).with_name("run.py"))
run = sys.modules["mutants_run"] = importlib.util.module_from_spec(specification)  # dataclasses look their module up
specification.loader.exec_module(run)


def test_every_old_text_is_in_the_source():
    run.check_table()


def test_a_text_that_is_not_there_names_the_mutant():
    mutant = run.Mutant("a fault", "masks", "kernels/keys.py", "no such text", "")
    with pytest.raises(ValueError, match="'a fault': the old text must occur 1 times"):
        mutant.apply("some text")


def test_the_check_names_every_mutant_that_does_not_fit_and_where_its_text_went():
    first, *_, last = run.MUTANTS
    gone = run.Mutant("gone", "masks", first.file, "no such text", "")
    elsewhere = run.Mutant("elsewhere", "masks", "kernels/no_such_file.py", first.old, "")
    with pytest.raises(ValueError, match="names must differ") as caught:
        run.check_table([first, gone, elsewhere, last, last])
    assert str(caught.value).splitlines() == [
        f"names must differ, got {last.name!r} more than once",
        "mutant 'gone': the old text must occur 1 times in kernels/keys.py, got 0; it occurs in no file",
        "mutant 'elsewhere': the old text must occur 1 times in kernels/no_such_file.py, got 0; "
        "it occurs in kernels/keys.py (1)",
    ]


def test_every_mutant_changes_code_that_compiles():
    for mutant in run.MUTANTS:
        source = (ROOT / "palkernels" / mutant.file).read_text()
        assert mutant.apply(source) != source
        compile(mutant.apply(source), mutant.name, "exec")


def test_every_kind_is_covered():
    count = Counter(mutant.kind for mutant in run.MUTANTS)
    assert set(count) == set(run.TABLE["kinds"])
    assert min(count.values()) >= 3
    assert sum(count.values()) >= 40


def test_every_selection_is_there():
    assert {mutant.tests for mutant in run.MUTANTS} == set(run.TABLE["selections"])
    for tests in run.TABLE["selections"].values():
        for test in tests:
            path, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / path).read_text()


def test_the_outcome_is_that_of_the_table():
    """As many mutants, in the same order, with the same texts; every one killed, by a test that is there."""
    rows = json.loads(run.OUTCOME.read_text())
    assert [(row["name"], row["hash"]) for row in rows] == [(mutant.name, mutant.hash) for mutant in run.MUTANTS]
    for row in rows:
        assert row["outcome"] == "killed"
        assert row["how"] in ("failed", "timeout") or row["how"].startswith("SIG")
        path, _, name = row["by"].partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()


@pytest.mark.parametrize("change", [{"old": "another"}, {"new": "another"}, {"file": "another"}, {"count": 2}])
def test_a_changed_fault_loses_its_outcome(change, monkeypatch):
    """Names and tests may change, and the outcome of every other mutant stays."""
    changed, *others = run.MUTANTS
    entry = vars(changed)
    monkeypatch.setattr(run, "MUTANTS", [run.Mutant(**entry | change), *others])
    assert set(run.read_outcome()) == {mutant.name for mutant in others}
    assert run.Mutant(**entry | {"name": "another", "first": "another"}).hash == changed.hash


def test_the_outcome_survives_being_read_and_written(monkeypatch, tmp_path):
    results, committed = run.read_outcome(), run.OUTCOME.read_text()
    monkeypatch.setattr(run, "OUTCOME", tmp_path / "outcome.json")
    assert run.read_outcome() == {}
    run.write_outcome(results)
    assert run.OUTCOME.read_text() == committed


REPORT = {"modules": 9, "test": "the last test", "failed": None, "errors": []}
FAILED = REPORT | {"failed": "a test", "errors": ["AssertionError"]}


@pytest.mark.parametrize(
    ("code", "report", "result"),
    [
        (0, REPORT, run.Result("survived")),
        (1, FAILED, run.Result("killed", "a test", "failed")),
        (-11, REPORT, run.Result("killed", "the last test", "SIGSEGV")),
        (None, REPORT, run.Result("killed", "the last test", "timeout")),
    ],
)
def test_how_a_run_ends(code, report, result):
    assert run.judge(code, report) == result


@pytest.mark.parametrize(
    ("code", "report", "message"),
    [
        (1, {}, "the copy was not imported"),
        (70, REPORT, "must exit with 0 or 1, got 70"),  # the plugin saw another copy
        (1, REPORT, "must exit with 0 or 1, got 1"),
        (1, FAILED | {"errors": ["CompilationError", "NameError"]}, "it does not run: CompilationError, NameError"),
    ],
)
def test_a_run_that_proves_nothing_is_an_error(code, report, message):
    with pytest.raises(RuntimeError, match=message):
        run.judge(code, report)


def test_the_package_as_it_is_must_pass():
    assert run.judge(0, REPORT, must_pass=True) == run.Result("survived")
    for code in (1, -11, None):
        with pytest.raises(RuntimeError, match="every test must pass, got exit code"):
            run.judge(code, FAILED, must_pass=True)
