"""Which clips can be decoded to their end: a header does not tell what is damaged within."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from palkernels.model.audio.limits import AudioError
from palkernels.model.audio.waveforms import waveform
from palkernels.model.data.reasons import UNREADABLE, RejectedError
from palkernels.model.data.sample import Sample
from palkernels.model.data.samples import Samples
from palkernels.model.encoders.registry import TOWERS
from palkernels.model.pal.parts import tower_settings
from palkernels.model.pal.processing_pal import PalProcessor

__all__ = ["decodable"]

CLIPS = 8  # that a process decodes before it says how they are


def decodable(
    samples: Sequence[Sample],
    processor: PalProcessor,
    *,
    num_workers: int = 0,
    progress: bool = False,
    place: tuple[int, int] = (0, 1),
    gather: Callable[[list[Any]], list[Any]] = list,
) -> Samples:
    """Return the samples whose clips can be decoded to their end; the others are among ``dropped``.

    Each clip is decoded once, as batches decode it, and forgotten. Of rows that pass, no batch fails later.

    Args:
        samples: Samples with clips or without.
        processor: The model's, whose limits count.
        num_workers: Processes that decode.
        progress: Whether to show how far it is, where the output is a terminal.
        place: This process's number, and how many there are that share the clips out.
        gather: Returns the items of all processes' lists, as accelerate's ``gather_object`` does.

    Raises:
        ValueError: No sample is left.
    """
    distinct = {_key(clip): clip for sample in samples for clip in sample.clips()}
    rank, world = place
    own = dict(list(enumerate(distinct.values()))[rank::world])  # by numbers that are the same in every process
    keys = list(distinct)
    found = _faults(own, processor, num_workers, progress)
    faults = {keys[number]: fault for of_process in gather([found]) for number, fault in of_process.items()}

    def why_not(sample: Sample) -> RejectedError | None:
        fault = next((faults[key] for key in map(_key, sample.clips()) if key in faults), None)
        return None if fault is None else RejectedError(UNREADABLE, fault)

    if not isinstance(samples, Samples):
        samples = Samples(samples)
    result = Samples.sifted(samples, why_not, samples.dropped, samples.lengths)
    if not len(result):
        first = f": {result.dropped[-1].detail}" if result.dropped else ""
        raise ValueError(f"samples must hold at least one whose clips can be read, got {result.summary()}{first}")
    return result


def _faults(clips: Mapping[int, Any], processor: PalProcessor, num_workers: int, progress: bool) -> dict[int, str]:
    """Return what is wrong with clips that cannot be decoded, by their numbers."""
    found: dict[int, str] = {}
    if not clips:
        return found
    loader: Any = DataLoader(list(clips.values()), CLIPS, collate_fn=_Faults(processor), num_workers=num_workers)  # type: ignore[arg-type]
    numbers = iter(clips)
    with tqdm(total=len(clips), desc="clips decoded", disable=None if progress else True) as shown:
        for of_batch in loader:
            # The batch first: zip would take a number more, and lose it.
            found.update((number, fault) for fault, number in zip(of_batch, numbers, strict=False) if fault is not None)
            shown.update(len(of_batch))
    return found


class _Faults:
    """Says of clips, in a loader's workers, what is wrong with each; None: nothing."""

    def __init__(self, processor: PalProcessor) -> None:
        settings = tower_settings(processor.encoders)
        self.rates = sorted({TOWERS[name].make_features(config).sampling_rate for name, config in settings})
        self.limits: dict[str, Any] = {"max_seconds": processor.longest_clip, "max_bytes": processor.max_bytes}

    def __call__(self, clips: Sequence[Any]) -> list[str | None]:
        return [self._of(clip) for clip in clips]

    def _of(self, clip: Any) -> str | None:
        try:
            for rate in self.rates:
                waveform(clip, None, rate, **self.limits)
        except AudioError as error:
            return str(error)
        return None


def _key(clip: Any) -> Any:
    """Return what tells a clip from others: its path, or the object that it is."""
    return clip if isinstance(clip, str) else id(clip)
