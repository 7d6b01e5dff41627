"""The operator that stands for the Triton kernel in PyTorch."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from palkernels import lal_attention
from palkernels.testing import lal_case


def operator_arguments():
    case = lal_case(
        batch=2, heads=4, kv_heads=2, queries=3, keys=5, audio=4, dim=16,
        features=("lengths", "index", "visible_from", "text_start", "text_end"),
    )  # fmt: skip
    o = {name: tensor.long() for name, tensor in case.options.items()}
    names = ("audio_lengths", "audio_index", "audio_visible_from", "text_start", "text_end")
    return (*case.tensors, *(o[name] for name in names), 0.25, 30.0, 4)


def test_schema_and_fake():
    torch.library.opcheck(
        torch.ops.palkernels.lal_forward.default,
        operator_arguments(),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_fake_has_the_real_strides():
    arguments = operator_arguments()
    real = torch.ops.palkernels.lal_forward(*arguments)
    with FakeTensorMode() as mode:
        fake = torch.ops.palkernels.lal_forward(
            *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments)
        )
    for got, want in zip(fake, real, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_output_layout_makes_the_transpose_free():
    case = lal_case(batch=2, heads=4, kv_heads=2, queries=3, keys=5, audio=4, dim=16)
    for impl in ("reference", "sdpa", "triton"):
        out = lal_attention(*case.tensors, impl=impl)
        assert out.transpose(1, 2).is_contiguous(), impl
