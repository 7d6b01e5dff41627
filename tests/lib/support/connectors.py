"""A small Q-Former, and grids of tokens for LFST."""

import torch

from palkernels.model import QFormerConnector
from palkernels.model.connectors.audio_grid import AudioGrid, cell_windows

COARSE = AudioGrid(4, 3, 1.0, 12, 20.0, 4_000.0)
# Finer along time, where a second does not divide evenly among cells; coarser along frequency.
FINE_IN_TIME = AudioGrid(11, 2, 1.1, 8, 50.0, 6_000.0, "slaney")
FINE = AudioGrid(8, 12, 1.0, 24, 20.0, 4_000.0)


def seen_tokens(cells, tokens):
    """The tokens that each cell sees."""
    index, seen = cell_windows(cells, tokens)
    return [slots[used].tolist() for slots, used in zip(index, seen, strict=True)]


def small_qformer(**changes) -> QFormerConnector:
    """From width 6 to width 10, float64, in evaluation mode."""
    torch.manual_seed(0)
    settings = {"num_queries": 5, "num_layers": 3, "width": 16, "num_heads": 2, "cross_attention_frequency": 2}
    return QFormerConnector(6, 10, **(settings | changes)).double().eval()
