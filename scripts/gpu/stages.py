"""The stages of bench/gpu.sh, in the order of their worth."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["PEERS", "Stage", "stages"]

PALKERNELS = ("-c", "from palkernels.bench.cli import main; main()")
MICROBENCH = (*PALKERNELS, "microbench", "--device", "cuda", "--audio-tokens", "1500", "--seconds", "0.05")
SWEEP = (*PALKERNELS, "microbench", "--device", "cuda", "--audio-tokens", "1500", "--seconds", "0.03", "--sweep")
ATTENTION = ("--op", "forward", "--op", "backward", "--op", "decode")
COMPILED = (*PALKERNELS, "figure1", "--device", "cuda", "--methods", "plits,lal", "--audio-tokens", "1500")
COMPILED += ("--compiled", "--no-serving", "--clip-seconds", "none")
FIGURE1 = (*PALKERNELS, "figure1", "--device", "cuda", "--methods", "all", "--audio-tokens", "512,1500")
WORKERS = str(max(1, (os.cpu_count() or 1) - 2))
# -v names every test as it ends: the log says which are left.
PYTEST = ("-m", "pytest", "--device", "cuda", "-v", "--numprocesses", WORKERS)
GOES_ON = (*PYTEST, "--passed", "{out}/passed.txt")
TESTS = ("tests/attention", "tests/kernels", "tests/projection", "tests/test_recompute.py")
# The Gluon kernel has never run on a GPU: should it wait for ever there, it takes no other test's time.
GLUON = "tests/kernels/test_gluon.py"
PEERS = {  # as in bench/kernels/peers.py, which is not installed yet where this file is read
    "flash-attn-2": "flash_attn.flash_attn_interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
    "flashinfer": "flashinfer",
    "flashinfer-paged": "flashinfer",
    "gluon": "triton.experimental.gluon",
}


@dataclass(frozen=True)
class Stage:
    """A command of Python, or of another `program` that is given one, and the time that it may take in one call."""

    name: str
    seconds: int
    command: tuple[str, ...]  # {out} is OUTDIR
    output: str = ""  # the file of JSON in OUTDIR that it writes
    goes_on: bool = False  # where it was cut, rather than to begin again
    resume: str = ""  # the option with which it goes on where its output exists
    program: tuple[str, ...] = ()
    needs: str = ""  # the module that must be installed
    with_ptxas: bool = False  # that came as a wheel
    variables: tuple[tuple[str, str], ...] = ()


def stages(new: list[str]) -> list[Stage]:
    """Return all stages in the order of their worth; `new` are the tests of what is new."""
    first = [Stage("new", 120, (*GOES_ON, *new), goes_on=True)] if new else []
    # Without PyTorch's own pools, so that each tensor ends where its memory does.
    no_pools = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    sanitizer = [
        Stage(
            tool, 110, ("scripts/launches.py",), variables=no_pools,
            program=("compute-sanitizer", "--tool", tool, "--error-exitcode", "1"),
        )
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ]  # fmt: skip
    # Each for itself: they compile for long, and a wheel may come in a later call.
    peers = [
        Stage(
            peer, 120, (*MICROBENCH, *ATTENTION, "--peers", peer, "--json", f"{{out}}/{peer}.json"), f"{peer}.json",
            needs=module,
        )
        for peer, module in PEERS.items()
    ]  # fmt: skip
    sweeps = [
        Stage(f"sweep-{op}", 150, (*SWEEP, op, "--json", f"{{out}}/sweep-{op}.json"), f"sweep-{op}.json")
        for op in ("forward", "backward", "decode")
    ]
    control = ("--peers", "sdpa-flash")  # the same with either ptxas
    others = ("--peers", "sdpa-flash,sdpa-cudnn,sdpa-efficient,two-sdpa,flex,eager,modules")
    return [
        Stage("doctor", 60, (*PALKERNELS, "doctor")),
        Stage("launches", 60, ("scripts/launches.py",)),
        *first,
        Stage("microbench", 120, (*MICROBENCH, *others, "--json", "{out}/microbench.json"), "microbench.json"),
        Stage(
            "host", 45,
            (*PALKERNELS, "microbench", "--host", "--device", "cuda", "--seconds", "0.5", "--json", "{out}/host.json"),
            "host.json",
        ),
        Stage(
            "figure1", 185, (*FIGURE1, "--repeats", "3", "--out", "{out}/figure1"), "figure1/figure1.json",
            goes_on=True, resume="--resume",
        ),
        Stage(
            "compiled", 200, (*COMPILED, "--repeats", "3", "--out", "{out}/compiled"), "compiled/figure1.json",
            goes_on=True, resume="--resume",
        ),
        Stage("tests", 170, (*GOES_ON, f"--ignore={GLUON}", *TESTS), goes_on=True),
        Stage(
            "gluon-tests", 90, (*PYTEST, "-k", "not float32", GLUON, "tests/attention/test_random_cases.py"),
            variables=(("PALKERNELS_GLUON", "1"),),
        ),
        Stage(
            "eight-bits", 60,
            (*MICROBENCH, "--op", "decode", "--op", "decode_fp8", *control, "--json", "{out}/eight-bits.json"),
            "eight-bits.json",
        ),
        *peers,
        *sweeps,
        Stage(
            "ptxas", 90, (*MICROBENCH, *ATTENTION, *control, "--json", "{out}/ptxas.json"), "ptxas.json",
            with_ptxas=True,
        ),
        *sanitizer,
    ]  # fmt: skip
