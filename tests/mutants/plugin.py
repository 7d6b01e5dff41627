"""Inside the pytest of one mutant: proves that the tests import the copy, and reports what ended the run.

Lies beside the copy of the package as ``mutant_plugin``; writes ``report.json`` there. Its exit code 70 is none of
pytest's own.
"""

import json
import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
report = {"modules": 0, "test": None, "failed": None, "errors": []}


def save():
    (FOLDER / "report.json").write_text(json.dumps(report))


def check_imports():
    loaded = [module for name, module in sys.modules.items() if name.split(".")[0] == "palkernels"]
    wrong = [
        module.__file__ for module in loaded if FOLDER / "palkernels" not in Path(module.__file__).resolve().parents
    ]
    if wrong or not loaded:
        pytest.exit(f"the tests must import {FOLDER / 'palkernels'}, got {wrong or 'nothing'}", returncode=70)
    report["modules"] = len(loaded)
    save()


def pytest_collection_modifyitems(items):
    first = os.environ["MUTANT_FIRST"]
    items.sort(key=lambda item: not first or first not in item.nodeid)


def pytest_collection_finish(session):
    check_imports()


def pytest_runtest_logstart(nodeid, location):
    report["test"] = nodeid
    save()


def pytest_runtest_logfinish(nodeid, location):
    check_imports()  # the kernels' modules too, which the first call loads


def pytest_exception_interact(node, call):
    if report["failed"] is not None:
        return
    error, names = call.excinfo.value, []
    while error is not None:
        names.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    report.update(failed=node.nodeid, errors=names)
    save()
