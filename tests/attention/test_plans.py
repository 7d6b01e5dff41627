"""Launches that are repeated without checks and Triton's binder: they are right, cheap, and given up in time.

On the stand-in for a GPU, which changes torch: in four processes, each of which runs a file of scenarios.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import support

from palkernels.bench.instruments import stand_in

FOLDER = Path(support.__file__).parent
FILES = ("repeated_launches", "plan_guards", "plan_limits", "gluon_launches")


def scenarios(file):
    functions = [x for x in ast.parse((FOLDER / f"{file}.py").read_text()).body if isinstance(x, ast.FunctionDef)]
    return [x.name for x in functions if any(ast.unparse(y) == "scenario" for y in x.decorator_list)]


@pytest.fixture(scope="module")
def outcomes():
    found = {}
    for file in FILES:
        environment = stand_in.child_environment() | {"PYTHONPATH": str(FOLDER.parent)}
        command = [sys.executable, "-W", "ignore", "-m", f"support.{file}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", [name for file in FILES for name in scenarios(file)])
def test_repeated_launches(outcomes, name):
    assert outcomes[name] == "holds", outcomes[name]
