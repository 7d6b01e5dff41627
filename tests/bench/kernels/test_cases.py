"""The microbenchmark's cases: what they count, their inputs, and peers that compute the same."""

import contextlib
import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from support import gluon
from torch.nn.functional import scaled_dot_product_attention

from palkernels.bench.errors import UserError
from palkernels.bench.instruments import timing
from palkernels.bench.instruments.rates import Rates
from palkernels.bench.kernels import measurement, peers
from palkernels.bench.kernels.cases import ALL_OPS, Case, model_cases, shape_case
from palkernels.bench.kernels.measurement import relative_error
from palkernels.kernels import tiles
from palkernels.kernels.launch import Launch

CPU = torch.device("cpu")
SHAPE = "1,4,2,9,20,16"


H200 = Rates(790e12, 4.3e12)  # as measured
# Microseconds at these rates, with 512, 1500 and 3000 audio tokens.
LIMITS = {
    ("llama-3.2-1b", "forward"): (6.1, 16.6, 32.5),
    ("llama-3.2-1b", "backward"): (15.3, 41.5, 81.4),
    ("llama-3.2-1b", "decode"): (3.7, 9.3, 17.9),
    ("llama-3.2-3b", "forward"): (9.2, 24.9, 48.8),
    ("llama-3.2-3b", "backward"): (23.0, 62.3, 122.0),
    ("llama-3.2-3b", "decode"): (7.3, 18.6, 35.8),
}


@pytest.mark.parametrize(("model", "op"), LIMITS)
def test_limits(model, op):
    """By hand: 4 B Hq D (T N + T (T + 1) / 2) operations forward, 2.5 times as many backward; decoding by its bytes."""
    cases = model_cases(model, (op,), (512, 1500, 3000), torch.bfloat16, torch.device("cuda", 0))
    limits = [case.limit(H200) * 1e6 for case in cases]
    assert limits == pytest.approx(LIMITS[model, op], abs=0.06)


def test_projections_count_their_products_and_bytes():
    case = shape_case("audio_kv_layers", "2,4,2,9,20,16", torch.bfloat16, CPU)
    rows, width, projected, layers = 2 * 20, 64, 32, 16
    assert case.flops == layers * 2 * (2 * rows * width * projected)
    assert case.bytes == 2 * (rows * width + layers * 2 * (projected * width + rows * projected))


@pytest.mark.parametrize("op", ALL_OPS)
def test_truth_is_the_definition_in_float64(op):
    case = shape_case(op, SHAPE, torch.float32, CPU)
    inputs = case.inputs(3)
    truth = case.truth(inputs)
    found = case.with_its_gradients(inputs, lambda given: case.ours(given, "sdpa"))
    assert {x.dtype for x in truth} == {torch.float64}
    assert len(truth) == {"backward": 6, "both": 6, "audio_kv": 2, "audio_kv_layers": 32}.get(op, 1)
    assert relative_error(found, truth) < 1e-5


def test_audio_in_eight_bits_has_half_the_bytes():
    """But for text, queries and scales, which take as many as before; the FLOPs are the same."""
    decode, eight_bits = (shape_case(op, "2,4,2,9,1500,64", torch.bfloat16, CPU) for op in ("decode", "decode_fp8"))
    assert decode.bytes - eight_bits.bytes == 2 * 2 * 2 * 1500 * 64 - 2 * 2 * 2 * 4
    assert decode.flops == eight_bits.flops
    inputs = eight_bits.inputs(1)
    audio = [inputs[name].nbytes for name in ("audio_key", "audio_value", "audio_key_scale", "audio_value_scale")]
    assert sum(audio) == 2 * 2 * 2 * (1500 * 64 + 4)


