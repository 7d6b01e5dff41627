"""The allocation tracker against memory counted by hand and against PyTorch's own allocator records."""

from pathlib import Path

import pytest
import torch
from support.profiled import peak_by_the_profiler
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from palkernels.bench.instruments.memory import AllocationTracker

F32 = 4  # bytes


def test_counts_what_is_alive_together() -> None:
    with AllocationTracker() as tracker:
        a = torch.zeros(100)
        b = a + 1
        c = b * 2
        assert tracker.current_bytes == 300 * F32
        del a, b
        assert tracker.current_bytes == 100 * F32
        d = c.sum()
    report = tracker.report()
    assert report.peak_bytes == report.peak_above_static_bytes == 300 * F32
    assert report.end_bytes == (c.numel() + d.numel()) * F32


def test_temporaries_are_freed_when_python_drops_them() -> None:
    with AllocationTracker() as tracker:
        kept = (torch.zeros(100) + 1).exp().sum()
    # At most two at once: an operation's input and its output.
    assert tracker.report().peak_bytes == 200 * F32
    assert tracker.report().end_bytes == kept.nbytes


def test_views_and_in_place_operations_allocate_nothing() -> None:
    with AllocationTracker() as tracker:
        a = torch.zeros(10, 10)
        views = [a.t(), a[2:], a.view(-1), a.detach(), a.expand(3, 10, 10)]
        a.add_(1).mul_(a)
        assert tracker.current_bytes == 100 * F32
        del a
        assert tracker.current_bytes == 100 * F32  # a view keeps the storage
        views.clear()
        assert tracker.current_bytes == 0
    assert tracker.report().peak_bytes == 100 * F32


def test_a_resized_storage_counts_with_its_new_size() -> None:
    with AllocationTracker() as tracker:
        a = torch.zeros(10)
        a.resize_(1000)
        assert tracker.current_bytes == 1000 * F32
        out = torch.empty(0)
        torch.add(a, 1, out=out)
        assert tracker.current_bytes == 2000 * F32
        del a
    assert tracker.report().end_bytes == out.nbytes


def test_what_existed_before_counts_only_if_static() -> None:
    before, weight = torch.zeros(100), torch.zeros(50)
    with AllocationTracker(static=[weight, weight[:3]]) as tracker:
        kept = before[:10].view(-1)
        result = before.add_(1) + 1
    report = tracker.report()
    assert report.peak_bytes == (weight.numel() + result.numel()) * F32
    assert report.peak_above_static_bytes == result.nbytes
    del kept


def test_counts_one_device_type() -> None:
    with AllocationTracker(device="cuda") as elsewhere, AllocationTracker(device="cpu") as here:
        kept = torch.zeros(10) + 1
    assert elsewhere.report().peak_bytes == 0
    assert here.report().peak_bytes == 2 * kept.nbytes


def test_fake_tensors() -> None:
    with FakeTensorMode(), AllocationTracker() as tracker:
        a = torch.empty(2**40)
        b = a.view(2**20, 2**20) + 1
        del a, b
    assert tracker.report().peak_bytes == 2 * 2**40 * F32
    assert tracker.report().end_bytes == 0


def test_breakdown_of_a_training_step() -> None:
    """The names sum to the peak: what is given, what an operation's tensors are named, what a backward pass needs."""
    n, d, h, o = 64, 8, 512, 4
    x, w1, w2 = torch.randn(n, d), nn.Parameter(torch.randn(d, h)), nn.Parameter(torch.randn(h, o))

    with AllocationTracker(static=[w1, w2]) as tracker:
        loss = ((x @ w1).relu() @ w2).exp().sum()
        tracker.mark()
        loss.backward()  # type: ignore[no-untyped-call]
    parts = {"parameters": [w1, w2], "gradients": [w1.grad, w2.grad]}
    found = tracker.breakdown(parts, kept_at=0)
    assert sum(found.values()) == tracker.report().peak_bytes
    # At the peak: the gradients of relu's input and output beside its saved output.
    assert found["parameters"] == (d * h + h * o) * F32
    assert found["activations"] == (n * h + 1) * F32
    assert found["temporaries"] >= 2 * n * h * F32
    assert found["gradients"] == h * o * F32  # the other one is made later
    first = tracker.breakdown(parts, segments=(0, 0))
    assert "gradients" not in first
    assert sum(first.values()) < tracker.report().peak_bytes


def test_names_of_an_operations_results() -> None:
    with AllocationTracker(name=lambda func, args, x: "sums" if func is torch.ops.aten.add.Tensor else None) as tracker:
        kept = [torch.zeros(10) + 1, torch.zeros(20)]
    assert tracker.breakdown({}) == {"sums": 10 * F32, "temporaries": 20 * F32}
    assert tracker.breakdown({"given": kept[1:]}) == {"sums": 10 * F32, "given": 20 * F32}


