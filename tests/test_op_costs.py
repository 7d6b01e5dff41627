"""FLOP formulas are there whatever is imported first."""

import os
import subprocess
import sys

import pytest

PROBE = """
import {first}
import importlib.util
assert importlib.util.find_spec("torch.utils.flop_counter")  # looking is not importing
import {second}
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry
assert torch.ops.palkernels.lal_forward in flop_registry
assert torch.ops.palkernels.lal_backward in flop_registry
assert torch.ops.aten.mm in flop_registry
"""


@pytest.mark.parametrize(
    "order", [("palkernels", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "palkernels")]
)
def test_registered_in_either_order(order, tmp_path):
    probe = PROBE.format(first=order[0], second=order[1])
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=tmp_path, env=dict(os.environ))
