"""Encoders' input features: they equal those of transformers and torchaudio by hand, and lengths follow the clip."""

import json
import math
import re
import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch
import torchaudio
from torch import Tensor
from transformers import ClapFeatureExtractor, WhisperFeatureExtractor

from palkernels.model.audio.features import ClapFeatures, Features, SslamFeatures, WhisperFeatures

ALL = [WhisperFeatures(), ClapFeatures(), SslamFeatures()]
EMPTY = 4.268 / (2 * 4.569)  # a frame of zeros, scaled
each = pytest.mark.parametrize("features", ALL, ids=lambda features: type(features).__name__)


def clip(samples: int, seed: int = 0) -> Tensor:
    """Noise over a rising tone, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, generator=generator)
    ramp = torch.arange(samples) / samples
    return 0.1 * noise + 0.3 * torch.sin(4000 * ramp**2) + 0.05


def fbank_by_hand(waveform: Tensor) -> Tensor:
    """SSLAM's recipe, step by step."""
    frames = torchaudio.compliance.kaldi.fbank(
        (waveform - waveform.mean()).unsqueeze(0),
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )
    padded = torch.zeros(1024, 128)
    padded[: len(frames)] = frames
    return (padded + 4.268) / (2 * 4.569)


# The features


@pytest.mark.parametrize("samples", [400, 16_000, 123_456, 163_840])
def test_sslam_features_are_kaldis(samples: int) -> None:
    """Mean removed, Kaldi's filter bank, zeros to 1024 frames, scaled."""
    waveform = clip(samples)
    got, _ = SslamFeatures()([waveform])
    assert torch.equal(got[0], fbank_by_hand(waveform))


def test_sslam_clip_shorter_than_a_frame_is_filled_up() -> None:
    """A clip shorter than one analysis window gets one frame; Kaldi itself would give it none."""
    waveform = clip(100)
    got, lengths = SslamFeatures()([waveform])
    filled = torch.cat([waveform - waveform.mean(), torch.zeros(300)])
    frame = torchaudio.compliance.kaldi.fbank(filled[None], window_type="hanning", num_mel_bins=128, htk_compat=True)
    torch.testing.assert_close(got[0, :1], (frame + 4.268) / (2 * 4.569))
    torch.testing.assert_close(got[0, 1:], torch.full((1023, 128), EMPTY))
    assert lengths.tolist() == [8]


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_whisper_features_are_transformers(mel_bins: int) -> None:
    """The features are those of the clip and silence up to 30 s."""
    waveform = clip(50_000)
    got, _ = WhisperFeatures(mel_bins)([waveform])
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    assert torch.equal(got, extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_features)


@pytest.mark.parametrize("samples", [1_000, 100_000, 480_000])
def test_clap_features_are_laions(samples: int) -> None:
    """50 to 14,000 Hz, repeated and padded, one mel. Two settings differ from transformers' defaults, and matter."""
    waveform = clip(samples)
    got, _ = ClapFeatures()([waveform])
    laion = {"frequency_min": 50, "frequency_max": 14_000, "truncation": "rand_trunc", "padding": "repeatpad"}

    def by_hand(**settings: Any) -> Tensor:
        features: Tensor = ClapFeatureExtractor(**settings)(
            waveform.numpy(), sampling_rate=48_000, return_tensors="pt"
        ).input_features
        return features.float()

    assert torch.equal(got, by_hand(**laion))
    assert not torch.allclose(got, by_hand(**laion | {"frequency_min": 0}))
    assert by_hand(**laion | {"truncation": "fusion"}).shape == (1, 4, 1001, 64)
    if samples == 100_000:
        assert not torch.allclose(got, by_hand(**laion | {"padding": "pad"}))


@each
def test_a_clips_features_do_not_depend_on_its_batch(features: Features) -> None:
    """Features are equal bit for bit, and the global random state stays as it was."""
    clips = [clip(samples, seed=samples) for samples in (20_000, 1, features.max_samples)]
    before = torch.get_rng_state(), numpy.random.get_state()[1].copy()
    together, lengths = features(clips)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert numpy.array_equal(numpy.random.get_state()[1], before[1])
    assert together.shape == (3, *features.shape)
    assert (together.dtype, lengths.dtype) == (torch.float32, torch.int64)
    assert together.isfinite().all()
    for at, waveform in enumerate(clips):
        alone, length = features([waveform])
        assert torch.equal(alone[0], together[at])
        assert length[0] == lengths[at]


@each
def test_default_device_does_not_matter(features: Features) -> None:
    """Features are made on the CPU."""
    waveform = clip(5_000)
    expected, _ = features([waveform])
    with torch.device("meta"):
        got, lengths = features([waveform])
    assert torch.equal(got, expected)
    assert lengths.device.type == "cpu"


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_waveform_of_another_dtype(features: Features, dtype: torch.dtype) -> None:
    """The clip is taken as float32 and left as it was."""
    waveform = clip(5_000).to(dtype).requires_grad_()
    before = waveform.detach().clone()
    got, _ = features([waveform])
    assert torch.equal(got, features([waveform.detach().float()])[0])
    assert torch.equal(waveform, before)


