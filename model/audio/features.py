"""What each encoder hears of a waveform: its spectrogram, and how many of its states stand on the clip.

Every encoder has one window of fixed length. A shorter clip is padded to it, as the encoder was trained. A longer one
is refused: the caller cuts it, as an audio LLM's processor does. A clip's features do not depend on its batch.

    class             rate       window               states of a window
    WhisperFeatures   16 kHz     30 s, or less        1500, every 20 ms
    ClapFeatures      48 kHz     10 s                 64 = 32 steps of 312.5 ms x 2 frequency bands
    SslamFeatures     16 kHz     10.24 s              512 = 64 steps of 160 ms x 8 frequency bands

Nothing here needs an encoder's weights: a data loader's workers can make features without loading a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import ClapFeatureExtractor, WhisperFeatureExtractor

from palkernels.model.audio.dependencies import import_audio_package
from palkernels.model.audio.limits import checked_waveform

__all__ = ["ClapFeatures", "Features", "SslamFeatures", "WhisperFeatures"]


class Features(ABC):
    """From waveforms to an encoder's input. Call it with a list of clips.

    Attributes:
        sampling_rate: Of the clips, in Hz.
        max_samples: The longest clip that is accepted: the encoder's window.
        num_states: States that the encoder gives for every clip, whatever its length.
        shape: The shape of one clip's features; a batch has (B, *shape).
    """

    sampling_rate: ClassVar[int]
    max_samples: int
    num_states: int
    shape: tuple[int, ...]

    def __call__(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the features of a batch, and how many states of each clip are valid: the first ones.

        Args:
            waveforms: Clips (samples,), any float dtype, any device.

        Returns:
            input_features: (B, *shape) float32 on the CPU.
            state_lengths: (B,) int64 on the CPU, each from 1 to `num_states`.

        Raises:
            ValueError: There is no clip, or one that is not one-dimensional, not floating point, empty, longer than
                `max_samples`, not finite or beyond 2**31.
            ModuleNotFoundError: SSLAM's features need torchaudio.
        """
        if not isinstance(waveforms, list | tuple) or not waveforms:
            got = "none" if isinstance(waveforms, list | tuple) else type(waveforms).__name__
            raise ValueError(f"waveforms must be a list of at least one clip, got {got}")
        input_features = torch.empty(len(waveforms), *self.shape, dtype=torch.float32, device="cpu")
        lengths = []
        with torch.device("cpu"):  # whatever the caller's default device is
            for number, waveform in enumerate(waveforms):
                clip = checked_waveform(f"waveforms[{number}]", waveform, self.sampling_rate, self.max_samples)
                input_features[number] = self._extract(clip)
                lengths.append(self.state_length(clip.numel()))
        return input_features, torch.tensor(lengths, dtype=torch.int64, device="cpu")

    @abstractmethod
    def state_length(self, samples: int) -> int:
        """Return how many states are valid for a clip of `samples` samples, 1 to `max_samples`."""

    @abstractmethod
    def _extract(self, clip: Tensor) -> Tensor:
        """Return the features of one clip, (samples,) to `shape`."""


