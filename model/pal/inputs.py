"""A batch's audio as a caller gives it: which of it must come together, and which text hears which clip."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palkernels import devices
from palkernels.model.pal.clips import AudioFeatures, Clips
from palkernels.model.pal.placeholders import infer_index

__all__ = ["AudioInputs", "checked_encoder_states", "clip_index", "lengths_by_tower", "tensors_of"]

FORMS = ("input_features", "encoder_states", "audio_features")  # in which clips come


@dataclass(frozen=True)
class AudioInputs:
    """A batch's audio as a caller gives it; see :class:`PalForConditionalGeneration`."""

    input_features: Tensor | Sequence[Tensor] | None
    audio_lengths: Tensor | None
    audio_index: Tensor | None
    insert_at: Tensor | None
    audio_features: AudioFeatures | None
    encoder_states: Tensor | Sequence[Tensor] | None = None
    position_ids: Tensor | None = None  # which tell packed texts apart

    @property
    def has_clips(self) -> bool:
        """Whether there are clips, encoded or not."""
        return any(getattr(self, name) is not None for name in FORMS)

    def texts_of(self, rows: int) -> int:
        """Return how many texts there are in ``rows``: more than one where positions and index say that it is packed.

        Raises:
            ValueError: Positions do not count each text of ``audio_index`` from 0. Checked on the CPU only.
        """
        index, positions = self.audio_index, self.position_ids
        if rows != 1 or positions is None or index is None or index.ndim not in (1, 2) or index.shape[0] == 1:
            return rows
        count = index.shape[0]
        if devices.is_host(positions.device) and not torch.compiler.is_compiling():
            begins = int((positions == 0).sum())
            if begins != count:
                raise ValueError(f"position_ids must count each of {count} texts of audio_index from 0, got {begins}")
        return count

    def check(self) -> None:
        """Check that clips come once, and that nothing describes clips which are not there.

        Raises:
            TypeError, ValueError: they do not.
        """
        features = self.audio_features
        if features is not None and not isinstance(features, AudioFeatures):
            raise TypeError(f"audio_features must be what get_audio_features returns, got {type(features).__name__}")
        several = [name for name in FORMS if getattr(self, name) is not None]
        if len(several) > 1:
            raise ValueError(f"audio must be one of {', '.join(FORMS)}, got {' and '.join(several)}")
        if features is not None and self.audio_lengths is not None:
            raise ValueError(
                "audio_lengths must come with input_features or encoder_states, got audio_features, which have theirs"
            )
        for name in ("input_features", "encoder_states"):
            tensors = tensors_of(getattr(self, name))
            if any(isinstance(tensor, Tensor) and tensor.ndim and not tensor.shape[0] for tensor in tensors):
                raise ValueError(
                    f"{name} must hold at least one clip, got none: leave them, and what describes clips, out where no "
                    "text hears any"
                )
        for name in ("audio_lengths", "audio_index", "insert_at"):
            if getattr(self, name) is not None and not self.has_clips:
                raise ValueError(f"{name} must come with clips, {', '.join(FORMS[:-1])} or {FORMS[-1]}, got none")


def tensors_of(value: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Return what a caller gives for the towers, one tensor or one for each, as a list; an empty one of None."""
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)


def checked_encoder_states(
    encoder_states: Tensor | Sequence[Tensor], windows: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Return the states of every tower, after checking that they are such.

    Args:
        encoder_states: (W, N, width) of one tower, or a list of them.
        windows: The states that each tower makes of a window, and their width.

    Raises:
        TypeError, ValueError: There is not a tensor for every tower, or one has another shape or no floats.
    """
    states = tensors_of(encoder_states)
    if len(states) != len(windows):
        raise ValueError(f"encoder_states must hold a tensor for each of {len(windows)} towers, got {len(states)}")
    for number, (one, (most, width)) in enumerate(zip(states, windows, strict=True)):
        name = "encoder_states" if len(states) == 1 else f"encoder_states[{number}]"
        if not isinstance(one, Tensor) or not one.is_floating_point():
            got = one.dtype if isinstance(one, Tensor) else type(one).__name__
            raise TypeError(f"{name} must be a tensor of floats, got {got}")
        if one.ndim != 3 or not 1 <= one.shape[1] <= most or one.shape[2] != width:
            raise ValueError(f"{name} must be (W, 1 to {most}, {width}), got shape {tuple(one.shape)}")
    return states


def lengths_by_tower(audio_lengths: Tensor | None, encoded: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the valid states (C,) of every clip for each tower; None: all of every window.

    Args:
        audio_lengths: (C, towers), of one tower also (C,), or None.
        encoded: The states (W, N, width) that each tower made of the clips' windows.

    Raises:
        ValueError: The lengths have another shape.
    """
    if audio_lengths is None:
        return [None] * len(encoded)
    towers, shape = len(encoded), tuple(audio_lengths.shape)
    if not ((len(shape) == 2 and shape[1] == towers) or len(shape) == towers == 1):
        raise ValueError(f"audio_lengths must be (C, towers) with {towers} towers, got {shape}")
    return audio_lengths.reshape(-1, towers).to(encoded[0].device).unbind(1)


def clip_index(audio_index: Tensor | None, batch: int, clips: Clips, placeholders: Tensor | None = None) -> Tensor:
    """Return the clips (B, K) of each text, int64, -1 where there is none, after checking them.

    Args:
        audio_index: (B, K) or (B,); None: text b hears clip b, or as many clips, in their order, as fill its
            placeholders.
        batch: B, the number of texts.
        clips: All clips; their PLITS tokens where some enter so.
        placeholders: (B,) those of each text, where audio enters by PLITS.

    Raises:
        TypeError, ValueError: The index is no integers, has another shape, names a clip that is not there, or is needed
            and None. Values are checked on the CPU only: elsewhere it would wait for the device.
    """
    count = clips.states.shape[0]
    if not batch:
        raise ValueError("input_ids must hold at least one text with audio, got none")
    if audio_index is None:
        if placeholders is not None and not torch.compiler.is_compiling():
            inferred = infer_index(placeholders.tolist(), clips.lengths.tolist())
            if inferred is not None:
                most = max(1, *map(len, inferred))
                table = [numbers + [-1] * (most - len(numbers)) for numbers in inferred]
                return torch.tensor(table, device=clips.lengths.device)
        if count != batch:
            raise ValueError(f"audio_index must be given for {count} clips and {batch} texts, got None")
        return torch.arange(batch, device=clips.lengths.device).unsqueeze(1)
    if audio_index.is_floating_point() or audio_index.is_complex() or audio_index.dtype == torch.bool:
        raise TypeError(f"audio_index must have an integer dtype, got {audio_index.dtype}")
    if audio_index.ndim not in (1, 2) or audio_index.shape[0] != batch:
        raise ValueError(f"audio_index must be (B, K) with B = {batch}, got shape {tuple(audio_index.shape)}")
    index = audio_index.reshape(batch, -1).to(clips.lengths.device, torch.long)
    known = devices.is_host(index.device) and not torch.compiler.is_compiling()
    if known and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"audio_index must be from -1 to {count - 1}, got {index.tolist()}")
    return index
