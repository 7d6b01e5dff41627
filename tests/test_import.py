"""What ``import palkernels`` brings along, seen from a fresh process."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import palkernels

PROBE = """
import sys, torch
import palkernels
assert "triton" not in sys.modules, "triton"
assert "transformers" not in sys.modules, "transformers"
assert not torch.cuda.is_initialized(), "CUDA"
x = torch.ones(1, 2, 3, 8)
palkernels.lal_attention(x, x, x, x, x)
assert "triton" not in sys.modules, "triton, after a call on a CPU"
"""


def test_import_is_light(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", PROBE], check=True, cwd=tmp_path, env=environment)


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
