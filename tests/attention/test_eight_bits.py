"""Audio keys and values in float8_e4m3fn with scales: what attention makes of them, and what is refused."""

import math

import pytest
import torch
from support.eight_bits import among_nan, in_eight_bits, random_case, run
from support.kernel_runs import arithmetic, strict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from palkernels import audio_kv, lal_attention, lal_attention_varlen, quantize_audio_kv, unsupported_reasons
from palkernels.arguments import SCALES
from palkernels.dtypes import EIGHT_BITS
from palkernels.kernels import decode, tiles
from palkernels.kernels.forward import forward_launch
from palkernels.recompute import recomputed
from palkernels.testing import FEATURES, LalCase, lal_case, max_error

SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "queries": 3, "keys": 5, "audio": 40, "dim": 16}
OPERATORS = torch.ops.palkernels
FORMS = [
    (),
    ("lengths",),
    ("lengths", "index", "text_start", "text_end"),
    ("visible_from", "index"),
    ("softcap", "window", "lengths"),
    FEATURES,
]


def to(case: LalCase, dtype: torch.dtype) -> LalCase:
    """The case with query and text in another dtype; audio keeps its eight bits."""
    return LalCase(case.name, (*(x.to(dtype) for x in case.tensors[:3]), *case.tensors[3:]), case.options)


def moved(case: LalCase, device: str) -> LalCase:
    options = {name: x.to(device) if torch.is_tensor(x) else x for name, x in case.options.items()}
    return LalCase(case.name, tuple(x.to(device) for x in case.tensors), options)


def attention(case, impl):
    return lal_attention(*case.tensors, **case.options, return_lse=True, impl=impl)


@pytest.mark.parametrize("features", FORMS, ids="-".join)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_definition(seed, features):
    """Decoding and forward agree with the definition in float64, with NaN in and around all that no query sees."""
    case = in_eight_bits(random_case(seed, features, dtype=torch.float64, poison=True), poison=True)
    want = attention(case, "reference")
    with tiles.use(tiles.Tile(16, 16, 4, 1)), strict("cpu"):
        for impl in ("triton", "sdpa"):
            for got, exact in zip(attention(case, impl), want, strict=True):
                assert max_error(got, exact) <= 1e-12, (impl, case.name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_dtypes_of_queries(dtype, device):
    """Eight bits are converted exactly: no error is larger than that of audio that query's dtype holds exactly."""
    for seed, features in enumerate(FORMS):
        case = moved(in_eight_bits(to(random_case(seed, features, dim=64), dtype)), device)
        exact = attention(to(case, torch.float64), "reference")
        with arithmetic(dtype, device):
            got = attention(case, "triton")
        bound = 4 * torch.finfo(dtype).eps
        largest = case.options["audio_value_scale"].max().item() * 448
        assert got[0].dtype == dtype
        assert max_error(got[0], exact[0]) <= bound * max(largest, 4), case.name
        # Scores are sums of exact products, so the LSE has float32's error whatever the dtype is.
        assert max_error(got[1], exact[1]) <= 1e-4, case.name


def test_scales_are_those_of_row_and_head():
    """The definition itself: each row's and head's keys and values are multiplied by their own scale."""
    case = in_eight_bits(lal_case(**SHAPE, features=("index", "lengths"), audio_rows=3, dtype=torch.float64))
    key, value = (
        x.double() * case.options[name][:, :, None, None] for name, x in zip(SCALES, case.tensors[3:], strict=True)
    )
    plain = {name: x for name, x in case.options.items() if name not in SCALES}
    want = lal_attention(*case.tensors[:3], key, value, **plain, impl="reference")
    assert torch.equal(lal_attention(*case.tensors, **case.options, impl="reference"), want)
    assert len(set(torch.cat([case.options[name].flatten() for name in SCALES]).tolist())) == 12


@pytest.mark.parametrize("launch", [decode.decode_launch, forward_launch])
def test_scales_that_nobody_needs_may_be_anything(launch):
    """Those of clips without tokens, and of clips that nobody reads."""
    shape = SHAPE | {"batch": 3}
    case = lal_case(**shape, audio_rows=4, features=("index", "lengths"), dtype=torch.float64)
    lengths, index = torch.tensor([40, 0, 7, 9]), torch.tensor([0, 1, 2])
    case.options.update(audio_lengths=lengths, audio_index=index)
    case = in_eight_bits(case)
    want = attention(case, "reference")
    for name in SCALES:
        case.options[name][1::2] = math.nan
    for got, exact in zip(run(launch, case), want, strict=True):
        assert max_error(got, exact) <= 1e-12


@pytest.mark.parametrize("launch", [decode.decode_launch, forward_launch])
@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-38, math.nan])
def test_scales_that_are_not_checked(launch, scale):
    """On a GPU: keys of a scale below 1e-30 count as zeros, wherever they are hidden; NaN stays NaN."""
    case = in_eight_bits(lal_case(**SHAPE, features=("lengths",)))
    case.options["audio_lengths"] = torch.tensor([33, 17])
    case.options["audio_key_scale"].fill_(scale)
    got, _ = run(launch, case)
    zeros = [x.clone() for x in case.tensors]
    zeros[3].view(torch.uint8).zero_()
    ones = {"audio_key_scale": torch.ones(2, 2)}
    want = lal_attention(*zeros, **case.options | ones, impl="reference")
    assert got.isnan().all() if math.isnan(scale) else max_error(got, want) <= 1e-5


