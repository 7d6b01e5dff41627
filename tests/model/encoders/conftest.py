"""Small encoders for the tests of this folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.sslam import HEADS, LAYERS, WIDTH
from support.towers import SMALL_TOWERS, small_whisper

from palkernels.model import TOWERS, Tower
from palkernels.model.encoders.sslam import SslamEncoder


@pytest.fixture(scope="module")
def towers() -> dict[str, Tower]:
    return {name: TOWERS[name](**SMALL_TOWERS[name]) for name in TOWERS}


@pytest.fixture(scope="module")
def whisper() -> Any:
    return small_whisper()


@pytest.fixture(scope="module")
def checkpoint(whisper: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whisper")
    whisper.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder() -> SslamEncoder:
    """SSLAM's network, small, with norms and biases that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = SslamEncoder(WIDTH, LAYERS, HEADS)
        for name, weight in encoder.named_parameters():  # norms and biases that do something
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(weight, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return encoder.eval().requires_grad_(False)
