"""audio_kv of every layer of a model at once."""

import pytest
import torch
from support.projection_cases import EVERYTHING, assert_close, in_float64, layers_of, one_layer

from palkernels import audio_kv
from palkernels.projection import ops


@pytest.mark.gpu
@pytest.mark.parametrize("features", [(), EVERYTHING], ids=len)
@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_all_layers_at_once(device, impl, features):
    tensors, numbers = layers_of(3, *features, device=device)
    with torch.no_grad():
        keys, values = audio_kv(**tensors, **numbers, impl=impl)
    assert isinstance(keys, list)
    assert isinstance(values, list)
    for layer in range(3):
        want = audio_kv(**in_float64(one_layer(tensors, layer)), **numbers, impl="reference")
        assert_close([keys[layer], values[layer]], want, 5e-6)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_all_layers_with_gradients(impl):
    tensors, numbers = layers_of(2, *EVERYTHING)
    keys, values = audio_kv(**tensors, **numbers, impl=impl)
    total = sum(
        (key * (2 + i)).sum() + (value * (3 + i)).sum() for i, (key, value) in enumerate(zip(keys, values, strict=True))
    )
    got = torch.autograd.grad(total, [tensors["states"], *tensors["k_weight"]])
    want = torch.zeros_like(tensors["states"])
    for layer in range(2):
        key, value = audio_kv(**one_layer(tensors, layer), **numbers, impl="reference")
        alone = (key * (2 + layer)).sum() + (value * (3 + layer)).sum()
        states, weight = torch.autograd.grad(alone, [tensors["states"], tensors["k_weight"][layer]])
        assert_close([got[1 + layer]], [weight], 1e-5)
        want += states
    assert_close([got[0]], [want], 1e-5)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_layers_may_differ_and_share(impl):
    """Some layers have a bias, one has no RoPE; or one cos serves all."""
    tensors, numbers = layers_of(3, "k_bias", "rope")
    tensors["k_bias"][1] = None
    shared = tensors | {"cos": tensors["cos"][0], "sin": tensors["sin"][0]}
    tensors["cos"][2] = tensors["sin"][2] = None
    for given in (tensors, shared):
        with torch.no_grad():
            keys, values = audio_kv(**given, **numbers, impl=impl)
        for layer in range(3):
            want = audio_kv(**one_layer(given, layer), **numbers, impl="reference")
            assert_close([keys[layer], values[layer]], want, 5e-6)


@pytest.mark.gpu
def test_all_layers_take_one_normalisation_and_one_product(device, monkeypatch):
    calls = []

    def count(place, name):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args: calls.append(name) or real(*args))

    count(ops._steps(fused=True), "normalise")
    count(torch, "bmm")
    count(ops, "linear")
    tensors, numbers = layers_of(4, device=device)
    with torch.no_grad():
        audio_kv(**tensors, **numbers, impl="triton")
    assert calls == ["normalise", "bmm"]
