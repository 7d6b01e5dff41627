"""The operators that stand for the Triton kernels in PyTorch: checks, compilation, autograd, autocast, FLOPs."""

import pytest
import torch
from support.kernel_runs import arithmetic, attention
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from palkernels import lal_attention
from palkernels.kernels import launch
from palkernels.testing import lal_case, max_error

SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "queries": 3, "keys": 5, "audio": 4, "dim": 16}
OPERATORS = torch.ops.palkernels
OPTIONS = ("audio_lengths", "audio_index", "audio_visible_from", "text_start", "text_end")


def forward_arguments(device, features=("lengths", "index", "visible_from", "text_start", "text_end"), needs=True):
    case = lal_case(**SHAPE, features=features, device=device)
    integers = [None if (x := case.options.get(name)) is None else x.long() for name in OPTIONS]
    tensors = case.requires_grad().tensors if needs else case.tensors
    everything = bool(features)
    return (*tensors, *integers, 0.25, 30.0 if everything else None, 4 if everything else None)


def backward_arguments(device, features=("lengths",), needed=(True,) * 5, with_dlse=True):
    arguments = forward_arguments(device, features, needs=False)
    out, lse = OPERATORS.lal_forward(*arguments)
    dlse = torch.randn_like(lse) if with_dlse else None
    return (torch.randn_like(out), dlse, out, lse, list(needed), *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [(), ("lengths", "index", "visible_from", "text_start", "text_end")], ids=len)
def test_opcheck_forward(device, features):
    """opcheck passes: schema, fake tensors, autograd registration, AOTAutograd with dynamic shapes."""
    torch.library.opcheck(OPERATORS.lal_forward.default, forward_arguments(device, features))


@pytest.mark.gpu
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("needed", [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 0, 1, 0, 1)], ids=str)
def test_opcheck_backward(device, needed, with_dlse):
    arguments = backward_arguments(device, needed=[bool(x) for x in needed], with_dlse=with_dlse)
    torch.library.opcheck(OPERATORS.lal_backward.default, arguments)


def test_fakes_have_the_real_strides():
    for operator, arguments in (
        (OPERATORS.lal_forward, forward_arguments("cpu", needs=False)),
        (OPERATORS.lal_backward, backward_arguments("cpu")),
    ):
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
        for got, want in zip(fake, real, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_output_layout_makes_the_transpose_free():
    case = lal_case(**SHAPE)
    for impl in ("reference", "sdpa", "triton"):
        out = lal_attention(*case.tensors, impl=impl)
        assert out.transpose(1, 2).is_contiguous(), impl


def test_gradients_lie_as_their_tensors():
    """Gradients lie in memory as their inputs do: what made a transposed view takes its gradient without a copy."""
    case = lal_case(**SHAPE)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in case.tensors]
    grads = torch.autograd.grad(lal_attention(*tensors, impl="triton").sum(), tensors)
    assert [x.stride() for x in grads] == [x.stride() for x in tensors]


def test_hooks_may_lay_out_what_is_saved_anew():
    """Saved tensors come back from hooks with other strides, the LSE too, which the kernels read as contiguous."""
    case = lal_case(**SHAPE)
    turn = lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)  # noqa: E731
    results = []
    for unpack in (lambda x: x, turn):
        leaves = case.requires_grad().tensors
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            out, lse = lal_attention(*leaves, return_lse=True, impl="triton")
        results.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    for plain, got in zip(*results, strict=True):
        assert max_error(got, plain) <= 1e-6


@pytest.mark.gpu
def test_compiled_is_one_graph_with_eager_results(device):
    """torch.compile(fullgraph=True) takes forward and backward, the LSE's gradient included."""
    case = lal_case(**SHAPE, features=("lengths", "visible_from", "text_start"), device=device)

    def function(*tensors):
        return lal_attention(*tensors, **case.options, softcap=5.0, window=3, return_lse=True, impl="triton")

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    results = []
    for each in (function, compiled):
        leaves = case.requires_grad().tensors
        out, lse = each(*leaves)
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        results.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for eager, got in zip(*results, strict=True):
        assert max_error(got, eager) <= 1e-6
    assert all(x.abs().max() > 0 for x in results[0][2:])


