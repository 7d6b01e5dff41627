"""How long a run is said to take."""

from palkernels.bench.instruments import estimate
from palkernels.bench.instruments.rates import Rates
from palkernels.bench.presets import plan_llm

H200 = Rates(790e12, 4.3e12)


def test_a_gpu_waits_for_its_host() -> None:
    """A generation of short texts takes a GPU less than its host, whose time counts layers and steps alone: on an H200
    32 tokens took 0.43 s (PLITS) to 0.61 s (LAL), and a training step of LAL 0.10 to 0.15 s."""
    config = plan_llm("llama-3.2-1b", None).config
    sample = estimate.Sample(in_sequence=0, as_keys=1500, text=128, batch=12)
    gpu = estimate.infer_seconds(config, H200, sample, 32, 2_500_000_000)
    host = estimate.host_seconds(config, "infer", 32)
    assert gpu < 0.1 < 0.4 < host < 0.65
    assert estimate.host_seconds(config, "infer", 64) == 2 * host
    assert 0.06 < estimate.host_seconds(config, "train", 64) < 0.15