def test_nan_in_valid_tokens_stays_nan():
    for place in (3, 4):
        case = in_eight_bits(lal_case(**SHAPE))
        case.tensors[place].view(torch.uint8)[1, 1, 20, 3] = 0xFF
        for impl in ("triton", "reference"):
            out = lal_attention(*case.tensors, **case.options, impl=impl)
            others = out.isnan()
            assert others[1, 2:, :, 3].all(), impl
            assert not others[0].any(), impl
            assert not others[1, :2].any(), impl


def faulty(**changes):
    """A call with audio in eight bits, changed; a function changes what is there."""
    case = in_eight_bits(lal_case(**SHAPE))
    arguments = dict(zip(("query", "key", "value", "audio_key", "audio_value"), case.tensors, strict=True))
    arguments |= case.options
    return arguments | {name: x(arguments[name]) if callable(x) else x for name, x in changes.items()}


def of_shape(*shape):
    return lambda _: torch.ones(shape)


FAULTS = {
    "one of two": ({"audio_key": lambda x: x.float()}, TypeError, "must both be float8_e4m3fn or neither, got torch"),
    "no key scale": ({"audio_key_scale": None}, TypeError, "audio_key_scale must be a tensor where audio is float8"),
    "no value scale": ({"audio_value_scale": None}, TypeError, "audio_value_scale must be a tensor where audio is f"),
    "scales of float audio": (
        {"audio_key": lambda x: x.float(), "audio_value": lambda x: x.float()},
        TypeError,
        "audio_key_scale must be None where audio is not float8_e4m3fn, got audio in torch.float32; audio_value",
    ),
    "another eight bits": (
        {name: lambda x: x.float().to(torch.float8_e5m2) for name in ("audio_key", "audio_value")},
        TypeError,
        "must share one dtype, got .*audio_key torch.float8_e5m2",
    ),
    "text in eight bits": (
        {"key": lambda x: x.to(EIGHT_BITS)},
        TypeError,
        "query, key and value must share one dtype, got query torch.float32, key torch.float8_e4m3fn",
    ),
    "query in eight bits": ({"query": lambda x: x.to(EIGHT_BITS)}, TypeError, "query must be float16, .*got torch.f"),
    "a number": ({"audio_key_scale": 1.0}, TypeError, "audio_key_scale must be a tensor, got float"),
    "scale's dtype": ({"audio_value_scale": lambda x: x.half()}, TypeError, "audio_value_scale must be float32, got"),
    "scale's device": ({"audio_key_scale": lambda x: x.to("meta")}, ValueError, "audio_key_scale must be on query"),
    "scale's shape": (
        {"audio_key_scale": of_shape(2), "audio_value_scale": of_shape(2, 4)},
        ValueError,
        r"audio_key_scale must be \(A, Hkv\) = \(2, 2\), got shape \(2,\); audio_value_scale must be .*\(2, 4\)",
    ),
    "zero": ({"audio_key_scale": lambda x: 0 * x}, ValueError, "audio_key_scale must be positive and finite, got v"),
    "negative": ({"audio_value_scale": lambda x: -x}, ValueError, "audio_value_scale must be positive and finite"),
    "infinite": ({"audio_value_scale": lambda x: x / 0}, ValueError, "must be positive and finite, got values from i"),
    "gradients": ({"query": lambda x: x.requires_grad_()}, ValueError, r"torch.no_grad\(\).*got query that do"),
    "a scale's gradient": ({"audio_key_scale": lambda x: x.requires_grad_()}, ValueError, "got audio_key_scale that"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "match"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("impl", ["auto", "triton", "sdpa", "reference"])
def test_faults(changes, error, match, impl):
    arguments = faulty(**changes)
    with pytest.raises(error, match=match) as caught:
        lal_attention(**arguments, impl=impl)
    assert str(caught.value) == "; ".join(unsupported_reasons(**arguments, impl=impl))


def test_without_gradients_they_may_be_required():
    arguments = faulty(query=lambda x: x.requires_grad_())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert lal_attention(**arguments, impl="triton").shape == arguments["query"].shape
            assert unsupported_reasons(**arguments) == []


def test_scales_have_no_forward_mode():
    case = in_eight_bits(lal_case(**SHAPE))

    def run(scale):
        return lal_attention(*case.tensors, **case.options | {"audio_value_scale": scale}, impl="triton")

    scale = case.options["audio_value_scale"]
    with pytest.raises(NotImplementedError, match=r"forward-mode tangents, got them for \['audio_value_scale'\]"):
        torch.func.jvp(run, (scale,), (scale,))


def test_packed_rows_have_none():
    audio = torch.ones(5, 2, 8).to(EIGHT_BITS)
    packing = {"cu_seqlens": torch.tensor([0, 3]), "cu_audio": torch.tensor([0, 5]), "max_seqlen": 3, "max_audio": 5}
    with pytest.raises(TypeError, match=r"^audio of packed rows must not be float8_e4m3fn: lal_attention takes it$"):
        lal_attention_varlen(torch.ones(3, 2, 8), *[torch.ones(3, 2, 8)] * 2, audio, audio, **packing)


def test_the_operator_has_no_gradient():
    arguments = operator_arguments()
    arguments[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="must be given where no gradient is required"):
        OPERATORS.lal_forward(*arguments)


def test_what_is_made_again_has_gradients():
    """``audio_kv(recompute=True)`` and the model's own way refuse eight bits, which no backward pass could want."""
    states = torch.randn(1, 4, 8, requires_grad=True)
    with pytest.raises(TypeError, match="made again must have gradients, got torch"):
        recomputed(lambda x: tuple(quantize_audio_kv(*[x.detach()[:, None]] * 2)[:2]), states)
    weight = torch.randn(8, 8, requires_grad=True)
    audio = audio_kv(states, torch.ones(8), weight, weight, num_kv_heads=1, eps=1e-5, recompute=True)
    with pytest.raises(TypeError, match="audio_key must not require gradients"):
        quantize_audio_kv(*audio)


@pytest.mark.parametrize(("capability", "reasons"), [((8, 0), 1), ((8, 6), 1), ((8, 9), 0), ((9, 0), 0), ((12, 0), 0)])
def test_capabilities(monkeypatch, capability, reasons):
    """A GPU that knows no float8_e4m3fn is a reason, and "auto" then takes sdpa as for any other."""
    from palkernels import devices, dispatch

    arguments = faulty()
    monkeypatch.setattr(devices, "kernel_device", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    monkeypatch.delenv("TRITON_INTERPRET")
    found = unsupported_reasons(**arguments)
    assert len(found) == reasons
    if reasons:
        got = ".".join(map(str, capability))
        assert found == [f"the GPU must have compute capability 8.9 or more for float8_e4m3fn, got {got}"]
    assert dispatch.choose("auto", found, on_cuda=True) == ("sdpa" if reasons else "triton")


def operator_arguments(device="cpu", features=("lengths", "index", "text_start")):
    case = moved(in_eight_bits(lal_case(**SHAPE, features=features, audio_rows=2)), device)
    options = {name: x.long() if name not in SCALES else x for name, x in case.options.items()}
    order = ("audio_lengths", "audio_index", "audio_visible_from", "text_start", "text_end")
    integers, scales = ([options.get(name) for name in names] for names in (order, SCALES))
    return [*case.tensors, *integers, 0.25, None, None, None, None, None, None, *scales]


@pytest.mark.gpu
def test_opcheck(device):
    # The schema's test compares inputs, which PyTorch cannot in eight bits.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with torch.no_grad():
        torch.library.opcheck(OPERATORS.lal_forward.default, tuple(operator_arguments(device)), test_utils=tests)


@pytest.mark.gpu
@torch.no_grad()
def test_compiled(device):
    """One graph, whose results are those of eager mode; the same for a quantisation within it."""
    case = moved(lal_case(**SHAPE, features=("lengths",)), device)

    def function(*tensors, audio_lengths):
        *audio, key_scale, value_scale = quantize_audio_kv(*tensors[3:], audio_lengths=audio_lengths)
        scales = {"audio_key_scale": key_scale, "audio_value_scale": value_scale}
        return lal_attention(*tensors[:3], *audio, audio_lengths=audio_lengths, **scales, impl="triton")

    compiled = torch.compile(function, backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)
    assert max_error(compiled(*case.tensors, **case.options), function(*case.tensors, **case.options)) <= 1e-5


@pytest.mark.gpu
@torch.no_grad()
def test_autocast_leaves_audio_alone(device):
    """Text and queries are cast to autocast's dtype, and audio keeps its eight bits and scales."""
    case = moved(in_eight_bits(lal_case(**SHAPE)), device)
    with torch.autocast(device, torch.float16):
        got = lal_attention(*case.tensors, **case.options, impl="triton")
    assert torch.equal(got, lal_attention(*to(case, torch.float16).tensors, **case.options, impl="triton"))


@torch.no_grad()
def test_fakes_and_flops():
    """Fake tensors give the shapes, and FLOPs count as for audio of any dtype."""
    case = in_eight_bits(lal_case(**SHAPE))
    want = lal_attention(*case.tensors, **case.options, impl="triton")
    with FakeTensorMode() as mode:
        tensors, scales = ([mode.from_tensor(x) for x in xs] for xs in (case.tensors, case.options.values()))
        fake = lal_attention(*tensors, **dict(zip(case.options, scales, strict=True)), impl="triton")
    assert (fake.shape, fake.stride(), fake.dtype) == (want.shape, want.stride(), want.dtype)
    flops = []
    for each in (case, lal_case(**SHAPE)):
        with FlopCounterMode(display=False) as counter:
            lal_attention(*each.tensors, **each.options, impl="triton")
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_scales_of_any_strides():
    case = in_eight_bits(lal_case(**SHAPE))
    want = lal_attention(*case.tensors, **case.options, impl="triton")
    strided = {name: among_nan(x) for name, x in case.options.items()}
    assert torch.equal(lal_attention(*case.tensors, **strided, impl="triton"), want)
