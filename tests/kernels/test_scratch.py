"""The memory that decoding keeps: its counters are zeros, whatever happens on the host."""

import pytest
import torch

from palkernels.kernels import scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(scratch, "_kept", {})


def test_as_much_as_was_asked_for_in_zeros():
    for num_floats, num_counters in ((1, 1), (1000, 5000), (3, 7), (5000, 4097)):
        floats, counters = scratch.kept(CPU, 0, num_floats, num_counters)
        assert floats.shape[0] >= num_floats
        assert floats.dtype == torch.float32
        assert counters.shape[0] >= num_counters
        assert counters.dtype == torch.int32
        assert not counters.any()


def test_a_smaller_launch_uses_what_is_there():
    floats, counters = scratch.kept(CPU, 0, 1000, 5000)
    again = scratch.kept(CPU, 0, 10, 10)
    assert again[0] is floats
    assert again[1] is counters


def test_streams_share_nothing():
    found = [scratch.kept(CPU, stream, 10, 10) for stream in (0, 7, 0)]
    assert found[0][0] is found[2][0]
    assert {x.data_ptr() for x in found[0]}.isdisjoint(x.data_ptr() for x in found[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("function", ["empty", "zeros"])
def test_growing_that_fails_changes_nothing(monkeypatch, function, error):
    """Neither floats without counters nor counters without zeros are ever kept."""
    before = scratch.kept(CPU, 0, 10, 10)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patches:
        patches.setattr(torch, function, fail)
        with pytest.raises(error):
            scratch.kept(CPU, 0, 10_000, 10_000)
        with pytest.raises(error):
            scratch.kept(CPU, 1, 10, 10)
        assert scratch.kept(CPU, 0, 10, 10) is before
    floats, counters = scratch.kept(CPU, 0, 10_000, 10_000)
    assert floats.shape[0] >= 10_000
    assert counters.shape[0] >= 10_000
    assert not counters.any()
