"""FLOPs and bytes: of single operations by hand, of whole methods by closed formulas."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.profiled import peak_by_the_profiler
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, scaled_dot_product_attention

from palkernels import audio_kv
from palkernels.bench.experiments.valueless import ValuelessModel
from palkernels.bench.instruments.costs import CostCounter, Costs
from palkernels.bench.instruments.memory import AllocationTracker
from palkernels.bench.instruments.rates import GPUS
from palkernels.bench.methods import DEFAULT_METHODS, METHODS
from palkernels.bench.presets import plan_llm
from palkernels.op_costs import plain_function, scratch_bytes

F32 = 4  # bytes


def costs_of(work: Callable[[], Any]) -> Costs:
    with CostCounter() as counter:
        work()
    return counter.segments[0]


def test_a_product() -> None:
    a, b = torch.randn(30, 20), torch.randn(20, 10)
    costs = costs_of(lambda: a @ b)
    assert costs["other_flops"] == 2 * 30 * 20 * 10
    assert costs["attention_flops"] == 0
    assert costs["bytes"] == (600 + 200 + 300) * F32
    assert costs["kernels"] == 1
    for key, gpu in GPUS.items():
        assert costs[key] == max(
            12_000 / (0.8 * gpu.published.flops_per_second), 4400 / (0.9 * gpu.published.bytes_per_second)
        )


@pytest.mark.parametrize(
    ("work", "elements"),
    [
        (lambda x: x.t()[2:].view(torch.float32).unsqueeze(0).expand(3, -1, -1), 0),
        (lambda x: x + 1, 2 * 200),
        (lambda x: x.add_(1), 2 * 200),
        (lambda x: x.zero_(), 200),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x[:, :1].expand(20, 10) * 2, 20 + 200),  # an expanded tensor is read once
        (lambda x: embedding(torch.tensor([1, 4]), x), 2 * 20),  # two rows of twenty
        (lambda x: x.index_select(0, torch.tensor([3])), 2 * 10),
        (lambda x: torch.cat([x, x]), 2 * 400),
        (lambda x: torch.arange(5) * 3, 0),
    ],
)
def test_bytes(work: Callable[[Tensor], Any], elements: int) -> None:
    costs = costs_of(lambda: work(torch.randn(20, 10)))
    made = costs_of(lambda: torch.randn(20, 10))
    assert costs["bytes"] - made["bytes"] == elements * F32


def test_a_loss_reads_one_probability_of_each_row() -> None:
    logits, labels = torch.randn(6, 1000), torch.zeros(6, dtype=torch.long)
    assert costs_of(lambda: cross_entropy(logits, labels))["bytes"] < 2.1 * logits.nbytes  # log_softmax


@pytest.mark.parametrize(
    ("work", "kernels"),
    [
        (lambda x: x.t()[2:].view(torch.float32).unsqueeze(0).expand(3, -1, -1), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x[:0] + 1, 0),  # nothing to compute
        (lambda x: x.add_(1).relu(), 2),
        (lambda x: torch.arange(5) * 3, 2),  # integers are launched too
        (lambda x: x.sum().item(), 2),  # a sum, and a copy to the host
    ],
)
def test_launches(work: Callable[[Tensor], Any], kernels: int) -> None:
    costs = costs_of(lambda: work(torch.randn(20, 10)))
    assert costs["kernels"] == 1 + kernels
    assert costs["our_kernels"] == 0


@pytest.mark.parametrize(("causal", "pairs"), [(True, 7 * 8 // 2), (False, 7 * 7)])
def test_attention_of_pytorch(causal: bool, pairs: int) -> None:
    """What a causal mask hides is not computed; the backward pass computes the scores again."""
    query, key = (torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2))
    out: list[Tensor] = []
    with CostCounter() as counter:
        out.append(scaled_dot_product_attention(query, key, key, is_causal=causal, enable_gqa=True))
        counter.mark()
        out[0].sum().backward()  # type: ignore[no-untyped-call]
    forward, backward = counter.segments
    assert forward["attention_flops"] == 4 * 2 * 4 * 8 * pairs
    assert backward["attention_flops"] == 10 * 2 * 4 * 8 * pairs


@pytest.mark.parametrize(("layers", "impl"), [(1, "triton"), (3, "triton"), (1, "sdpa"), (3, "sdpa")])
def test_scratch_of_our_projection(layers: int, impl: str, tmp_path: Path) -> None:
    """What the operator allocates for itself, which no dispatch shows, is what the formula says, or what its function
    does in its place."""
    states, norm = torch.randn(2, 200, 64), torch.ones(64)
    weights = [torch.randn(32, 64) for _ in range(2 * layers)]
    given: dict[str, Any] = {"norm_weight": [norm] * layers, "k_weight": weights[:layers], "v_weight": weights[layers:]}

    def work() -> Any:
        return audio_kv(states, **given, num_kv_heads=2, eps=1e-5, impl=impl)

    work()  # what is made once
    with torch.no_grad():
        found = peak_by_the_profiler(work, tmp_path)
        with AllocationTracker(scratch=scratch_bytes, inside=plain_function) as tracker:
            kept = work()
    assert tracker.report().peak_bytes == pytest.approx(found, rel=0.01)
    del kept


@dataclass(frozen=True)
class Sizes:
    """Of a model with `layers` layers: products with weights per token, and the width of all query heads."""

    layers: int
    width: int
    others: int  # query, output and FFN weights of a layer
    keys: int  # key and value weights
    vocab: int
    queries: int
    encoder: int


def sizes_of(valueless: ValuelessModel) -> Sizes:
    config = valueless.model.config
    head_dim = config.head_dim
    queries, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    others = 2 * config.hidden_size * queries + 3 * config.hidden_size * config.intermediate_size
    keys = 2 * config.hidden_size * kv
    return Sizes(
        config.num_hidden_layers, config.hidden_size, others, keys, config.vocab_size, queries, valueless.width
    )


ROWS, TEXT, AUDIO, NEW = 3, 16, 50, 6


def formula(name: str, mode: str, size: Sizes) -> tuple[float, float]:
    """FLOPs of attention and of all other products."""
    method = METHODS[name]
    connected = method.in_sequence(AUDIO) if name == "plits-pooled" else AUDIO
    in_sequence, keys = method.in_sequence(AUDIO), method.as_keys(AUDIO)
    tokens = TEXT + in_sequence
    pairs = tokens * keys + tokens * (tokens + 1) / 2
    if name == "lal-eager":
        pairs = TEXT * (AUDIO + TEXT)  # behind a mask, all are computed
    layers = size.layers * (tokens * (size.others + size.keys) + keys * size.keys)
    first, second = connected * size.encoder * size.width, connected * size.width**2
    if mode == "train":
        logits = tokens if name in ("plits", "plits-pooled") else TEXT
        head = logits * size.width * size.vocab
        # Forward 2, backward 4; the encoder's states get no gradient.
        attention, other = 14.0 * size.layers * size.queries * pairs, 6 * (layers + head + second) + 4 * first
    else:
        steps = NEW - 1
        decoded = pairs + sum(tokens + keys + step for step in range(1, NEW))
        head = size.width * size.vocab * (1 + steps)
        layers += size.layers * steps * (size.others + size.keys)
        attention, other = 4.0 * size.layers * size.queries * decoded, 2.0 * (layers + head + first + second)
    if name == "flamingo":
        more = flamingo_formula(mode, size)
        attention, other = attention + more[0], other + more[1]
    return ROWS * attention, ROWS * other


def flamingo_formula(mode: str, size: Sizes) -> tuple[float, float]:
    """The one layer that a model of two gets: attention of the text to the audio, and an FFN four times as wide."""
    audio = 2 * AUDIO * size.width * size.queries
    per_token = 2 * size.width * size.queries + 8 * size.width**2
    if mode == "train":
        seen, hidden = TEXT * AUDIO, TEXT * (TEXT + 1) / 2  # the text's own keys are there, and seen by none
        attention = 2 * size.queries * (7 * seen + 5 * hidden)  # without their gradients
        return attention, 6 * (audio + TEXT * per_token)
    steps = NEW - 1
    pairs = TEXT * AUDIO + TEXT * (TEXT + 1) / 2 + steps * (AUDIO + 1)
    return 4 * size.queries * pairs, 2 * (audio + (TEXT + steps) * per_token)


@pytest.fixture(scope="module")
def valueless() -> ValuelessModel:
    return ValuelessModel(plan_llm("llama-3.2-1b", 2), torch.bfloat16)


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in DEFAULT_METHODS for mode in ("train", "infer")])
def test_flops_by_closed_formulas(name: str, mode: str, valueless: ValuelessModel) -> None:
    method = METHODS[name]
    if mode == "train":
        costs = valueless.train(method, AUDIO, TEXT, ROWS).costs
    else:
        costs = valueless.infer(method, AUDIO, TEXT, ROWS, NEW).costs
    attention, other = formula(name, mode, sizes_of(valueless))
    assert costs["attention_flops"] == attention
    assert costs["other_flops"] == pytest.approx(other, rel=1e-5)  # and the angles of RoPE


@pytest.mark.parametrize(("name", "more"), [("lal-recompute", "keys"), ("lal-checkpoint", "layers")])
def test_levers_compute_again_what_they_do_not_keep(name: str, more: str, valueless: ValuelessModel) -> None:
    plain, lever = (valueless.train(METHODS[x], AUDIO, TEXT, ROWS).costs for x in ("lal", name))
    size = sizes_of(valueless)
    again = 2 * ROWS * size.layers * AUDIO * size.keys
    if more == "layers":
        last = size.width * valueless.model.config.intermediate_size  # a layer's output is not needed again
        again += 2 * ROWS * size.layers * TEXT * (size.others + size.keys - last)
    assert lever["other_flops"] - plain["other_flops"] == pytest.approx(again, rel=1e-3)
