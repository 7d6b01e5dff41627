"""Batches of like length: their order, on one process and on several, and where training is resumed."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from support.audio_llm import entry
from support.samples import model_and_processor, said, sample
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer, TrainingArguments

from palkernels.model.data.buckets import LengthBuckets
from palkernels.model.data.collator import Collator
from palkernels.model.data.mixture import Mixture

LENGTHS = torch.randint(1, 1000, (1003,), generator=torch.Generator().manual_seed(0)).tolist()


def batches(sampler, size=8):
    return list(BatchSampler(sampler, size, drop_last=False))


def padding(found):
    """How many of what batches hold is padding."""
    return sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in found) - sum(LENGTHS)


def test_batches_are_of_like_length():
    found = batches(LengthBuckets(LENGTHS, 8))
    assert sorted(i for batch in found for i in batch) == list(range(1003))
    shuffled = torch.randperm(1003, generator=torch.Generator().manual_seed(0)).tolist()
    assert padding(found) < 0.1 * padding(batches(shuffled))
    assert LENGTHS.index(max(LENGTHS)) in found[0]
    sizes = [LENGTHS[batch[0]] for batch in found[1:-1]]
    assert sizes != sorted(sizes)
    assert sizes != sorted(sizes, reverse=True)


def test_seed_and_epoch_decide():
    sampler, again, other = LengthBuckets(LENGTHS, 8), LengthBuckets(LENGTHS, 8), LengthBuckets(LENGTHS, 8, seed=1)
    first = list(sampler)
    assert list(sampler) == list(again) == first != list(other)
    sampler.set_epoch(3)
    assert list(sampler) != first
    again.set_epoch(3)
    assert list(again) == list(sampler)
    assert {frozenset(batch) for batch in batches(sampler)} != {frozenset(batch) for batch in batches(first)}


def test_what_is_left_over():
    """It is any sample, not always the shortest, and left out if asked."""
    sampler = LengthBuckets(LENGTHS, 8, drop_last=True)
    left = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler)) == 1000
        left.append(set(range(1003)) - set(sampler))
    assert len(set().union(*left)) > 10
    for size in (1003, 2000):  # no whole batch, or one
        assert sorted(LengthBuckets(LENGTHS, size)) == list(range(1003))


def loader_of(process, processes, size):
    sampler = LengthBuckets(LENGTHS[:1000], 8)
    loader = DataLoader(range(1000), size, sampler=sampler, collate_fn=list)
    return prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)


def test_two_processes_train_on_the_samples_of_one():
    """In each step, through accelerate's own division of batches."""
    one = loader_of(0, 1, 8)
    two = [loader_of(process, 2, 4) for process in range(2)]
    for epoch in range(2):
        for loader in (one, *two):
            loader.set_epoch(epoch)
        steps = list(one)
        assert len(steps) == 125
        assert [first + second for first, second in zip(*map(list, two), strict=True)] == steps


def mixture_of():
    parts = [[sample(answer=f"{name}{'x' * (7 * i % 11)}{i}") for i in range(16)] for name in "ab"]
    return Mixture(parts, [0.5, 1.0])


def lengths_of(samples):
    return [len(answer) for answer in said(samples)]


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_skips_what_has_been_seen(processes):
    """In the middle of a later epoch; accelerate then tells the epoch to the dataset alone."""

    def loaders():
        mixture = mixture_of()
        sampler = LengthBuckets(mixture.lengths(lengths_of), 8)
        for process in range(processes):
            loader = DataLoader(mixture, 8 // processes, sampler=sampler, collate_fn=said)
            yield prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)

    for whole, resumed in zip(loaders(), loaders(), strict=True):
        for epoch in range(3):
            whole.set_epoch(epoch)
            want = list(whole)
        assert len(want) == 3
        resumed = skip_first_batches(resumed, 1)
        resumed.set_epoch(2)
        assert list(resumed) == want[1:]


class Seen(Collator):
    """Notes what it makes batches of."""

    def __call__(self, samples):
        self.seen.append(said(samples))
        return super().__call__(samples)


class BucketTrainer(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return LengthBuckets(self.train_dataset.lengths(lengths_of), 4, seed=3)


def test_a_trainer_that_is_resumed(tmp_path):
    def train(folder, steps, resume=None):
        torch.manual_seed(0)
        model, processor = model_and_processor(entry("sslam"))
        collate = Seen(processor)
        collate.seen = []
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, save_steps=8, report_to=[], disable_tqdm=True,
            use_cpu=True, remove_unused_columns=False, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = BucketTrainer(model, arguments, train_dataset=mixture_of(), data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return collate.seen[:steps], model.state_dict()

    want, weights = train(tmp_path / "whole", 15)
    assert sorted(answer for batch in want[:6] for answer in batch) != sorted(
        answer for batch in want[6:12] for answer in batch
    )
    begun, _ = train(tmp_path / "broken", 8)
    rest, resumed = train(tmp_path / "broken", 15, str(tmp_path / "broken" / "checkpoint-8"))
    assert begun + rest[:7] == want
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_what_is_refused():
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        LengthBuckets(LENGTHS, 0)
    with pytest.raises(ValueError, match="lengths must be of at least one batch, got 0"):
        LengthBuckets([], 4)
    with pytest.raises(ValueError, match="lengths must be of at least one batch, got 3 for batches of 4"):
        LengthBuckets([1, 2, 3], 4, drop_last=True)
