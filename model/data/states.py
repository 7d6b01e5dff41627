"""States of frozen encoders, kept on disk: each clip passes the encoders once, not in every epoch.

    states = EncodedStates("states", model.audio_tower, processor)
    prepared = states.prepare(samples, progress=True)
    collate = Collator(processor, states=states)          # batches with encoder_states; no clip is decoded
    mixture = Mixture([prepared.samples])

What is kept is what an encoder makes of a clip, before the connector: connectors and language models may change. It is
found by the clip's bytes and by the encoder, its weights included: another of either is encoded anew, and nothing has
to be deleted. Of 30 s Whisper tiny's states take 2.3 MB in float32, large-v3's 3.8 MB in bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, get_worker_info
from tqdm.auto import tqdm

from palkernels.errors import one_line
from palkernels.model.audio.limits import AudioError
from palkernels.model.data.digests import ClipDigests, tower_digest
from palkernels.model.data.reasons import UNREADABLE
from palkernels.model.data.sample import Sample
from palkernels.model.data.samples import Dropped, Samples
from palkernels.model.data.state_files import StateFiles
from palkernels.model.encoders.base import Tower
from palkernels.model.encoders.registry import TOWERS
from palkernels.model.pal.parts import by_entry, tower_settings
from palkernels.model.pal.processing_pal import PalProcessor
from palkernels.model.pal.windows import encode, window_lengths, windows_of

__all__ = ["EncodedStates", "Prepared"]

BATCH_SIZE = 8
VERSION = 1  # of features and files: raised where either changes what is kept
DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Prepared:
    """What :meth:`EncodedStates.prepare` did.

    Attributes:
        samples: Those whose clips are all kept; the others are among ``dropped``.
        encoded: The clips that were encoded.
        kept: The clips that had been kept before.
        bytes: What all of them take on disk.
    """

    samples: Samples
    encoded: int
    kept: int
    bytes: int


class EncodedStates:
    """States of frozen encoders, in a folder that several processes may use at once.

    A loader's workers read it; encoders do not travel to them. Where a clip is not kept, or its file is damaged, the
    process that made this object encodes it, and a worker says so.

    Args:
        folder: Where they are kept.
        towers: The model's encoders, frozen: ``model.audio_tower``.
        processor: The model's.
        dtype: In which they are kept; None: as the encoders give them, so that nothing is lost.

    Raises:
        ValueError: An encoder trains, or there are others than the processor's.
        TypeError: The dtype is none of float16, bfloat16 and float32.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        towers: Sequence[Any],
        processor: PalProcessor,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or None, got {dtype!r}")
        self.folder = Path(folder)
        self.processor = processor
        self.dtype = dtype
        self.towers: list[Tower] | None = list(towers)
        if any(weight.requires_grad for tower in self.towers for weight in tower.parameters()):
            raise ValueError("towers must be frozen for their states to be kept, got one that trains")
        types = [name for name, _ in tower_settings(processor.encoders)]
        if [TOWERS.get(name) for name in types] != [type(tower) for tower in self.towers]:
            got = ", ".join(type(tower).__name__ for tower in self.towers)
            raise ValueError(f"towers must be the processor's, {', '.join(types)}, got {got or 'none'}")
        features = [tower.features for tower in self.towers]
        self.windows = windows_of(processor.encoders, features)
        # What lies beyond the clip is cut off, but for a tower that is fused with another, whose lengths count.
        self.is_cut = [number == 0 for _, of in by_entry(processor.encoders, features) for number in range(len(of))]
        self.rows = [
            window.states if is_cut else one.num_states
            for window, one, is_cut in zip(self.windows, features, self.is_cut, strict=True)
        ]
        self.digests = ClipDigests()
        self.files = []
        for tower, window, rows in zip(self.towers, self.windows, self.rows, strict=True):
            name = tower_digest(tower, version=VERSION, dtype=str(dtype), samples=window.samples, rows=rows)
            self.files.append(StateFiles(self.folder / name[:16]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "towers": None}

    def check(self, processor: PalProcessor) -> None:
        """Raise a ValueError if a processor has other encoders than these states are of."""
        if processor.encoders != self.processor.encoders:
            raise ValueError("states must be of the processor's encoders, got those of others")

    def prepare(
        self, samples: Sequence[Sample], *, batch_size: int = BATCH_SIZE, num_workers: int = 0, progress: bool = False
    ) -> Prepared:
        """Encode the clips of samples that are not kept yet, and those whose files are damaged.

        It may be interrupted and run again, and several processes may prepare parts of the samples.

        Args:
            samples: Samples with clips or without.
            batch_size: Clips that are decoded at once, and windows of clips that pass an encoder at once.
            num_workers: Processes that decode them.
            progress: Whether to show how far it is, where the output is a terminal.

        Raises:
            ValueError: The states do not fit the dtype, or no sample is left.
        """
        for files in self.files:
            files.tidy()
        distinct: dict[str, Any] = {}
        faults: dict[int, str] = {}
        for number, sample in enumerate(samples):
            try:
                distinct.update((self.digests.of(clip), clip) for clip in sample.clips())
            except AudioError as error:
                faults[number] = str(error)
        looked_up = tqdm(distinct.items(), "clips looked up", disable=None if progress else True)
        missing = [(name, clip) for name, clip in looked_up if self._kept(name) is None]
        broken = self._encode_all(missing, batch_size, num_workers, progress)
        dropped = list(samples.dropped) if isinstance(samples, Samples) else []
        usable = []
        for number, sample in enumerate(samples):
            if number not in faults:
                fault = next((broken[n] for n in map(self.digests.of, sample.clips()) if n in broken), None)
                if fault is None:
                    usable.append(sample)
                    continue
                faults[number] = fault
            dropped.append(Dropped(sample.source, UNREADABLE, f"{sample.source}: {faults[number]}"))
        result = Samples(usable, dropped, samples.lengths if isinstance(samples, Samples) else None)
        if not usable:
            first = f": {dropped[-1].detail}" if dropped else ""
            raise ValueError(f"samples must hold at least one whose clips can be read, got {result.summary()}{first}")
        encoded = len(missing) - len(broken)
        size = sum(files.size(name) for files in self.files for name in distinct if name not in broken)
        return Prepared(result, encoded, len(distinct) - len(missing), size)

    def of_clips(self, clips: Sequence[Any], sampling_rate: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Return the ``encoder_states`` of C clips, (W, N, width) for each tower, and their ``audio_lengths``
        (C, towers).

        Args:
            clips: Paths, bytes, or dicts with either or with an array and its rate.
            sampling_rate: Must be None: clips bring their rates.

        Raises:
            AudioError: A clip cannot be read.
            ValueError: A clip is not kept, in a worker.
        """
        if sampling_rate is not None:
            raise ValueError(f"sampling_rate must be None for clips that are kept, got {sampling_rate!r}")
        kept = [self._of_clip(clip) for clip in clips]
        states, lengths = [], []
        for number, rows in enumerate(self.rows):
            windows = [window for of_towers in kept for window in torch.split(of_towers[number]["states"], rows)]
            states.append(pad_sequence(windows, batch_first=True))
            lengths.append(torch.cat([of_towers[number]["length"] for of_towers in kept]))
        return states, torch.stack(lengths, dim=1)

    def _of_clip(self, clip: Any) -> list[dict[str, Tensor]]:
        """Return what is kept of a clip for each tower, after encoding it where it is not."""
        name = self.digests.of(clip)
        kept = self._kept(name)
        if kept is not None:
            return kept
        if self.towers is None or get_worker_info() is not None:
            raise ValueError(
                f"states of every clip must be kept in {self.folder}: prepare(samples) encodes those that are "
                "missing or damaged, got none of a clip"
            )
        features, lengths = self.processor.audio_features([clip])
        self._encode([name], features, lengths)
        kept = self._kept(name)
        assert kept is not None
        return kept

    def _kept(self, name: str) -> list[dict[str, Tensor]] | None:
        """Return what is kept of a clip for each tower; None where one is missing or damaged."""
        kept = []
        for files in self.files:
            tensors = files.load(name)
            if tensors is None:
                return None
            kept.append(tensors)
        return kept

    def _encode_all(
        self, clips: Sequence[tuple[str, Any]], batch_size: int, num_workers: int, progress: bool
    ) -> dict[str, str]:
        """Encode clips, and return by name what is wrong with those that cannot be decoded."""
        broken: dict[str, str] = {}
        if not clips:
            return broken
        decoding: Any = Decoding(self.processor)
        loader: Any = DataLoader(clips, batch_size, collate_fn=decoding, num_workers=num_workers)  # type: ignore[arg-type]
        with tqdm(total=len(clips), desc="clips encoded", disable=None if progress else True) as shown:
            for names, features, lengths, faults in loader:
                if names:
                    self._encode(names, features, lengths, batch_size)
                broken |= faults
                shown.update(len(names) + len(faults))
        return broken

    @torch.no_grad()
    def _encode(
        self, names: Sequence[str], features: Sequence[Tensor], lengths: Tensor, batch_size: int = BATCH_SIZE
    ) -> None:
        """Encode clips, ``batch_size`` of their windows at once, and keep their states."""
        assert self.towers is not None
        of_towers = zip(self.towers, features, lengths.unbind(1), self.windows, self.is_cut, self.files, strict=True)
        for tower, windows, valid, window, is_cut, files in of_towers:
            device = next(tower.parameters()).device
            encoded = encode(tower, windows.to(device), batch_size).cpu()
            of_windows, counts = window_lengths(valid, window, len(encoded))
            stops = of_windows.tolist() if is_cut else [None] * len(encoded)
            parts = [states[:stop] for states, stop in zip(encoded, stops, strict=True)]
            for name, length, count in zip(names, valid, counts or [1] * len(names), strict=True):
                states = self._in_dtype(torch.cat(parts[:count]))
                parts = parts[count:]
                files.save(name, {"states": states, "length": length.reshape(1)})

    def _in_dtype(self, states: Tensor) -> Tensor:
        """Return states in the dtype that they are kept in, after checking that they fit."""
        if self.dtype is None:
            return states
        converted = states.to(self.dtype)
        if not bool(converted.isfinite().all()):
            raise ValueError(f"dtype must hold all states, got {self.dtype} for {float(states.abs().max()):g}")
        return converted


class Decoding:
    """Makes features of named clips, in a loader's workers, and says which clips cannot be decoded."""

    def __init__(self, processor: PalProcessor) -> None:
        self.processor = processor

    def __call__(
        self, clips: Sequence[tuple[str, Any]]
    ) -> tuple[list[str], list[Tensor], Tensor | None, dict[str, str]]:
        """Return the names of the clips that can be decoded, their features and lengths, and the others' faults."""
        faults: dict[str, str] = {}
        try:
            features, lengths = self.processor.audio_features([clip for _, clip in clips])
        except AudioError:
            for name, clip in clips:
                try:
                    self.processor.audio_features([clip])
                except AudioError as error:
                    faults[name] = one_line(error)
            clips = [(name, clip) for name, clip in clips if name not in faults]
            if not clips:
                return [], [], None, faults
            features, lengths = self.processor.audio_features([clip for _, clip in clips])
        return [name for name, _ in clips], features, lengths, faults
