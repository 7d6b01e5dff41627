"""The committed outcome of ``make mutants`` is that of the mutants in the table, and every one was killed."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    module = sys.modules["mutants"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants"]


def test_every_old_text_is_in_the_source(mutants):
    mutants.check_table()


def test_a_text_that_is_not_there_names_the_mutant(mutants):
    mutant = mutants.Mutant("a fault", "kernels/keys.py", "no such text", "", kind="masks")
    with pytest.raises(ValueError, match="'a fault': the old text must occur 1 times"):
        mutant.apply("some text")


def test_every_mutant_changes_code_that_compiles(mutants):
    for mutant in mutants.MUTANTS:
        source = (ROOT / "palkernels" / mutant.file).read_text()
        assert mutant.apply(source) != source
        compile(mutant.apply(source), mutant.name, "exec")


def test_every_class_is_covered(mutants):
    count = Counter(mutant.kind for mutant in mutants.MUTANTS)
    assert set(count) == set(mutants.CLASSES)
    assert min(count.values()) >= 3
    assert sum(count.values()) >= 40


def test_the_outcome_is_that_of_the_table(mutants):
    """As many mutants, in the same order, with the same texts; every one killed, by a test that is there."""
    found = json.loads(mutants.OUTCOME.read_text())
    killed = {mutant.name: mutants.Result("a test", "failed") for mutant in mutants.MUTANTS}
    assert [row | {"by": "a test", "how": "failed"} for row in found] == mutants.outcome(killed)
    for row in found:
        assert row["how"] in ("failed", "timeout") or row["how"].startswith("SIG")
        path, _, name = row["by"].partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()
