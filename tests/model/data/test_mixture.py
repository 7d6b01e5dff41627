"""Several sources as one dataset: how often each sample comes, and that nothing but seed and epoch decides it."""

import pickle
import subprocess
import sys
from collections import Counter

import pytest
from support.samples import said, sample
from torch.utils.data import DataLoader

from palkernels.model.data.mixture import Mixture

PARTS = [[sample(answer=f"{name}{i}") for i in range(size)] for name, size in (("a", 10), ("b", 7), ("c", 4))]


def epochs(count, seed=0, weights=(0.5, 1.0, 2.0)):
    mixture = Mixture(PARTS, weights, seed)
    found = []
    for epoch in range(count):
        mixture.set_epoch(epoch)
        found.append(said(mixture))
    return found


def test_how_often_each_sample_comes():
    """Half of them and the other half in the next epoch; each once; each twice."""
    first, second = epochs(2)
    for epoch in (first, second):
        assert Counter(answer[0] for answer in epoch) == {"a": 5, "b": 7, "c": 8}
        assert set(Counter(answer for answer in epoch if answer[0] != "a").values()) <= {1, 2}
        assert sorted(answer for answer in epoch if answer[0] == "c") == sorted([f"c{i}" for i in range(4)] * 2)
    halves = [{answer for answer in epoch if answer[0] == "a"} for epoch in (first, second)]
    assert halves[0] | halves[1] == {f"a{i}" for i in range(10)}
    assert not halves[0] & halves[1]


@pytest.mark.parametrize("weight", [0.1, 0.3, 1.5, 2.7])
def test_no_sample_comes_twice_before_all_have_come(weight):
    mixture, seen = Mixture(PARTS[:1], [weight]), []
    for epoch in range(12):
        mixture.set_epoch(epoch)
        assert len(mixture) == round(10 * weight)
        seen += said(mixture)
        counts = Counter(seen)
        assert max(counts.values()) - min(counts[f"a{i}"] for i in range(10)) <= 1


def test_seed_and_epoch_decide():
    assert epochs(3) == epochs(3)
    assert epochs(3) != epochs(3, seed=1)
    mixture = Mixture(PARTS, [0.5, 1.0, 2.0])
    mixture.set_epoch(2)  # without the epochs before it, as when training is resumed
    assert said(mixture) == epochs(3)[2]
    program = "import sys, pickle; from support.samples import said; print(said(pickle.load(sys.stdin.buffer)))"
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(mixture), capture_output=True, check=True)
    assert done.stdout.decode().strip() == repr(epochs(3)[2])


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_that_stay_see_the_epoch(method):
    mixture = Mixture(PARTS, [0.5, 1.0, 2.0])
    loader = DataLoader(
        mixture, 4, collate_fn=said, num_workers=1, persistent_workers=True, multiprocessing_context=method
    )
    for epoch in range(2):
        mixture.set_epoch(epoch)
        assert [answer for batch in loader for answer in batch] == epochs(2)[epoch]


def test_lengths_are_of_the_epochs_samples():
    mixture, measured = Mixture(PARTS, [0.5, 1.0, 2.0]), []

    def lengths_of(samples):
        measured.extend(samples)
        return [int(answer[1:]) for answer in said(samples)]

    lengths = mixture.lengths(lengths_of)
    for epoch in (0, 1, 0):
        lengths.set_epoch(epoch)
        assert mixture.epoch == lengths.epoch == epoch
        assert list(lengths) == [int(answer[1:]) for answer in epochs(2)[epoch]]
    assert lengths[3] == list(lengths)[3]
    assert measured == [one for part in PARTS for one in part]


def test_what_is_no_mixture():
    with pytest.raises(ValueError, match=r"parts must be at least one, none of them empty, got \[10, 0\]"):
        Mixture([PARTS[0], []])
    with pytest.raises(ValueError, match="parts must be at least one"):
        Mixture([])
    with pytest.raises(ValueError, match="weights must be one for each of 3 parts, got 1"):
        Mixture(PARTS, [1.0])
    with pytest.raises(ValueError, match="weight must be a positive number, got 0"):
        Mixture(PARTS, [1.0, 1.0, 0])
    with pytest.raises(IndexError, match="index must be below 21, got 21"):
        Mixture(PARTS)[21]
    assert Mixture(PARTS)[-1] is PARTS[2][3]
