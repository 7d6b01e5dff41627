"""What ``import palkernels`` brings along, and what it leaves for later, seen from a fresh process."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import palkernels


def run(probe, folder, *arguments, **options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", probe, *arguments], check=True, cwd=folder, env=environment, **options)


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


EACH = {name: f"from palkernels import {name}\nassert {name}" for name in palkernels.__all__}
STAR = f"from palkernels import *\nassert all(({', '.join(palkernels.__all__)},))"
# Forks a process for each program, from one that has torch already.
FORKS = """
import json, os, sys, torch, traceback
assert not [name for name in sys.modules if name.split(".")[0] == "palkernels"]
for name, program in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        try:
            exec(program, {"__name__": "__main__"})
        except BaseException:
            print(name, flush=True)
            traceback.print_exc()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_import_is_light_and_each_name_may_come_first(tmp_path):
    programs = json.dumps({"light": LIGHT, "star": STAR, "wrong": "assert 0", **EACH})
    done = run(FORKS, tmp_path, programs, capture_output=True, text=True)
    assert done.stdout.split() == ["wrong"], done.stderr


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
