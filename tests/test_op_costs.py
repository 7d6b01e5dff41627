"""FLOP formulas are there whatever is imported first; what operators need inside is known by their arguments' names."""

import os
import subprocess
import sys

import pytest
import torch

from palkernels.op_costs import plain_function, scratch_bytes

OPERATORS = torch.ops.palkernels

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
ORDERS = [("palkernels", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "palkernels")]


def run(probe, folder):
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=folder, env=dict(os.environ))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_registered_in_either_order(order, tmp_path):
    run(PROBE.format(first=order[0], second=order[1]), tmp_path)


COUNTED = """
import {first}
import {second}
import torch
from torch.utils.flop_counter import FlopCounterMode
states, weight = torch.ones(1, 5, 8), torch.ones(4, 8)
with FlopCounterMode(display=False) as counter:
    palkernels.audio_kv(states, torch.ones(8), weight, weight, num_kv_heads=1, eps=1e-5)
assert counter.get_total_flops() == 2 * 2 * 5 * 8 * 4, counter.get_total_flops()
import sys
assert not [finder for finder in sys.meta_path if "palkernels" in type(finder).__module__]  # it has done its work
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_counter_made_before_the_first_call_counts(order, tmp_path):
    """A counter copies the formulas when it is made; our functions are imported when they are asked for, within it."""
    run(COUNTED.format(first=order[0], second=order[1]), tmp_path)


def projection(fused):
    """Arguments of audio_kv_forward: A 2, N 5, d 12, Hkv 2, D 4."""
    weights = [torch.ones(12), torch.ones(8, 12), torch.ones(8, 12)]
    return [torch.ones(2, 5, 12), *weights, *[None] * 5, 2, 1e-5, 0.0, fused]


STATES, UPSTREAM, WEIGHT = 2 * 5 * 12 * 4, 2 * 2 * 5 * 4 * 4, 8 * 12 * 4  # bytes


@pytest.mark.parametrize(
    ("needed", "key", "value", "states"),
    [
        (("states",), True, True, 1),
        (("k_weight",), True, False, 1),
        (("states", "v_weight"), False, True, 2),
        (("v_bias",), False, True, 0),
    ],
)
def test_scratch_of_the_backward_pass(needed, key, value, states):
    """Copies of the upstream gradients; the states normalised again, for the weights; and the gradient of these."""
    names = ("states", "norm_weight", "k_weight", "v_weight", "k_bias", "v_bias", "k_norm_weight")
    upstream = [torch.ones(2, 2, 5, 4) if given else None for given in (key, value)]
    given = [*upstream, [name in needed for name in names], *projection(fused=True)]
    operator = OPERATORS.audio_kv_backward.default
    assert scratch_bytes(operator, given) == states * STATES + (key + value) * UPSTREAM
    assert scratch_bytes(operator, [*given[:-1], False]) == 0


def test_scratch_of_the_forward_pass():
    forward, layers = OPERATORS.audio_kv_forward.default, OPERATORS.audio_kv_layers.default
    assert scratch_bytes(forward, projection(fused=True)) == STATES
    assert scratch_bytes(forward, projection(fused=False)) == 0
    states, *lists = projection(fused=True)[:9]
    given = [states, *([x] * 3 for x in lists), 2, 1e-5, 0.0]
    assert scratch_bytes(layers, given) == STATES + 3 * 2 * WEIGHT
    assert scratch_bytes(layers, given[:2], {"k_weight": given[2]}) == STATES + 3 * 2 * WEIGHT
    assert scratch_bytes(torch.ops.aten.mm.default, [torch.ones(2, 2)] * 2) == 0


def test_the_plain_function_does_what_the_operator_does():
    forward = OPERATORS.audio_kv_forward.default
    given = projection(fused=False)
    function = plain_function(forward, given)
    for got, want in zip(function(*given), forward(*given), strict=True):
        assert torch.equal(got, want)
    assert plain_function(forward, projection(fused=True)) is None
    assert plain_function(forward, given[:-1], {"fused": True}) is None
    assert plain_function(torch.ops.aten.mm.default, []) is None
    backward = [torch.ones(2, 2, 5, 4), None, [True] * 7, *given]
    assert plain_function(OPERATORS.audio_kv_backward.default, backward) is not None


@pytest.mark.slow
def test_a_reloaded_package_registers_again(tmp_path):
    reload = "import importlib, palkernels, torch.utils.flop_counter; palkernels.audio_kv; importlib.reload(palkernels)"
    run(reload, tmp_path)
    run(f"{reload.replace('torch.utils.flop_counter', 'sys')}; import torch.utils.flop_counter", tmp_path)
