"""The public functions' overloads: what type checkers are told."""

import inspect
from collections.abc import Sequence
from typing import Literal, get_overloads

import pytest
from torch import Tensor

from palkernels import audio_kv, lal_attention, lal_attention_varlen, reference, unsupported_reasons

BOTH = tuple[Tensor, Tensor]
WITH_LSE = (lal_attention, lal_attention_varlen, reference.lal_attention, reference.lal_attention_varlen)


def names_and_kinds(function):
    return [(x.name, x.kind, x.default is x.empty) for x in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("function", WITH_LSE, ids=lambda x: f"{x.__module__}.{x.__name__}")
def test_return_lse_decides_what_returns(function):
    found = [(x.__annotations__["return_lse"], x.__annotations__["return"]) for x in get_overloads(function)]
    assert found == [(Literal[False], Tensor), (Literal[True], BOTH), (bool, Tensor | BOTH)]
    want = names_and_kinds(function)
    for place, overload in enumerate(get_overloads(function)):
        # Only where it is given may return_lse be True or unknown.
        required = {"return_lse"} if place else set()
        assert names_and_kinds(overload) == [(name, kind, one or name in required) for name, kind, one in want]
        for name, annotation in function.__annotations__.items():
            if name not in ("return_lse", "return"):
                assert overload.__annotations__[name] == annotation, name


def test_weights_decide_what_audio_kv_returns():
    one, several = get_overloads(audio_kv)
    assert one.__annotations__["return"] == BOTH
    assert several.__annotations__["return"] == tuple[list[Tensor], list[Tensor]]
    for name in ("norm_weight", "k_weight", "v_weight"):
        assert one.__annotations__[name] == Tensor
        assert several.__annotations__[name] == Sequence[Tensor]
    for overload in (one, several):
        assert names_and_kinds(overload) == names_and_kinds(audio_kv)


def test_reasons_take_what_each_function_takes():
    for overload, function in zip(
        get_overloads(unsupported_reasons), (lal_attention, lal_attention_varlen, audio_kv), strict=True
    ):
        assert names_and_kinds(overload) == names_and_kinds(function)
        assert overload.__annotations__["return"] == list[str]
        for name, annotation in function.__annotations__.items():
            if name != "return":
                assert overload.__annotations__[name] == annotation, name