def test_scratch_counts_while_its_operation_runs() -> None:
    a = torch.randn(10)
    with AllocationTracker(scratch=lambda func, args: 1000 if func is torch.ops.aten.exp.default else 0) as tracker:
        kept = a.exp() + 1
    assert tracker.report().peak_bytes == a.nbytes + 1000
    assert tracker.report().end_bytes == kept.nbytes


def test_training_step_of_an_mlp() -> None:
    """x (n, d) -> relu(x w1) w2 -> sum, all storages written down."""
    n, d, h, o = 64, 8, 32, 4
    x, w1, w2 = torch.randn(n, d), nn.Parameter(torch.randn(d, h)), nn.Parameter(torch.randn(h, o))
    with AllocationTracker(static=[w1, w2]) as tracker:
        loss = ((x @ w1).relu() @ w2).sum()
        after_forward = tracker.current_bytes
        loss.backward()  # type: ignore[no-untyped-call]
    report = tracker.report(static=[w1.grad, w2.grad])
    static = d * h + h * o
    activation, output, scalar = n * h, n * o, 1
    # Saved for the backward: the relu's output. x and the weights existed; the gradient of a sum is a view.
    assert after_forward == (static + activation + scalar) * F32
    # Backward: d(output) is an expanded scalar. The gradient of relu's output joins the saved activation and w2's
    # gradient; then the gradient of relu's input is made from both.
    peaks_above = [
        2 * activation,  # forward: relu's input and output
        activation + output + scalar,  # forward: the second product
        3 * activation + 2 * scalar,  # backward of relu, with the loss and its gradient
    ]
    assert report.peak_above_static_bytes == max(peaks_above) * F32
    assert report.end_bytes == (2 * static + scalar) * F32


def test_both_gradients_of_a_tied_weight_are_static(tmp_path: Path) -> None:
    rows, width, tokens = 500, 8, 4
    weight, ids = nn.Parameter(torch.randn(rows, width)), torch.arange(tokens)

    def step() -> None:
        nn.functional.linear(nn.functional.embedding(ids, weight), weight).sum().backward()  # type: ignore[no-untyped-call]

    expected = peak_by_the_profiler(step, tmp_path)
    weight.grad = None
    with AllocationTracker(static=[weight]) as tracker:
        step()
    report = tracker.report(static=[weight.grad])
    size = rows * width * F32
    logits, hidden = rows * tokens * F32, tokens * width * F32
    # Total: the weight, its two gradients and their sum: the first is a transposed view, so nothing is in place.
    assert 4 * size <= report.peak_bytes < 4.1 * size
    assert report.peak_bytes - size == expected
    # Above: no gradient at all, but the logits beside the hidden states.
    assert report.peak_above_static_bytes <= logits + 2 * hidden + 3 * F32
    assert report.end_bytes == 2 * size


def test_a_sum_of_the_parameters_shape_that_is_no_gradient_counts() -> None:
    shape = (64, 64)
    weight = nn.Parameter(torch.randn(shape))
    x = torch.randn(shape, requires_grad=True)
    with AllocationTracker(static=[weight]) as tracker:
        y = x * weight
        (y.sin() + y.cos()).sum().backward()  # type: ignore[no-untyped-call]
    report = tracker.report(static=[weight.grad])
    size = 64 * 64 * F32
    # y, sin(y)'s and cos(y)'s gradients and x's own gradient all have the weight's size; none is the weight's.
    assert report.peak_above_static_bytes >= 3 * size
    assert report.end_bytes >= 4 * size


def test_gradients_summed_in_place_take_no_third_block(tmp_path: Path) -> None:
    """Under a dispatch mode the engine does not sum in place; a tracker that counted what it sees would be off."""
    x, other = torch.randn(100, 100, requires_grad=True), torch.randn(100, 100)

    def step() -> None:
        h = x * 2
        ((h * other).sum() + (h * other).sum() + (h * other).sum()).backward()  # type: ignore[no-untyped-call]

    expected = peak_by_the_profiler(step, tmp_path)
    x.grad = None
    with AllocationTracker() as tracker:
        step()
    assert tracker.report().peak_bytes == pytest.approx(expected, abs=64)  # a few scalars


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_allocator_on_a_language_model(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=3000,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, 3000, (2, 48))

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    expected = peak_by_the_profiler(step, tmp_path)
    optimizer.zero_grad(set_to_none=True)
    states = [state for values in optimizer.state.values() for state in values.values()]
    static = [*model.parameters(), *states]
    with AllocationTracker(static=static) as tracker:
        step()
    before = sum(tensor.nbytes for tensor in static)
    # The rest is scratch inside kernels, which never becomes a tensor.
    assert tracker.report().peak_bytes - before == pytest.approx(expected, rel=0.01)