@each
def test_loudest_clip_is_finite(features: Features) -> None:
    """Samples at the bound, 2**31, give finite features."""
    got, _ = features([2.0**31 * torch.sin(torch.arange(8_000) / 3)])
    assert got.isfinite().all()


# Lengths


@pytest.mark.parametrize(
    ("features", "lengths"),
    [
        (WhisperFeatures(), {1: 1, 320: 1, 321: 2, 16_000: 50, 480_000: 1500}),
        (ClapFeatures(), {1: 2, 15_000: 2, 15_001: 4, 48_000: 8, 480_000: 64}),
        (SslamFeatures(), {1: 8, 400: 8, 400 + 15 * 160: 8, 400 + 16 * 160: 16, 160_000: 504, 163_840: 512}),
        (SslamFeatures(with_cls=True), {1: 9, 163_840: 513}),
    ],
    ids=["whisper", "clap", "sslam", "sslam with CLS"],
)
def test_lengths_follow_the_clip(features: Features, lengths: dict[int, int]) -> None:
    """A state is valid if the samples under it begin within the clip. In a full window all states are valid."""
    assert {samples: features.state_length(samples) for samples in lengths} == lengths
    assert max(lengths.values()) == features.num_states
    samples = next(iter(lengths))
    assert features([torch.ones(samples)])[1].tolist() == [lengths[samples]]


def test_sslam_patches_beyond_the_length_are_empty() -> None:
    """The last valid patch is not empty."""
    features, lengths = SslamFeatures()([clip(50_000)])
    steps = int(lengths[0]) // 8
    beyond = features[0, 16 * steps :]
    torch.testing.assert_close(beyond, torch.full_like(beyond, EMPTY))
    assert features[0, 16 * (steps - 1) : 16 * steps].std() > 0.01


# What is refused


@each
@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        ([0.0], "must be a torch.Tensor, got list"),
        (torch.zeros(1, 10), "must have shape (samples,), got (1, 10)"),
        (torch.tensor(0.0), "must have shape (samples,), got ()"),
        (torch.zeros(10, dtype=torch.int16), "must be floating point, got torch.int16"),
        (torch.zeros(0), "must hold at least one sample, got none"),
        (torch.tensor([0.0, math.nan]), "must hold finite samples within 2**31"),
        (torch.tensor([-math.inf, 0.0]), "must hold finite samples within 2**31"),
        (torch.tensor([1e300], dtype=torch.float64), "must hold finite samples within 2**31"),
        (torch.tensor([1e10]), "must hold finite samples within 2**31"),
    ],
)
def test_refuses_what_is_no_clip(features: Features, waveform: Any, message: str) -> None:
    """The error is one line and says which clip of the batch it was."""
    with pytest.raises(ValueError, match=f"^{re.escape('waveforms[1] ' + message)}") as caught:
        features([torch.zeros(10), waveform])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("features", "window"),
    [(ALL[0], "30 s (480000 samples)"), (ALL[1], "10 s (480000 samples)"), (ALL[2], "10.24 s (163840 samples)")],
    ids=["whisper", "clap", "sslam"],
)
def test_refuses_what_is_longer_than_the_window(features: Features, window: str) -> None:
    """No encoder cuts a clip silently, or at random."""
    message = f"waveforms[0] must fit the encoder's window of {window}, got {features.max_samples + 1} samples"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        features([torch.zeros(features.max_samples + 1)])


@pytest.mark.parametrize(("batch", "got"), [([], "none"), (torch.zeros(2, 9), "Tensor"), (None, "NoneType")])
def test_refuses_what_is_no_batch(batch: Any, got: str) -> None:
    """A tensor is refused too: each row of a padded batch would be taken for a whole clip."""
    with pytest.raises(ValueError, match=f"^waveforms must be a list of at least one clip, got {got}$"):
        SslamFeatures()(batch)


@pytest.mark.slow
def test_only_sslams_features_need_torchaudio() -> None:
    """Without torchaudio SSLAM's features say what to install, and the others work."""
    code = """
import json, sys
sys.modules["torchaudio"] = None
import torch
from palkernels.model.audio.features import ClapFeatures, SslamFeatures, WhisperFeatures
errors = {}
for features in (WhisperFeatures(), ClapFeatures(), SslamFeatures()):
    try:
        features([torch.zeros(500)])
    except ModuleNotFoundError as error:
        errors[type(features).__name__] = str(error)
print(json.dumps(errors))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    errors = json.loads(done.stdout.splitlines()[-1])
    assert list(errors) == ["SslamFeatures"]
    assert errors["SslamFeatures"].startswith("SSLAM's filter bank needs torchaudio: pip install 'palkernels[audio]' (")
