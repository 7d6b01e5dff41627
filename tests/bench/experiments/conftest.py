"""What the tests of `palkernels figure1` share: the model's directory, and one whole run.

What may load triton is imported in the fixtures: this file can be loaded before tests/conftest.py chooses Triton's
interpreter, which must be chosen first.
"""

import json
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.figure1 import tiny_config

    folder = tmp_path_factory.mktemp("tiny")
    tiny_config().save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """One whole run, in a process of its own as a user has it: its JSON, its folder and what it printed."""
    from support.figure1 import small

    out = tmp_path_factory.mktemp("run") / "results"
    installed = Path(sysconfig.get_path("scripts")) / "palkernels"
    command = [str(installed), *map(str, small(tiny, out))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads((out / "figure1.json").read_text()), out, done.stdout
