"""What a batch's audio becomes for the language model: which text hears which clip, and PLITS tokens among the text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palkernels.model.pal.clips import AudioFeatures, Clips, audio_rows

__all__ = ["AudioInputs", "clip_index", "embed_with_plits", "lengths_by_tower"]


@dataclass(frozen=True)
class AudioInputs:
    """A batch's audio as a caller gives it; see :class:`PalForConditionalGeneration`."""

    input_features: Tensor | Sequence[Tensor] | None
    audio_lengths: Tensor | None
    audio_index: Tensor | None
    insert_at: Tensor | None
    audio_features: AudioFeatures | None


def lengths_by_tower(audio_lengths: Tensor | None, encoded: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the valid states (C,) of every clip for each tower; None: all.

    Args:
        audio_lengths: (C,) or (C, towers), or None.
        encoded: The clips' states (C, N, width) of each tower.

    Raises:
        ValueError: The lengths have another shape.
    """
    if audio_lengths is None:
        return [None] * len(encoded)
    shape = encoded[0].shape[0], len(encoded)
    if audio_lengths.numel() != shape[0] * shape[1]:
        raise ValueError(f"audio_lengths must be (C, towers) = {shape}, got {tuple(audio_lengths.shape)}")
    return audio_lengths.reshape(shape).to(encoded[0].device).unbind(1)


def clip_index(audio_index: Tensor | None, batch: int, clips: Clips) -> Tensor:
    """Return the clips (B, K) of each text, int64, -1 where there is none, after checking them.

    Args:
        audio_index: (B, K) or (B,); None: text b hears clip b.
        batch: B, the number of texts.
        clips: All clips.

    Raises:
        TypeError, ValueError: The index is no integers, has another shape, names a clip that is not there, or is needed
            and None. Values are checked on the CPU only: elsewhere it would wait for the device.
    """
    count = clips.states.shape[0]
    if audio_index is None:
        if count != batch:
            raise ValueError(f"audio_index must be given for {count} clips and {batch} texts, got None")
        return torch.arange(batch, device=clips.lengths.device).unsqueeze(1)
    if audio_index.is_floating_point() or audio_index.is_complex() or audio_index.dtype == torch.bool:
        raise TypeError(f"audio_index must have an integer dtype, got {audio_index.dtype}")
    if audio_index.ndim not in (1, 2) or audio_index.shape[0] != batch:
        raise ValueError(f"audio_index must be (B, K) with B = {batch}, got shape {tuple(audio_index.shape)}")
    index = audio_index.reshape(batch, -1).to(clips.lengths.device, torch.long)
    if index.device.type == "cpu" and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"audio_index must be from -1 to {count - 1}, got {index.tolist()}")
    return index


def embed_with_plits(
    embedding: nn.Module, input_ids: Tensor, audio_token_id: int, clips: Clips, index: Tensor
) -> Tensor:
    """Return the text's embeddings (B, T, d), each placeholder replaced by its PLITS token.

    Args:
        embedding: The language model's.
        input_ids: (B, T) tokens.
        audio_token_id: The placeholder.
        clips: PLITS tokens of all clips.
        index: The clips (B, K) of each text, by :func:`clip_index`.

    Raises:
        ValueError: A text has not as many placeholders as PLITS tokens.
    """
    placeholders = torch.eq(input_ids, audio_token_id)
    rows = audio_rows(clips, index)
    audio = Clips(rows.audio.states[rows.index], rows.audio.lengths[rows.index])  # one row per text
    counts = placeholders.sum(dim=1)
    if not torch.compiler.is_compiling() and not torch.equal(counts, audio.lengths):
        raise ValueError(
            f"input_ids must hold a placeholder, token {audio_token_id}, for each PLITS token, "
            f"{audio.lengths.tolist()} in the texts, got {counts.tolist()}"
        )
    embeds: Tensor = embedding(input_ids)
    tokens = audio.states[audio.valid()].to(embeds.dtype)
    return embeds.masked_scatter(placeholders.unsqueeze(-1), tokens)
