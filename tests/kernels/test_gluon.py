"""The Gluon forward, which no GPU of the tests runs: as `support.gluon` runs it, against float64."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch
from support import gluon
from support.thorough import cases
from support.warps import KernelError

from palkernels import lal_attention, reference
from palkernels.arguments import Call
from palkernels.attention import launches
from palkernels.kernels import division, tiles
from palkernels.kernels.gluon import choice, forward
from palkernels.kernels.launch import Launch
from palkernels.testing import fill_unreachable, lal_case, max_error

FEATURES = ("lengths", "index", "text_start", "text_end")


def laid_out(tensor, how):
    """A (B, H, T, D) tensor in memory as models have it, or within one that is NaN around it."""
    if how == "BHTD":
        return tensor.contiguous()
    if how == "BTHD":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    batch, heads, tokens, dim = tensor.shape
    around = tensor.new_full((batch, heads, tokens + 3, dim + 16), torch.nan)
    around[:, :, 2:-1, 8:-8] = tensor
    return around[:, :, 2:-1, 8:-8]


def case_of(features=FEATURES, how="BTHD", options=None, **sizes):
    """A case that the kernel takes, with NaN where nothing may be read."""
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 40, "keys": 40, "audio": 90, "dim": 64} | sizes
    case = lal_case(features=features, **{"dtype": torch.bfloat16} | sizes)
    case.options.update(options or {})
    case = fill_unreachable(case, torch.nan)
    return case._with(laid_out(x, how) for x in case.tensors)


def call_of(case):
    return Call(*case.tensors, **{"scale": case.tensors[0].shape[-1] ** -0.5} | case.options)


def check(case, seed=0, kernel=forward):
    """Run a case, and compare its output and LSE with float64's."""
    call = call_of(case)
    assert choice.reasons(call, 90) == []
    out, lse = (x.fill_(torch.nan) for x in launches.empty_outputs(call.query))
    launch = kernel.gluon_forward_launch(call, out, lse)
    gluon.run(launch, seed) if out.device.type == "cpu" else launch.run()
    exact = case.to(torch.float64)
    want, want_lse = reference.lal_attention(*exact.tensors, **exact.options, return_lse=True)
    assert max_error(lse, want_lse) <= 3e-5
    # Half an epsilon for the weights' rounding and half for the output's.
    largest = max(x.nan_to_num().abs().amax().item() for x in (case.tensors[2], case.tensors[4]) if x.numel())
    assert max_error(out, want) <= torch.finfo(out.dtype).eps * largest


def random_case(seed, variant=None, device="cpu"):
    """A case with a variant's dtype, head dim, group and features: what the kernel is compiled for."""
    choose = random.Random(seed)
    some = [feature for feature in (*FEATURES, "scale") if choose.random() < 0.6]
    chosen = choose.choice([torch.float16, torch.bfloat16]), choose.choice([64, 128]), choose.choice([1, 3, 4, 8]), some
    dtype, dim, group, features = variant or chosen
    big = device == "cuda"
    queries = choose.choice([1, 2, 9, 33, 65, 130] if group < 4 or big else [1, 2, 9, 33])
    kv_heads = choose.choice([1, 2])
    return case_of(
        features=features,
        how=choose.choice(["BHTD", "BTHD", "within"]),
        batch=choose.randint(1, 4 if big else 2),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        queries=queries,
        keys=queries + choose.choice([0, 1, 40, 130]),
        audio=choose.choice([0, 1, 63, 64, 65, 300, *[1500] * big]),
        audio_rows=choose.randint(1, 3),
        dim=dim,
        dtype=dtype,
        seed=seed,
        device=device,
    )


def test_random_cases():
    """Lengths of 0, padding on the left, rows that see nothing, one query or several tiles of them: 80 cases or 160."""
    for seed in range(cases(160)):
        check(random_case(seed), seed)


