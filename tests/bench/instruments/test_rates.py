"""What devices do per second."""

import torch

from palkernels.bench.instruments.rates import GPUS, Rates, measure_rates


def test_an_operation_takes_the_longer_of_its_arithmetic_and_its_traffic() -> None:
    rates = Rates(flops_per_second=10.0, bytes_per_second=2.0)
    assert rates.seconds(30.0, 4.0) == 3.0
    assert rates.seconds(30.0, 8.0) == 4.0


def test_shares_of_a_gpu_are_within_reach() -> None:
    for gpu in GPUS.values():
        assert gpu.within_reach == Rates(0.8 * gpu.published.flops_per_second, 0.9 * gpu.published.bytes_per_second)


def test_this_machine_is_measured() -> None:
    rates = measure_rates(torch.float32, torch.device("cpu"), seconds=0.0)
    assert rates.flops_per_second > 0
    assert rates.bytes_per_second > 0
