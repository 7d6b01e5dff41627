"""What ``import palkernels`` brings along, and what it leaves for later, seen from a fresh process."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import palkernels


def run(probe, folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", probe, *arguments], check=True, cwd=folder, env=environment)


LIGHT = """
import sys, torch
import palkernels
assert "triton" not in sys.modules, "triton"
assert "transformers" not in sys.modules, "transformers"
assert not torch.cuda.is_initialized(), "CUDA"
x = torch.ones(1, 2, 3, 8)
palkernels.lal_attention(x, x, x, x, x)
assert "triton" not in sys.modules, "triton, after a call on a CPU"
assert "transformers" not in sys.modules, "transformers, after a call on a CPU"
"""


def test_import_is_light(tmp_path):
    run(LIGHT, tmp_path)


LAZY = """
import sys
import palkernels
assert "torch" not in sys.modules, "torch"
assert palkernels.__version__
assert set(palkernels.__all__) <= set(dir(palkernels))
assert "torch" not in sys.modules, "torch, after a look at the names"
assert palkernels.reference.lal_mask
assert "palkernels.api" not in sys.modules, "everything, for the definition alone"
assert palkernels.lal_attention is palkernels.lal_attention
try:
    palkernels.flash_attention
except AttributeError as error:
    assert str(error) == "module 'palkernels' has no attribute 'flash_attention'", error
else:
    raise AssertionError
"""


def test_names_are_imported_when_they_are_asked_for(tmp_path):
    run(LAZY, tmp_path)


# Forks a process for each name, from one that has torch already.
EACH_FIRST = """
import os, sys, torch
assert not [name for name in sys.modules if name.split(".")[0] == "palkernels"]
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(f"from palkernels import {name}\\nassert {name}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_each_name_comes_first(tmp_path):
    run(EACH_FIRST, tmp_path, *palkernels.__all__)


def test_star_import(tmp_path):
    names = ", ".join(palkernels.__all__)
    run(f"from palkernels import *\nassert all(({names},))", tmp_path)


COMPILED = """
import torch
import palkernels
x = torch.ones(1, 2, 3, 8)
def run(x):
    return palkernels.lal_attention(x, x, x, x, x, impl="sdpa")
assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))
"""


def test_a_compiled_function_may_be_the_first_to_ask(tmp_path):
    run(COMPILED, tmp_path)


def test_public_names():
    for name in palkernels.__all__:
        assert hasattr(palkernels, name), name
    assert {"lal_attention", "unsupported_reasons", "reference"} <= set(palkernels.__all__)


def test_the_installed_package_is_what_is_tested():
    """With PALKERNELS_TEST_WHEEL=1, as ``make test`` sets it, a source tree on the path is an error."""
    if os.environ.get("PALKERNELS_TEST_WHEEL") == "1":
        for name in ("palkernels", "palkernels.model", "palkernels.bench"):
            assert "site-packages" in Path(importlib.import_module(name).__file__).parts
    assert (Path(palkernels.__file__).parent / "py.typed").is_file()
