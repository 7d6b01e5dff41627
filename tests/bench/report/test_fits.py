"""How costs grow with length."""

from typing import Any

import pytest

from palkernels.bench.report import fits


def test_an_exponent_is_one_power() -> None:
    """What does not grow, or first hardly and then much, has none."""

    def rows(memory: list[int]) -> list[dict[str, Any]]:
        common = {"varies": "audio_tokens", "mode": "train", "method": "lal", "device": "x", "batch_size": 1}
        return [
            {
                **common,
                "audio_tokens": n,
                "peak_above_static_bytes": y,
                "attention_flops": 1,
                "samples_per_second": {"p50": 1.0},
            }
            for n, y in zip((1, 2, 4, 8, 16), memory, strict=True)
        ]

    def exponent(memory: list[int]) -> float | None:
        by_quantity = {x["quantity"]: x["exponent"] for x in fits.exponents(rows(memory))}
        assert by_quantity["seconds"] is by_quantity["attention_flops"] is None
        return by_quantity["peak_above_static_bytes"]

    assert exponent([5 + 3 * (n - 1) for n in (1, 2, 4, 8, 16)]) == pytest.approx(1.0)
    assert exponent([5 + (n - 1) ** 2 for n in (1, 2, 4, 8, 16)]) == pytest.approx(2.0)
    assert exponent([100, 101, 102, 103, 900]) is None
    assert exponent([100] * 5) is None
