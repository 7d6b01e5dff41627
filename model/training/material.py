"""The samples of a recipe: read, with what is dropped by reason, and in the order of each stage."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from palkernels.model.audio.limits import AudioError
from palkernels.model.data.buckets import LengthBuckets
from palkernels.model.data.collator import Collator
from palkernels.model.data.decoding import decodable
from palkernels.model.data.mixture import Mixture
from palkernels.model.data.reading import read
from palkernels.model.data.reasons import UNREADABLE, RejectedError
from palkernels.model.data.sample import Sample
from palkernels.model.data.samples import Dropped, Samples
from palkernels.model.data.seeds import permutation
from palkernels.model.data.states import EncodedStates
from palkernels.model.pal import PalProcessor
from palkernels.model.training.order import Order
from palkernels.model.training.recipe import DataRecipe, Recipe, SourceRecipe, StageRecipe

__all__ = ["Material", "damage_explained", "damaged_rows", "read_material"]


class Material:
    """What there is to learn from and to evaluate on.

    Args:
        data: What the recipe says of it.
        collator: Makes batches.
        train: The samples of each source of ``data.train``.
        held_out: Those to evaluate on.
        dropped: Rows that give no sample, each with the path of its source.
    """

    def __init__(
        self,
        data: DataRecipe,
        collator: Collator,
        train: Sequence[Samples],
        held_out: Sequence[Sample],
        dropped: Sequence[tuple[str, Dropped]],
    ) -> None:
        self.data, self.collator, self.train, self.held_out, self.dropped = data, collator, train, held_out, dropped
        self._lengths: dict[int, int] = {}

    def order(self, stage: StageRecipe, seed: int) -> Order:
        """Return the samples of each step of a stage."""
        chosen = [i for i, source in enumerate(self.data.train) if source.name in stage.data]
        mixture = Mixture([self.train[i] for i in chosen], [self.data.train[i].weight for i in chosen], seed)

        def epoch(number: int) -> list[Sample]:
            mixture.set_epoch(number)
            samples = [mixture[i] for i in range(len(mixture))]
            if not self.data.buckets:
                return [samples[i] for i in permutation(len(samples), "order", seed, number).tolist()]
            buckets = LengthBuckets(self.lengths(samples), stage.batch, seed)
            buckets.set_epoch(number)
            return [samples[i] for i in buckets]

        return Order(len(mixture), epoch, stage.batch, epochs=stage.epochs, steps=stage.steps, samples=stage.samples)

    def of_states(self, states: EncodedStates, stage: str, order: Order, say: Callable[[str], None]) -> Collator:
        """Return a collator whose batches have kept states instead of clips: of the samples of a stage's order, and of
        those that are held out. It keeps them first."""
        samples = list({id(x): x for part in (*order, self.held_out) for x in part}.values())
        prepared = states.prepare(samples, num_workers=self.data.workers, progress=True)
        count = prepared.encoded + prepared.kept
        say(f"stage {stage}: states of {count:,} clips, {prepared.encoded:,} of them new")
        if prepared.samples.dropped:
            raise AudioError(prepared.samples.dropped[-1].detail)
        return Collator(
            self.collator.processor, states=states, packing=self.data.packing, max_tokens=self.data.max_tokens
        )

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        """Return how long samples are; each is measured once."""
        new = [sample for sample in samples if id(sample) not in self._lengths]
        self._lengths |= dict(zip(map(id, new), self.collator.lengths(new), strict=True))
        return [self._lengths[id(sample)] for sample in samples]

    def longest(self, stage: StageRecipe) -> Sample:
        """Return the longest of all samples of a stage."""
        chosen = [
            x
            for source, part in zip(self.data.train, self.train, strict=True)
            if source.name in stage.data
            for x in part
        ]
        lengths = self.lengths(chosen)
        return chosen[lengths.index(max(lengths))]

    def digest(self) -> str:
        """Return what changes where other samples are learnt: their rows, texts, tasks and the paths of their clips."""
        digest = hashlib.sha256()
        for part in self.train:
            for sample in part:
                row = (sample.source, sample.task, sample.messages)
                digest.update(json.dumps(row, default=_named, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def write_dropped(self, path: Path) -> None:
        """Write the rows that give no sample, a JSON object a line."""
        lines = [json.dumps({**asdict(row), "path": of}) + "\n" for of, row in self.dropped]
        path.write_text("".join(lines), encoding="utf-8")


@contextmanager
def damage_explained() -> Iterator[None]:
    """Say of a clip that cannot be decoded, here or in a worker, which row's it is and how to go on."""
    try:
        yield
    except AudioError as error:
        said = str(error).strip().splitlines()[-1]  # a worker's error has its traceback first
        said = said.removeprefix(f"{AudioError.__module__}.{AudioError.__name__}: ")
        raise AudioError(
            f"{said}: with a whole clip in its place --resume goes on; a new run with data.check drops such rows"
        ) from error


def damaged_rows(path: Path) -> set[tuple[str, str]]:
    """Return the rows with a clip that could not be read, of a file that ``write_dropped`` wrote, as (path of the
    source, place of the row)."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["path"], row["source"]) for row in rows if row["reason"] == UNREADABLE}


def read_material(
    recipe: Recipe,
    processor: PalProcessor,
    say: Callable[[str], None],
    damaged: Collection[tuple[str, str]] | None = None,
    place: tuple[int, int] = (0, 1),
) -> Material:
    """Return the samples of a recipe, after telling how many rows of each source were dropped, by reason.

    Args:
        recipe: The recipe.
        processor: The model's.
        say: Takes lines for the user.
        damaged: As :func:`damaged_rows` returns it: these rows are dropped. None: clips are decoded to find them, where
            the recipe wants it.
        place: This process's number, and how many there are: each decodes a part.

    Raises:
        ValueError: A source cannot be read, or gives no sample.
    """
    data = recipe.data
    collator = Collator(processor, packing=data.packing, max_tokens=data.max_tokens)
    read_already: dict[SourceRecipe, Samples] = {}

    def samples(source: SourceRecipe) -> Samples:
        if source not in read_already:
            rows = collator.fitting(read(source.source(), max_seconds=data.max_seconds))
            read_already[source] = whole = whole_ones(rows, source.path)
            say(f"{source.path}: {whole.summary()}")
        return read_already[source]

    def whole_ones(rows: Samples, path: str) -> Samples:
        if damaged is not None:
            fault = RejectedError(UNREADABLE, "a clip could not be read when the run began")
            return Samples.sifted(
                rows, lambda row: fault if (path, row.source) in damaged else None, rows.dropped, rows.lengths
            )
        if not data.check:
            return rows
        settings: dict[str, Any] = {"num_workers": data.workers, "progress": place[0] == 0, "place": place}
        return decodable(rows, processor, gather=gather_object, **settings)

    train, held_out = [samples(source) for source in data.train], [samples(source) for source in data.eval]
    dropped = [(source.path, row) for source, part in read_already.items() for row in part.dropped]
    return Material(data, collator, train, [sample for part in held_out for sample in part], dropped)


def _named(clip: Any) -> str:
    """Return a clip that JSON does not take by its path, or else by its kind."""
    return os.fspath(clip) if isinstance(clip, os.PathLike) else type(clip).__name__