@pytest.mark.gpu
@pytest.mark.cuda_only
@pytest.mark.parametrize(
    "variant",
    [
        (torch.bfloat16, 64, 4, ()),
        (torch.bfloat16, 128, 3, ("lengths", "text_start")),
        (torch.float16, 64, 1, FEATURES),
        (torch.float16, 128, 8, ("lengths", "index", "text_end")),
    ],
    ids=str,
)
def test_random_cases_on_a_gpu(variant):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the GPU must have compute capability 9.x")
    for seed in range(100):
        case = random_case(seed, variant, "cuda")
        case.options.update({key: x.long() for key, x in case.options.items()})  # no mixture of types is compiled again
        check(case)


def test_rows_that_see_nothing():
    nothing = {"audio_lengths": torch.tensor([0]), "text_start": torch.tensor([50])}
    case = case_of(features=(), audio=70, keys=50, options=nothing)
    assert all(x.isnan().all() for x in case.tensors[1:])
    check(case)


FAR = 2**30 + 64  # twice this leaves 32 bits, but it does not itself
FAR_STRIDES = {
    "batch": (FAR, 192, 64, 1),
    "head": (192, FAR, 64, 1),
    "token": (192, 64, FAR, 1),
    "masked token": (192, 64, 2**28, 1),  # only lanes beyond the last token leave 32 bits
}


@pytest.mark.parametrize("name", FAR_STRIDES)
def test_offsets_beyond_32_bits(name):
    """Each tensor in turn has one stride that takes its offsets beyond 2^31; only the pages touched are real."""
    batch, heads, tokens = (3 if name == side else 1 for side in ("batch", "head", "token"))
    sizes = {"batch": batch, "kv_heads": heads, "queries": tokens, "keys": tokens, "audio": tokens}
    case = case_of(features=(), heads=2 * heads, dtype=torch.float16, **sizes)
    memory = torch.empty(6 * FAR, dtype=torch.float16)
    for index in range(5):
        tensors = list(case.tensors)
        tensors[index] = memory.as_strided(tensors[index].shape, FAR_STRIDES[name]).copy_(tensors[index])
        check(case._with(tensors))


def test_every_interleaving_gives_the_same_bits():
    case = case_of(queries=90, keys=130, audio=300)
    call = call_of(case)
    results = []
    for seed in range(cases(8)):
        out, lse = launches.empty_outputs(call.query)
        gluon.run(forward.gluon_forward_launch(call, out, lse), seed)
        results.append((out, lse))
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


