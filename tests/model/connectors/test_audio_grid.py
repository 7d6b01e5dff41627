"""Which tokens a time-frequency cell sees, by seconds and hertz."""

import math

import pytest
import torch
from support.connectors import COARSE, FINE, FINE_IN_TIME, seen_tokens
from transformers import ASTFeatureExtractor, ClapFeatureExtractor
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from palkernels.model.connectors.audio_grid import CLAP_GRID, SSLAM_GRID, AudioGrid, cell_windows


@pytest.mark.parametrize(("grid", "scale"), [(SSLAM_GRID, "kaldi"), (CLAP_GRID, "slaney")])
def test_band_edges_are_those_of_the_filters(grid, scale):
    """Bands meet between the centres of neighbouring filters, by transformers' mel scales."""
    ends = [float(hertz_to_mel(hertz, mel_scale=scale)) for hertz in (grid.low_hz, grid.high_hz)]
    centres = torch.linspace(*ends, grid.mel_bins + 2, dtype=torch.float64)[1:-1]
    wide = grid.mel_bins // grid.freq
    edges = [
        float(mel_to_hertz(float(centres[i * wide - 1] + centres[i * wide]) / 2, mel_scale=scale))
        for i in range(1, grid.freq)
    ]
    assert grid.freq_edges() == pytest.approx([grid.low_hz, *edges, grid.high_hz])


def test_grids_are_those_of_the_feature_extractors():
    """Mel bins, band limits and seconds agree with the feature extractors in transformers."""
    clap, sslam = ClapFeatureExtractor(frequency_min=50), ASTFeatureExtractor()
    assert (CLAP_GRID.mel_bins, CLAP_GRID.high_hz) == (clap.mel_filters_slaney.shape[1], clap.frequency_max)
    assert CLAP_GRID.seconds == clap.nb_max_samples / clap.sampling_rate
    assert SSLAM_GRID.mel_bins == sslam.num_mel_bins == 16 * SSLAM_GRID.freq
    assert SSLAM_GRID.time * 16 == sslam.max_length
    assert pytest.approx(sslam.max_length * 0.010) == SSLAM_GRID.seconds
    assert SSLAM_GRID.high_hz == sslam.sampling_rate / 2


def test_default_cells_see_what_covers_them():
    """Each of 64 x 8 cells sees its own SSLAM token, and the CLAP token of its seconds and hertz, worked out here."""
    assert seen_tokens(SSLAM_GRID, SSLAM_GRID) == [[i] for i in range(512)]
    found = seen_tokens(SSLAM_GRID, CLAP_GRID)
    # CLAP's two bands meet between its 32nd and 33rd filter: by Slaney's scale at 2292 Hz.
    low, high = 50 * 3 / 200, 15 + 27 * math.log(14) / math.log(6.4)
    border = 1000 * math.exp((low + 32.5 / 65 * (high - low) - 15) * math.log(6.4) / 27)
    assert border == pytest.approx(2292, abs=2)
    mel = [1127 * math.log(1 + hertz / 700) for hertz in (20, 8000)]
    for cell, tokens in enumerate(found):
        t, f = divmod(cell, 8)
        bands = [700 * (math.exp((mel[0] + (16 * i + 0.5) * (mel[1] - mel[0]) / 129) / 1127) - 1) for i in (f, f + 1)]
        middle = (20 + bands[1]) / 2 if f == 0 else (bands[0] + 8000) / 2 if f == 7 else sum(bands) / 2
        seconds = (t + 0.5) * 0.16
        assert tokens == [min(int(seconds / 0.3125), 31) * 2 + (middle >= border)]
    assert [tokens[0] % 2 for tokens in found[:8]] == [0, 0, 0, 0, 0, 1, 1, 1]


def test_finer_tokens_fall_into_one_cell_each():
    """Tokens twice as fine in time and four times in frequency: windows of 8 share nothing and miss nothing."""
    found = seen_tokens(COARSE, FINE)
    assert [len(tokens) for tokens in found] == [8] * 12
    assert sorted(token for tokens in found for token in tokens) == list(range(96))
    assert found[0] == [0, 1, 2, 3, 12, 13, 14, 15]
    assert found[4] == [2 * 12 + 4 + i for i in range(4)] + [3 * 12 + 4 + i for i in range(4)]


def test_windows_of_different_sizes():
    """Tokens of 0.1 s in cells of 0.25 s: two or three, by their middles; slots that are not used are marked."""
    index, seen = cell_windows(COARSE, FINE_IN_TIME)
    assert index.shape == (12, 3)
    assert seen_tokens(COARSE, FINE_IN_TIME)[::3] == [[0, 2], [4, 6, 8], [10, 12], [14, 16, 18]]
    assert seen.sum().item() == 3 * 10  # the last token lies behind every cell
    assert (index[~seen] == 0).all()


def test_shorter_encoder_gives_its_last_token():
    """Cells beyond what an encoder hears see the token that is nearest."""
    short = AudioGrid(2, 1, 0.4, 4, 20.0, 400.0)
    assert seen_tokens(COARSE, short) == [[0]] * 3 + [[1]] * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": 0}, "time must be a positive integer, got 0"),
        ({"seconds": 0.0}, "seconds must be positive, got 0.0"),
        ({"low_hz": 9_000.0}, "low_hz must be from 0 to below high_hz, got 9000.0 and 4000.0"),
        ({"mel_scale": "bark"}, "mel_scale must be one of 'htk', 'slaney', got 'bark'"),
    ],
)
def test_grid_refuses(change, message):
    settings = {"time": 4, "freq": 2, "seconds": 1.0, "mel_bins": 8, "low_hz": 0.0, "high_hz": 4_000.0}
    with pytest.raises(ValueError, match=f"^{message}$"):
        AudioGrid(**(settings | change))
