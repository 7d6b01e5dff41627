"""Run the kernels on tensors that end, or begin, at an unreadable page: an access out of bounds kills the process.

TRITON_INTERPRET=1 PYTHONPATH=tests/lib python tests/lib/support/guarded.py after|before|control

control shows that the page is unreadable: it reads one element too many, without a kernel.
"""

import ctypes
import mmap
import sys

import torch

from palkernels import lal_attention, reference
from palkernels.arguments import FLOATS, INTEGERS, Call, Projection
from palkernels.kernels import decode, projection, tiles
from palkernels.kernels.backward import backward_launches
from palkernels.kernels.forward import forward_launch
from palkernels.kernels.statistics import empty_statistics
from palkernels.projection import steps
from palkernels.testing import FEATURES, lal_case, max_error
from support.interpreter import make_quick

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(tensor: torch.Tensor, side: str) -> torch.Tensor:
    """Return a contiguous copy between two unreadable pages, which touches the page on ``side``."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor.clone()
    pages = -(-size // page) + 2
    base = libc.mmap(None, pages * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    for guard in (base, base + (pages - 1) * page):
        if libc.mprotect(guard, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = base + page if side == "before" else base + (pages - 1) * page - size
    buffer = (ctypes.c_char * size).from_address(start)
    return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def run(side: str, features: tuple[str, ...], seed: int) -> None:
    """Check forward, decoding and backward of one case against the reference."""
    case = lal_case(
        batch=2, heads=3 * 2, kv_heads=2, queries=(1, 5, 11)[seed % 3], keys=13, audio=(0, 19, 33)[seed % 3 - 1],
        dim=(8, 20)[seed % 2], features=features, audio_rows=3, seed=seed,
    )  # fmt: skip
    case.options.update({k: v.long() for k, v in case.options.items() if isinstance(v, torch.Tensor)})
    want = case.requires_grad()
    out, lse = lal_attention(*want.tensors, **want.options, return_lse=True, impl="reference")
    dout = torch.randn_like(out)
    want_grads = torch.autograd.grad(out, want.tensors, dout)

    options = {name: None if (x := case.options.get(name)) is None else guarded(x, side) for name in INTEGERS}
    numbers = {name: case.options.get(name) for name in ("softcap", "window")}
    scale = case.options.get("scale", case.tensors[0].shape[-1] ** -0.5)
    tensors = [guarded(x, side) for x in case.tensors]
    call = Call(*tensors, **options, **numbers, scale=scale)
    for launch in [forward_launch, *[decode.decode_launch] * decode.takes(call, capability=None)]:
        got, got_lse = guarded(torch.empty(out.shape), side), guarded(torch.empty(lse.shape), side)
        launch(call, got, got_lse, capability=None).run()
        assert max_error(got, out) <= 1e-4, case.name
        assert max_error(got_lse, lse) <= 1e-4, case.name

    grads = {name: guarded(torch.empty_like(x), side) for name, x in zip(FLOATS, tensors, strict=True)}
    dlse = guarded(torch.zeros_like(lse), side)
    statistics = guarded(empty_statistics(call, lse, capability=None), side)
    for launch in backward_launches(call, got, got_lse, guarded(dout, side), dlse, statistics, grads, capability=None):
        launch.run()
    for name, x in zip(FLOATS, want_grads, strict=True):
        assert max_error(grads[name], x) <= 1e-4, (case.name, name)


def run_packed(side: str) -> None:
    """Check packed rows: texts of 5, 0, 23 and 1 tokens, with clips of 33, 7, 0 and 16."""
    packing = {"cu_seqlens": torch.tensor([0, 5, 5, 28, 29]), "cu_audio": torch.tensor([0, 33, 40, 40, 56])}
    longest = {"max_seqlen": 23, "max_audio": 33}
    shapes = ((29, 6, 8), (29, 2, 8), (29, 2, 8), (56, 2, 8), (56, 2, 8))
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
    want, want_lse = reference.lal_attention_varlen(*leaves, **packing, **longest, return_lse=True)
    dout = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, leaves, dout)

    def heads_first(tensor: torch.Tensor) -> torch.Tensor:
        return guarded(tensor, side).transpose(0, 1).unsqueeze(0)

    boundaries = {name: guarded(x, side) for name, x in packing.items()}
    call = Call(*(heads_first(x.detach()) for x in leaves), scale=8**-0.5, **boundaries, **longest)
    out, lse = heads_first(torch.empty_like(want)), guarded(torch.empty(1, 6, 29), side)
    forward_launch(call, out, lse, capability=None).run()
    assert max_error(out[0].transpose(0, 1), want) <= 1e-4
    assert max_error(lse[0], want_lse) <= 1e-4
    grads = {name: heads_first(torch.empty_like(x)) for name, x in zip(FLOATS, leaves, strict=True)}
    statistics = guarded(empty_statistics(call, lse, capability=None), side)
    for launch in backward_launches(call, out, lse, heads_first(dout), None, statistics, grads, capability=None):
        launch.run()
    for name, x in zip(FLOATS, want_grads, strict=True):
        assert max_error(grads[name][0].transpose(0, 1), x) <= 1e-4, name


def run_projection(side: str) -> None:
    """Check the kernels of audio_kv on 3 rows of 13 tokens, with 2 heads of 10 columns, of which RoPE turns 6."""
    shapes = ((3, 13, 24), (24,), (20, 24), (20, 24), (20,), (20,), (10,), (3, 13, 6), (3, 13, 6))
    layer = Projection(
        *(guarded(torch.randn(shape), side) for shape in shapes), num_kv_heads=2, eps=1e-5, norm_offset=1
    )
    out, dout = guarded(torch.empty(39, 24), side), guarded(torch.randn(39, 24), side)
    projection.normalise_launch(layer, layer.norm_weight, out).run()
    assert max_error(out, steps.normalise(layer, layer.norm_weight)) <= 1e-5
    sums = guarded(torch.empty(-(-39 // projection.ROWS_PER_PROGRAM), 24), side)
    projection.normalise_gradient_launch(dout, layer, out, sums).run()
    want, dweight = steps.normalise_gradient(dout, layer, wants_weight=True)
    assert max_error(out, want) <= 1e-4
    assert max_error(sums.sum(0), dweight) <= 1e-4

    raw, dkeys = (guarded(torch.randn(3, 13, 2, 10), side) for _ in range(2))
    keys, want = guarded(raw, side), raw.clone()
    projection.finish_keys_launch(keys, layer).run()
    steps.finish_keys(want, layer)
    assert max_error(keys, want) <= 1e-4
    sums = guarded(torch.empty(projection.key_programs(keys), 10), side)
    projection.finish_gradient_launch(dkeys, raw, layer, keys, sums).run()
    want, dweight = steps.finish_gradient(dkeys, raw, layer)
    assert max_error(keys, want) <= 1e-4
    assert max_error(sums.sum(0), dweight) <= 1e-4


if __name__ == "__main__":
    make_quick()
    if sys.argv[1] == "control":
        tensor = guarded(torch.ones(7), "after")
        print("reading one element too many", flush=True)
        ctypes.string_at(tensor.data_ptr(), 8 * tensor.element_size())
    else:
        with tiles.use(tiles.Tile(16, 16, 4, 1)):
            for seed, features in enumerate([(), ("lengths", "index"), ("visible_from", "text_start"), FEATURES] * 2):
                print(seed, features, flush=True)
                run(sys.argv[1], features, seed)
            run_packed(sys.argv[1])
        run_projection(sys.argv[1])