SOURCE = Path(forward.__file__).read_text()
MUTANTS = {  # what replaces what; what the stand-in says, or None where results are wrong
    "keys are not waited for": ("        mbarrier.wait(keys.ready.index(stage), parity)\n", "", "must be ready before"),
    "values are not waited for": (
        "        mbarrier.wait(values.ready.index(stage), parity)\n", "", "must be ready before"),
    "keys are copied to a stage that is not free": (
        "        mbarrier.wait(keys.free.index(stage), parity ^ 1)\n", "", "must be free before"),
    "values are copied to a stage that is not free": (
        "        mbarrier.wait(values.free.index(stage), parity ^ 1)\n", "", "must be free before"),
    "the other parity for keys that are ready": (
        "keys.ready.index(stage), parity)", "keys.ready.index(stage), parity ^ 1)", "must be ready before"),
    "the other parity for stages that are free": (
        "keys.free.index(stage), parity ^ 1)", "keys.free.index(stage), parity)", "a wait must end"),
    "the parity of every block's turn": ("(i // STAGES) & 1", "i & 1", "a wait must end|must be ready before"),
    "keys are freed before their product has ended": (
        "        scores = warpgroup_mma_wait(0, deps=(scores,))\n        mbarrier.arrive(keys.free.index(stage))\n",
        "        mbarrier.arrive(keys.free.index(stage))\n        scores = warpgroup_mma_wait(0, deps=(scores,))\n",
        "must be free before"),
    "values are freed before their product has ended": (
        "        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))\n"
        "        mbarrier.arrive(values.free.index(stage))\n",
        "        mbarrier.arrive(values.free.index(stage))\n"
        "        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))\n",
        "must be free before"),
    "a stage is free when one consumer has left it": (
        "keys = ring(dtype, STAGES, BLOCK_N, HEAD_DIM, CONSUMERS)", "keys = ring(dtype, STAGES, BLOCK_N, HEAD_DIM, 1)",
        "must be free before|a wait must end"),
    "values are never freed": ("        mbarrier.arrive(values.free.index(stage))\n", "", "a wait must end"),
    "keys are said to be ready before they have landed": (
        "async_copy.mbarrier_arrive(keys.ready.index(stage), increment_count=False)",
        "for _ in range(THREADS): mbarrier.arrive(keys.ready.index(stage))", "must be ready before"),
    "no fence before the keys' product": (
        "        fence_async_shared()  # between copies to shared memory and a product that reads it\n", "",
        "after a fence"),
    "no fence before the values' product": ("        fence_async_shared()\n", "", "after a fence"),
    "scores are not waited for": (
        "scores = warpgroup_mma_wait(0, deps", "scores = warpgroup_mma_wait(1, deps", "must be free before"),
    "weights are given up before their product has ended": (
        "acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))", "acc = warpgroup_mma_wait(0, deps=(acc,))",
        "must be kept until"),
    "one audio token too many": (
        "end = gl.where(is_audio, walk.audio_end,", "end = gl.where(is_audio, walk.audio_end + 1,", None),
    "each row sees one token too many": ("walk.audio_end, position + 1)", "walk.audio_end, position + 2)", None),
    "each row sees one token too few": ("walk.audio_end, position + 1)", "walk.audio_end, position)", None),
    "a block counts as seen by all one token too soon": ("first_position + 1):", "first_position + 2):", None),
    "one audio token too many is copied": (
        "kv_head, 0, walk.audio_end,", "kv_head, 0, walk.audio_end + 1,", "must not be read"),
    "a tile ends one key too late": (
        "- num_queries + last_query + 1", "- num_queries + last_query + 2", "must not be read"),
    "a row that has seen nothing": ('gl.where(new_max == float("-inf"), 0.0, new_max)', "new_max", None),
    "one block too few": ("num_blocks = gl.maximum(audio_blocks +", "num_blocks = gl.maximum(audio_blocks - 1 +", None),
    "the largest score is forgotten": ("        row_max = new_max\n", "", None),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found(name, tmp_path):
    """Seeded faults of the kernel: the stand-in finds those of its warps by what they do, whatever the results are."""
    old, new, said = MUTANTS[name]
    assert SOURCE.count(old) == 1
    path = tmp_path / "faulty.py"
    path.write_text(SOURCE.replace(old, new))
    specification = importlib.util.spec_from_file_location("faulty", path)
    faulty = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(faulty)
    with pytest.raises(KernelError if said else AssertionError, match=said or "max_error"):
        check_two(faulty)


def check_two(kernel):
    """A case of 11 blocks of audio, so of more than two turns in a ring, and one whose first rows see nothing."""
    for length, start in ((649, 0), (0, 82)):
        options = {"audio_lengths": torch.tensor([length]), "text_start": torch.tensor([start])}
        # Query 0 sees 63 keys, a block but one.
        check(case_of(features=(), how="within", options=options, audio=650, keys=102, heads=6), kernel=kernel)


def test_without_a_fault_nothing_is_found():
    check_two(forward)


@pytest.fixture
def on(monkeypatch):
    """A list of the launches of the Gluon kernel, which is switched on, on a GPU that it runs on: the stand-in."""
    launched = []
    run = Launch.run

    def run_here(launch):
        if launch.kernel is not forward.gluon_forward_kernel:
            return run(launch)
        launched.append(launch)
        return gluon.run(launch)

    monkeypatch.setattr(Launch, "run", run_here)
    monkeypatch.setattr(choice, "ON", True)
    monkeypatch.setattr(launches, "_capability", lambda query: 90)
    return launched


def test_switched_on_with_gradients(on):
    case = case_of(dtype=torch.float16, heads=4, kv_heads=2)
    case = case._with(x.nan_to_num() for x in case.tensors).requires_grad()
    exact = case.to(torch.float64).requires_grad()
    results = [
        torch.autograd.grad(lal_attention(*x.tensors, **x.options, impl=impl).sum(), x.tensors)
        for x, impl in ((case, "triton"), (exact, "reference"))
    ]
    assert len(on) == 1
    for got, want in zip(*results, strict=True):
        assert max_error(got, want) <= 8 * torch.finfo(torch.float16).eps * max(want.abs().max().item(), 1)


@pytest.mark.parametrize(
    "options", [{"window": 7}, {"softcap": 3.0}, {"audio_visible_from": torch.ones(1, 90, dtype=torch.long)}]
)
def test_what_it_does_not_take_goes_to_triton(on, options):
    case = case_of(features=(), options=options, dtype=torch.float16)
    out = lal_attention(*case.tensors, **case.options, impl="triton")
    exact = case.to(torch.float64)
    assert max_error(out, reference.lal_attention(*exact.tensors, **exact.options)) <= 0.01
    assert on == []


def test_decoding_stays_with_its_kernel(on, monkeypatch):
    monkeypatch.setattr(division, "multiprocessors_of", lambda device, capability: 4)
    case = case_of(features=(), dtype=torch.float16, queries=2)
    lal_attention(*case.tensors, impl="triton")
    assert on == []


def test_off_unless_it_is_switched_on():
    call = call_of(case_of())
    assert not choice.ON
    assert choice.reasons(call, 90) == []
    assert not choice.takes(call, 90)


def changed(call, **changes):
    return Call(**vars(call) | changes)


def test_the_reasons_are_all_said():
    call = call_of(case_of())
    floats = call.floats()
    narrow = {name: x[..., :32] for name, x in floats.items()}
    misaligned = torch.zeros(2 * call.query.numel(), dtype=torch.bfloat16)[1:].as_strided(
        call.query.shape, call.query.stride()
    )
    for changes, capability, reasons in (
        ({}, 80, ["the GPU must have compute capability 9.x, got 8.0"]),
        ({}, 100, ["the GPU must have compute capability 9.x, got 10.0"]),
        ({}, None, ["the GPU must have compute capability 9.x, got Triton's interpreter"]),
        ({"window": 3, "softcap": 2.0}, 90, ["softcap must be None", "window must be None"]),
        ({"cu_seqlens": torch.tensor([0, 40])}, 90, ["cu_seqlens must be None"]),
        ({"scale": -1.0}, 90, ["scale must be above 1e-30, got -1.0"]),
        (narrow, 90, ["the head dim must be one of 64, 128, got 32"]),
        ({name: x.float() for name, x in floats.items()}, 90, ["tensors must all be float16 or all bfloat16, got"]),
        ({"audio_key": call.audio_key.half()}, 90, ["tensors must all be float16 or all bfloat16, got"]),
        ({"query": misaligned}, 90, ["query must be aligned to 16 bytes"]),
        ({"value": call.value.mT.contiguous().mT}, 90, ["value must be aligned to 16 bytes"]),
    ):  # fmt: skip
        said = choice.reasons(changed(call, **changes), capability)
        assert len(said) == len(reasons), said
        assert all(map(str.startswith, said, reasons)), said
    with tiles.use(forward=tiles.Tile(64, 64, 4, 2)):
        assert choice.reasons(call, 90) == ["another tile of the forward kernel must not be in use"]


@pytest.mark.parametrize("missing", ["triton.experimental.gluon", "triton.experimental"])
def test_without_gluon_there_is_a_reason(missing, monkeypatch):
    monkeypatch.setattr(choice, "has_gluon", choice.has_gluon.__wrapped__)  # not what is remembered
    monkeypatch.delitem(sys.modules, "triton.experimental.gluon")
    monkeypatch.setitem(sys.modules, missing, None)
    assert choice.reasons(call_of(case_of()), 90) == ["triton must have triton.experimental.gluon"]
