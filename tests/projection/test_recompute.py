"""What audio_kv and attention keep for the backward pass, and what they make again there."""

import gc
import weakref

import pytest
import torch
from support.projection_cases import EVERYTHING, arguments, leaves
from torch.utils.checkpoint import checkpoint

from palkernels import audio_kv, lal_attention, lal_attention_varlen


def kept_bytes(run, given):
    """Bytes of what autograd keeps of a call, beside the tensors that are given."""
    known = {x.untyped_storage().data_ptr() for x in given}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(kept.values()), result


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("features", [(), EVERYTHING], ids=len)
def test_kept_bytes_per_audio_token_and_layer(impl, recompute, features):
    """Attention keeps K and V, or nothing of the audio; the text's tensors and the output are counted apart."""
    rows, tokens, heads, dim = 2, 64, 2, 10
    tensors, numbers = arguments(*features, rows=rows, tokens=tokens)
    query, key, value = (torch.randn(rows, x, 5, dim).requires_grad_() for x in (4, heads, heads))
    alone = torch.randn(rows, heads, tokens, dim)

    def run():
        audio = audio_kv(**tensors, **numbers, impl=impl, recompute=recompute)
        return lal_attention(query, key, value, *audio, impl=impl)

    given = [*tensors.values(), query, key, value, alone]
    total, _ = kept_bytes(run, given)
    # The output and its LSE are kept for the same attention without gradients of audio, too.
    text, _ = kept_bytes(lambda: lal_attention(query, key, value, alone, alone, impl=impl), given)
    key_and_value = 2 * rows * tokens * heads * dim * 4
    assert total - text == (0 if recompute else key_and_value)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_nothing_lives_on_with_recompute(impl):
    """Nothing holds K and V once the caller lets them go, not even the graph."""
    tensors, numbers = arguments(*EVERYTHING)
    query, key, value = (torch.randn(2, x, 5, 10) for x in (4, 2, 2))
    audio = audio_kv(**tensors, **numbers, impl=impl, recompute=True)
    out = lal_attention(query, key, value, *audio, impl=impl)
    storages = [weakref.ref(x.untyped_storage()) for x in audio]
    want = torch.autograd.grad(out.sum(), leaves(tensors), retain_graph=True)
    del audio
    gc.collect()
    assert all(x() is None for x in storages)
    again = torch.autograd.grad(out.sum(), leaves(tensors))
    assert all(torch.equal(x, y) for x, y in zip(want, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("around", ["nothing", "checkpoint", "hooks"])
def test_recomputed_gradients_are_the_same(device, impl, around):
    """Gradients are the same bits, also inside of what itself changes how autograd keeps tensors."""
    tensors, numbers = arguments(*EVERYTHING, device=device)
    text = [torch.randn(2, x, 5, 10, device=device).requires_grad_() for x in (4, 2, 2)]
    seen = []

    def run(recompute, *text):
        audio = audio_kv(**tensors, **numbers, impl=impl, recompute=recompute)
        return lal_attention(*text, *audio, impl=impl)

    def gradients(recompute):
        if around == "checkpoint":
            out = checkpoint(run, recompute, *text, use_reentrant=False)
        elif around == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.shape) or x, lambda x: x):
                out = run(recompute, *text)
        else:
            out = run(recompute, *text)
        return torch.autograd.grad(out.square().sum(), [*leaves(tensors), *text])

    want, got = gradients(False), gradients(True)
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))
    if around == "hooks":
        audio = torch.Size([2, 2, 37, 10])
        assert seen.count(audio) == 2  # of the first run only
        assert seen.count(text[0].shape) >= 4  # query and output, of both


@pytest.mark.parametrize("frozen", [False, True])
def test_recompute_notices_a_changed_weight(frozen):
    """A changed weight raises, also where nothing of the audio needs gradients and autograd would not notice."""
    tensors, numbers = arguments()
    tensors = {name: x.detach().requires_grad_(not frozen) for name, x in tensors.items()}
    text = [torch.randn(2, x, 5, 10).requires_grad_() for x in (4, 2, 2)]
    out = lal_attention(*text, *audio_kv(**tensors, **numbers, impl="sdpa", recompute=True), impl="sdpa")
    with torch.no_grad():
        tensors["k_weight"].mul_(2)
    with pytest.raises(RuntimeError, match=r"k_weight must not change between audio_kv\(recompute=True\) and"):
        out.sum().backward()


def test_recompute_that_attention_would_not_follow_is_refused():
    """A view or a copy raises: attention would keep K and V without a word."""
    tensors, numbers = arguments(rows=1)
    key, value = audio_kv(**tensors, **numbers, impl="sdpa", recompute=True)
    query, text = torch.randn(1, 4, 5, 10), torch.randn(1, 2, 5, 10)
    with pytest.raises(ValueError, match=r"audio_key must be what audio_kv\(recompute=True\) returned, got a view"):
        lal_attention(query, text, text, key[:, :, :9], value[:, :, :9])
    with pytest.raises(ValueError, match=r"audio_key must be what audio_kv\(recompute=True\) returned, got a view"):
        lal_attention_varlen(
            *(x[0].transpose(0, 1) for x in (query, text, text, key, value)), cu_seqlens=torch.tensor([0, 5]),
            cu_audio=torch.tensor([0, 37]), max_seqlen=5, max_audio=37,
        )  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"autocast's torch.bfloat16, got"):
        lal_attention(query, text, text, key, value)


def test_recompute_repeats_what_projected():
    """Keys are made again by the implementation that made them: another one rounds differently."""
    tensors, numbers = arguments(*EVERYTHING, dtype=torch.bfloat16)
    text = [torch.randn(2, x, 5, 10, dtype=torch.bfloat16).requires_grad_() for x in (4, 2, 2)]
    gradients = []
    for recompute in (False, True):
        audio = audio_kv(**tensors, **numbers, impl="reference", recompute=recompute)
        out = lal_attention(*text, *audio, impl="sdpa")
        gradients.append(torch.autograd.grad(out.square().sum(), [*leaves(tensors), *text]))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_recompute_is_refused_under_compile():
    tensors, numbers = arguments()

    def run():
        return audio_kv(**tensors, **numbers, impl="sdpa", recompute=True)

    with pytest.raises(Exception, match="recompute must be False under"):
        torch.compile(run, fullgraph=True, backend="eager")()