class WhisperFeatures(Features):
    """Log-mel spectrogram of the clip and silence up to 30 s: (num_mel_bins, 3000 frames of 10 ms).

    A state stands on two frames, 320 samples. States that start within the clip are valid: ceil(samples / 320).

    Args:
        num_mel_bins: Of the spectrogram.
        window_seconds: A shorter window, a multiple of a state's 20 ms; None: 30 s.

    Raises:
        ValueError: The window is no such multiple, or longer than 30 s.
    """

    sampling_rate = 16_000
    MOST_STATES = 1_500

    def __init__(self, num_mel_bins: int = 80, window_seconds: float | None = None) -> None:
        self.num_states = self.MOST_STATES if window_seconds is None else _states_within(window_seconds)
        self.max_samples = 320 * self.num_states
        self.shape = (num_mel_bins, 2 * self.num_states)
        # Made here, not read from a checkpoint: all Whisper models share its settings but the mel bins.
        self._extractor = WhisperFeatureExtractor(feature_size=num_mel_bins)

    def state_length(self, samples: int) -> int:
        return -(-samples // 320)

    def _extract(self, clip: Tensor) -> Tensor:
        settings = {"sampling_rate": self.sampling_rate, "max_length": self.max_samples}
        features = self._extractor(clip.numpy(), **settings, return_tensors="pt")
        return torch.as_tensor(features["input_features"][0])


def _states_within(window_seconds: float) -> int:
    """Return how many of Whisper's states a window has."""
    is_number = isinstance(window_seconds, int | float) and not isinstance(window_seconds, bool)
    states = round(50 * window_seconds) if is_number and 0 < window_seconds <= 30 else 0
    if states < 1 or abs(states - 50 * window_seconds) > 1e-6:
        raise ValueError(f"window_seconds must be a multiple of 0.02 of at most 30, or None, got {window_seconds!r}")
    return states


class ClapFeatures(Features):
    """Log-mel spectrogram of the clip repeated whole as often as 10 s hold it, then silence: (1, 1001 frames, 64).

    The settings are those of LAION's CLAP without fusion, some of which are not the defaults of transformers. Its
    "rand_trunc" cuts longer clips at random; here there are none to cut. Time steps of 312.5 ms (15,000 samples) that
    start within the clip are valid, two states a step. The states that the repetitions fill are not counted.
    """

    sampling_rate = 48_000
    max_samples = 10 * 48_000
    num_states = 64
    shape = (1, 1_001, 64)

    def __init__(self) -> None:
        self._extractor = ClapFeatureExtractor(
            feature_size=64,
            sampling_rate=self.sampling_rate,
            hop_length=480,
            max_length_s=10,
            fft_window_size=1_024,
            frequency_min=50,
            frequency_max=14_000,
            truncation="rand_trunc",
            padding="repeatpad",
        )

    def state_length(self, samples: int) -> int:
        return 2 * -(-samples // 15_000)

    def _extract(self, clip: Tensor) -> Tensor:
        features = self._extractor(clip.numpy(), sampling_rate=self.sampling_rate, return_tensors="np")
        return torch.as_tensor(features["input_features"][0])


class SslamFeatures(Features):
    """Kaldi's log-mel filter bank, zeros up to 1024 frames of 10 ms, scaled: (1024 frames, 128).

    The clip's mean is taken off first. Zeros are added before the scaling, (x + 4.268) / (2 * 4.569), whose constants
    are AudioSet's mean and deviation. A clip shorter than one analysis window of 25 ms is filled up with zeros to have
    one frame. A token stands on a patch of 16 frames x 16 bins and is valid if the patch holds a frame of the clip:
    eight tokens for each 16 frames begun.

    Args:
        with_cls: The tower's states begin with the CLS token, which counts as valid.
    """

    sampling_rate = 16_000
    max_samples = 1_024 * 160
    shape = (1_024, 128)

    def __init__(self, with_cls: bool = False) -> None:
        self.num_states = 512 + with_cls
        self._cls_tokens = int(with_cls)

    def state_length(self, samples: int) -> int:
        frames = 1 + max(0, samples - 400) // 160
        return self._cls_tokens + 8 * -(-frames // 16)

    def _extract(self, clip: Tensor) -> Tensor:
        clip = clip - clip.mean()
        clip = nn.functional.pad(clip, (0, max(0, 400 - clip.numel())))
        kaldi = import_audio_package("torchaudio.compliance.kaldi", "SSLAM's filter bank")
        frames = kaldi.fbank(
            clip[None],
            sample_frequency=self.sampling_rate,
            window_type="hanning",
            frame_length=25,
            frame_shift=10,
            num_mel_bins=128,
            dither=0.0,
            htk_compat=True,
            use_energy=False,
        )
        padded = nn.functional.pad(frames, (0, 0, 0, self.shape[0] - len(frames)))
        return (padded + 4.268) / (2 * 4.569)
