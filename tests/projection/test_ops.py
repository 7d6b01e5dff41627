"""The operators of audio_kv: schemas, fake tensors, compilation, FLOPs."""

import pytest
import torch
from support.projection_cases import EVERYTHING, arguments, assert_close, layers_of, leaves
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from palkernels import audio_kv
from palkernels.arguments import PROJECTION, TURNS

OPERATORS = torch.ops.palkernels


def operator_arguments(device, features=EVERYTHING, needs=True):
    tensors, numbers = arguments(*features, device=device)
    tensors = {name: x.detach().requires_grad_(needs and x.requires_grad) for name, x in tensors.items()}
    return [*(tensors.get(name) for name in (*PROJECTION, *TURNS)), *numbers.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("features", [(), EVERYTHING], ids=len)
def test_opcheck(device, fused, features):
    given = [*operator_arguments(device, features), fused]
    torch.library.opcheck(OPERATORS.audio_kv_forward.default, given)
    plain = [*operator_arguments(device, features, needs=False), fused]
    key, value = OPERATORS.audio_kv_forward(*plain)
    needed = [x is not None for x in plain[: len(PROJECTION)]]
    upstream = [torch.randn_like(key), torch.randn_like(value)]
    torch.library.opcheck(OPERATORS.audio_kv_backward.default, (*upstream, needed, *plain))
    layers = [[x, x] if i else x for i, x in enumerate(plain[:9])] + plain[9:-1]
    torch.library.opcheck(OPERATORS.audio_kv_layers.default, layers)


@pytest.mark.parametrize("fused", [False, True])
def test_fakes_have_the_real_strides(fused):
    plain = [*operator_arguments("cpu", needs=False), fused]
    upstream = [torch.randn(2, 2, 37, 10)] * 2
    layers = [[x, x] if i else x for i, x in enumerate(plain[:9])] + plain[9:-1]
    for operator, given in (
        (OPERATORS.audio_kv_forward, plain),
        (OPERATORS.audio_kv_backward, [*upstream, [True] * 7, *plain]),
        (OPERATORS.audio_kv_layers, layers),
    ):
        real = operator(*given)
        with FakeTensorMode() as mode:
            fake = operator(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, given))
        real, fake = ([x] if isinstance(x, torch.Tensor) else x for x in (real, fake))
        for got, want in zip(fake, real, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_compiles_to_one_graph(impl):
    tensors, numbers = arguments(*EVERYTHING)

    def run(states):
        key, value = audio_kv(**(tensors | {"states": states}), **numbers, impl=impl)
        return (key * value).sum()

    want = torch.autograd.grad(run(tensors["states"]), leaves(tensors))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(tensors["states"]), leaves(tensors))
    assert_close(got, want, 1e-6)


def count_flops(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_flops(impl):
    """Two products forward; backward one for each weight, two for the states, and the keys' again for their norm."""
    tensors, numbers = arguments(*EVERYTHING)
    one = 2 * (2 * 37) * 24 * 20  # 2 rows of 37 tokens, width 24, 2 heads of 10
    forward, outputs = count_flops(lambda: audio_kv(**tensors, **numbers, impl=impl))
    assert forward == 2 * one
    total = sum(x.sum() for x in outputs)
    assert count_flops(lambda: torch.autograd.grad(total, leaves(tensors), retain_graph=True))[0] == 5 * one
    assert count_flops(lambda: torch.autograd.grad(outputs[1].sum(), tensors["v_weight"]))[0] <= 2 * one
    lists, numbers = layers_of(3)
    with torch.no_grad():
        assert count_flops(lambda: audio_kv(**lists, **numbers, impl=impl))[0] == 6 * one


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_tangents_are_refused(impl):
    """PyTorch would drop them without a word: torch.func.jvp gave zeros."""
    tensors, numbers = arguments()
    tensors = {name: x.detach() for name, x in tensors.items()}
    states = tensors.pop("states")
    run = lambda x: audio_kv(x, **tensors, **numbers, impl=impl)[0]  # noqa: E731
    with pytest.raises(
        NotImplementedError, match=r"must not be given forward-mode tangents, got them for \['states'\]"
    ):
        torch.func.jvp(run, (states,), (states,))
    with pytest.raises(NotImplementedError, match=r"must not be differentiated by torch\.func"):
        torch.func.grad(lambda x: run(x).sum())(states)
    assert torch.vmap(run)(states[None]).shape[1:] == run(states).shape