@pytest.mark.gpu
def test_fifty_lengths_compile_at_most_three_graphs(device, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(launch.Launch, "run", lambda self: None)  # the graphs are counted, not their numbers
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def function(*tensors, audio_lengths):
        return lal_attention(*tensors, audio_lengths=audio_lengths, impl="triton")

    for step in range(50):
        shape = SHAPE | {
            "queries": 1 + step,
            "keys": 1 + step + step % 3,
            "audio": 2 * step + 1,
            "heads": 2,
            "kv_heads": 1,
        }
        case = lal_case(**shape, features=("lengths",), device=device).requires_grad()
        lengths = case.options["audio_lengths"].int()
        out = function(*case.tensors, audio_lengths=lengths)
        assert out.shape == case.tensors[0].shape
        grads = torch.autograd.grad(out.sum(), case.tensors)
        assert [x.shape for x in grads] == [x.shape for x in case.tensors]
    assert 1 <= counter.frame_count <= 3
    torch._dynamo.reset()


def test_saves_inputs_output_and_lse_only():
    case = lal_case(**SHAPE, features=("lengths", "index"), audio_rows=2).requires_grad()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = lal_attention(*case.tensors, **case.options, return_lse=True, impl="triton")
    allowed = {x.untyped_storage().data_ptr() for x in (*case.tensors, out, lse)}
    floats = [x for x in saved if x.is_floating_point()]
    assert {x.untyped_storage().data_ptr() for x in floats} == allowed
    assert len(floats) == len(allowed)


def test_nothing_is_saved_without_gradients():
    case = lal_case(**SHAPE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        lal_attention(*case.tensors, impl="triton")
        with torch.no_grad():
            lal_attention(*case.requires_grad().tensors, impl="triton")
    assert not saved


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_no_second_derivative(impl):
    """A second derivative raises instead of lacking a term, whichever tensors it is asked of."""
    case = lal_case(**SHAPE).requires_grad()
    out = lal_attention(*case.tensors, impl=impl)
    grads = torch.autograd.grad(out.square().sum(), case.tensors, create_graph=True)
    query = case.tensors[0]
    for penalty in (grads[0].sum(), grads[0].sum() + query.sum()):
        with pytest.raises(RuntimeError, match="must be differentiated once"):
            torch.autograd.grad(penalty, query, allow_unused=True, retain_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    """As in SDPA, mixed inputs compute in autocast's dtype, and each gradient has its input's dtype."""
    with arithmetic(dtype, device):
        check_autocast(device, dtype)


def check_autocast(device, dtype):
    case = lal_case(**SHAPE, device=device)
    mixed = [x.to(dtype if i % 2 else torch.float32).requires_grad_() for i, x in enumerate(case.tensors)]
    with torch.autocast(device, dtype):
        out = lal_attention(*mixed, impl="triton")
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().square().sum(), mixed)
    assert [x.dtype for x in grads] == [x.dtype for x in mixed]
    cast = [x.detach().to(dtype).requires_grad_() for x in case.tensors]
    want = lal_attention(*cast, impl="triton")
    assert torch.equal(out, want)
    for got, expected in zip(grads, torch.autograd.grad(want.float().square().sum(), cast), strict=True):
        assert torch.equal(got, expected.to(got.dtype))
    with torch.autocast(device, dtype):
        doubles = lal_attention(*(x.double() for x in case.tensors), impl="reference")
    assert doubles.dtype == torch.float64


def test_kernels_run_on_their_tensors_device(monkeypatch):
    """Kernels run on the device of their tensors, not on the current one."""
    ran_on = []

    class Kernel:
        def __getitem__(self, grid):
            assert grid == (3,)
            return lambda *args, **kwargs: ran_on.append(current[-1])

    current = ["cuda:0"]

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(str(self.device))

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    launch.Launch(Kernel(), 3, (), {}, torch.device("cuda:1")).run()
    assert ran_on == ["cuda:1"]
    assert current == ["cuda:0"]


@pytest.mark.cuda_only
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_a_device_that_is_not_current():
    case = lal_case(**SHAPE, device="cuda:1")
    with torch.cuda.device(0):
        got = attention(case, "triton")
    for x, want in zip(got, attention(case, "reference"), strict=True):
        assert max_error(x, want) <= 1e-4


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
@pytest.mark.parametrize(("queries", "keys"), [(3, 3), (3, 5), (1, 4)])
def test_flops(monkeypatch, window, queries, keys):
    """Two products in forward; in backward S, dP and one for each gradient: 2 D operations per pair that is seen."""
    monkeypatch.setattr(launch.Launch, "run", lambda self: None)  # counting needs no numbers
    shape = SHAPE | {"queries": queries, "keys": keys, "window": window}
    del shape["window"]
    case = lal_case(**shape).requires_grad()
    first = keys - queries
    text = sum(
        1 for t in range(queries) for s in range(keys) if max(0, first + t - (window or keys) + 1) <= s <= first + t
    )
    audio = queries * SHAPE["audio"]
    product = 2 * SHAPE["batch"] * SHAPE["heads"] * SHAPE["dim"]
    with FlopCounterMode(display=False) as forward:
        out = lal_attention(*case.tensors, window=window, impl="triton")
    assert forward.get_total_flops() == 2 * product * (text + audio)

    def backward(*which):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out.sum(), [case.tensors[i] for i in which], retain_graph=True)
        return counter.get_total_flops()

    assert backward(0, 1, 2, 3, 4) == 5 * product * (text + audio)

    def alone(*which):
        leaves = [x.detach().requires_grad_(i in which) for i, x in enumerate(case.tensors)]
        out = lal_attention(*leaves, window=window, impl="triton")
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        return counter.get_total_flops()

    assert alone(0) == 3 * product * (text + audio)
    assert alone(3, 4) == 4 * product * audio
    assert alone(4) == 2 * product * audio
    assert alone(1, 4) == product * (3 * text + 2 * audio)