def test_a_case_has_fresh_inputs_for_each_seed():
    case = shape_case("forward", SHAPE, torch.float32, CPU)
    first, same, other = (case.inputs(seed)["audio_key"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("op", ["forward", "backward", "both", "decode", "audio_kv"])
def test_inputs_alone_exceed_the_cache(monkeypatch, op):
    """Whatever else a call writes and an operation counts as its bytes."""
    wanted = 10 * 2**20
    monkeypatch.setattr(timing, "num_buffers", lambda size, device: int(wanted // size) + 1)
    case = shape_case(op, "2,4,2,64,300,64", torch.float32, CPU)
    sets = []
    make = Case.inputs
    monkeypatch.setattr(Case, "inputs", lambda self, seed: sets.append(make(self, seed)) or sets[-1])
    measurement.calls_on_sets(case, lambda inputs: [])
    tensors = [tensor for inputs in sets for tensor in torch.utils._pytree.tree_leaves(inputs)]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert wanted < sum(tensor.nbytes for tensor in tensors) <= 2 * wanted


@pytest.mark.parametrize("op", ["forward", "backward", "decode"])
@pytest.mark.parametrize("key", ["sdpa-flash", "sdpa-efficient", "two-sdpa", "flex"])
def test_peers_compute_the_same(monkeypatch, key, op):
    """As far as a CPU has their kernels: the mask is right, and the groups of heads."""
    if key == "flex" and op == "backward":
        pytest.skip("no FlexAttention backward on a CPU")
    monkeypatch.setattr(peers, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = shape_case(op, "2,4,2,9,20,16", torch.float32, CPU)
    peer = next(peer for peer in peers.PEERS if peer.key == key)
    found = case.with_its_gradients(case.inputs(1), peer.prepare(case))
    assert relative_error(found, case.truth(case.inputs(1))) < 1e-5


class Paged:
    """FlashInfer's wrappers of attention over pages, by their documentation, in plain PyTorch."""

    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")

    def run(self, query, cache):
        outputs = []
        for row, of_row in enumerate(query.tensor_split(self.rows[1:-1].tolist())):
            pages = self.pages[self.starts[row] : self.starts[row + 1]]
            unused = self.page_size - int(self.last[row])
            keys, values = (x[pages].flatten(0, 1)[: -unused or None].transpose(0, 1) for x in cache)
            mask = torch.ones(len(of_row), keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - len(of_row))
            given = of_row.transpose(0, 1), keys, values
            attended = scaled_dot_product_attention(*(x[None] for x in given), attn_mask=mask, enable_gqa=True)
            outputs.append(attended[0].transpose(0, 1))
        return torch.cat(outputs)


class PagedPrefill(Paged):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, causal=False, q_data_type="float16",
    ):  # fmt: skip
        assert causal
        self.rows, self.starts, self.pages = qo_indptr, paged_kv_indptr, paged_kv_indices
        self.last, self.page_size = paged_kv_last_page_len, page_size


class PagedDecode(Paged):
    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type="float16",
        kv_data_type=None,
    ):  # fmt: skip
        self.rows, self.starts, self.pages = torch.arange(len(indptr)), indptr, indices
        self.last, self.page_size = last_page_len, page_size


@pytest.mark.parametrize("shape", ["3,4,2,9,20,16", "2,4,2,12,20,16"])
@pytest.mark.parametrize("op", ["forward", "decode"])
def test_keys_in_pages(monkeypatch, op, shape):
    """Pages of one row lie anywhere, and the last one may not be full."""
    wrappers = {"BatchPrefillWithPagedKVCacheWrapper": PagedPrefill, "BatchDecodeWithPagedKVCacheWrapper": PagedDecode}
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**wrappers))
    case = shape_case(op, shape, torch.float32, CPU)
    peer = next(peer for peer in peers.PEERS if peer.key == "flashinfer-paged")
    run, inputs = peer.prepare(case), case.inputs(1)
    truth = case.truth(inputs)
    for _ in range(2):
        assert relative_error(run(inputs), truth) < 1e-5


def test_the_gluon_kernel_beside_ours(monkeypatch):
    monkeypatch.setattr(tiles, "capability", lambda device: 90)
    monkeypatch.setattr(Launch, "run", gluon.run)
    peer = next(peer for peer in peers.PEERS if peer.key == "gluon")
    case = shape_case("forward", "2,6,2,30,70,64", torch.float16, CPU)
    assert peer not in peers.peers_of(dataclasses.replace(case, device=torch.device("cuda")))  # unless it is named
    inputs = case.inputs(1)
    assert relative_error(peer.prepare(case)(inputs), case.truth(inputs)) < 2e-3
    case = shape_case("forward", "2,6,2,30,70,32", torch.float16, CPU)
    with pytest.raises(UserError, match="the head dim must be one of 64, 128, got 32"):
        peer.prepare(case)(case.inputs(1))
