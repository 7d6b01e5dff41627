"""The Triton kernels' gradients against finite differences, in float64, in the interpreter."""

import pytest
import torch
from support.thorough import combinations

from palkernels import lal_attention
from palkernels.kernels import tiles
from palkernels.testing import lal_case

NAMES = ("query", "key", "value", "audio_key", "audio_value")
# Without PALKERNELS_TESTS=all: one, three or all of them.
SUBSETS = [
    tuple(name for name, needed in zip(NAMES, each, strict=True) if needed)
    for each in combinations(*[(True, False)] * len(NAMES))
    if any(each)
]
SHAPE = {"batch": 2, "heads": 2, "kv_heads": 1, "queries": 3, "keys": 5, "audio": 4, "dim": 2}
TILE = tiles.Tile(16, 16, 4, 1)


def gradcheck(features, needed, fast=True, shape=SHAPE, **options):
    case = lal_case(**shape, features=features, audio_rows=2, dtype=torch.float64, seed=3)
    tensors = [x.requires_grad_(name in needed) for name, x in zip(NAMES, case.tensors, strict=True)]

    def function(*tensors):
        out, lse = lal_attention(*tensors, **case.options | options, return_lse=True, impl="triton")
        return out, lse.masked_fill(lse == -torch.inf, 0)

    with tiles.use(TILE):
        assert torch.autograd.gradcheck(function, tensors, fast_mode=fast)
        # Only those that were asked for have a gradient; and they do not depend on what else was asked for.
        out, lse = function(*tensors)
        (out.square().sum() + lse.square().sum()).backward()
    assert [name for name, x in zip(NAMES, tensors, strict=True) if x.grad is not None] == list(needed)


@pytest.mark.parametrize("needed", SUBSETS, ids="-".join)
def test_every_subset_of_inputs(needed):
    gradcheck(("lengths", "index", "text_start"), needed)


@pytest.mark.parametrize(
    "features",
    [
        (),
        ("lengths",),
        ("index",),
        ("visible_from",),
        ("text_start",),
        ("text_end",),
        ("window",),
        ("softcap",),
        ("lengths", "index", "visible_from", "text_start", "text_end"),
        ("lengths", "index", "visible_from", "text_start", "text_end", "window", "softcap", "scale"),
    ],
    ids="-".join,
)
def test_every_feature(features):
    gradcheck(features, NAMES)


@pytest.mark.slow
def test_in_full():
    """Every entry of the Jacobian is right with every option on."""
    shape = SHAPE | {"queries": 2, "keys": 3, "audio": 3}
    gradcheck(("lengths", "index", "visible_from", "softcap"), NAMES, fast=False, shape=shape, window=2)


def test_a_subset_does_only_its_work(monkeypatch):
    """A subset of the gradients launches no more kernels, which fill no more tensors, than it needs."""
    from palkernels.kernels import launch

    launched = []
    run = launch.Launch.run

    def record(self):
        names = self.kernel.arg_names
        arguments = dict(zip(names, self.arguments, strict=False))
        launched.append(
            (
                self.kernel.__name__,
                [x for x in names if x.startswith("d") and getattr(arguments[x], "ptr", None) is not None],
            )
        )
        run(self)

    monkeypatch.setattr(launch.Launch, "run", record)

    def launches(*needed):
        case = lal_case(**SHAPE)
        tensors = [x.requires_grad_(name in needed) for name, x in zip(NAMES, case.tensors, strict=True)]
        out = lal_attention(*tensors, impl="triton")
        launched.clear()
        out.sum().backward()
        return [(name, [x for x in filled if x != "dout"]) for name, filled in launched]

    assert launches("query") == [("query_gradient_kernel", ["dquery"])]
    assert launches("audio_value") == [
        ("query_gradient_kernel", []),  # the rows' statistics alone
        ("key_gradient_kernel", ["daudio_value"]),
    ]
    assert launches("audio_key", "audio_value") == [
        ("query_gradient_kernel", []),
        ("key_gradient_kernel", ["daudio_key", "daudio_value"]),
    ]
    assert launches("value", "audio_key") == [
        ("query_gradient_kernel", []),
        ("key_gradient_kernel", ["dvalue", "daudio_key"]),
    ]
