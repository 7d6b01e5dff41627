"""Test and measure the kernels on this machine's GPU, in as many calls as it takes. bench/gpu.sh starts it.

    bench/gpu.sh OUTDIR                                all stages, in the order of their worth, for at most 9 minutes
    bench/gpu.sh OUTDIR                                the same again: goes on where the call before ended or was killed
    bench/gpu.sh OUTDIR --new tests/attention/test_decode.py --wheels DIR --archive FILE

It needs no network and no virtual environment: the packages that pyproject.toml names must be installed already.

Every stage writes its result and its log to OUTDIR, and stages.json there says how each ended. A stage that is done is
not run again. One that was cut, by its limit, by the end of the time or by SIGKILL, goes on (tests: those that have not
passed; Figure 1: the points that are missing) or begins again with more time. One that failed stops no other, and is
tried again in the next call after the others. OUTDIR is of one GPU and of one state of the library.

Peers are wheels in DIR, installed beside OUTDIR, in OUTDIR-site; further calls may bring others. A ptxas among them is
compared with Triton's own. The exit code is 0 if everything is done, 1 if something failed, 2 where an argument is
wrong, and 3 if stages are left for another call. scripts/gpu_results.py makes committed results of OUTDIR.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from run import DONE, FAILED, MISSING, Run, RunError
from stages import Stage, stages

LEFT = 3  # the exit code where stages are left


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold OUTDIR's lock, which its process loses however it ends."""
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError("OUTDIR must be used by one run at a time, got another one in it") from None
        yield


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[Stage]]:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="Test and measure the kernels on this GPU.")
    parser.add_argument("outdir", type=Path, metavar="OUTDIR", help="folder for the results, to be named in every call")
    parser.add_argument("--budget", type=int, default=540, help="seconds for everything  [default: 540]")
    parser.add_argument(
        "--new", action="append", default=[], metavar="TEST", help="tests that come first; may be repeated"
    )
    parser.add_argument("--only", help="names of stages, separated by commas  [default: all]")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder with wheels of peers, and of a ptxas")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="OUTDIR as .tar.gz, written after every stage")
    parser.add_argument("--python", default=sys.executable, help="what runs the stages  [default: this Python]")
    options = parser.parse_args(arguments)
    chosen = stages(options.new)
    names = [stage.name for stage in chosen]
    wanted = options.only.split(",") if options.only else names
    for name in wanted:
        if name not in names:
            parser.error(f"--only must name some of {', '.join(names)}, got {name!r}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels must be a folder, got {str(options.wheels)!r}")
    if options.archive is not None and options.outdir.absolute() in options.archive.absolute().parents:
        parser.error(f"--archive must be outside OUTDIR, got {str(options.archive)!r}")
    return options, [stage for stage in chosen if stage.name in wanted]


def main(arguments: list[str] | None = None) -> int:
    options, chosen = _parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    options.outdir.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(options.outdir):
            run = Run(options)
            run.prepare()
            run.work(chosen)
    except RunError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    for stage in chosen:
        print(f"{stage.name:12} {run.status(stage) or 'not begun'}", file=sys.stderr)
    for wheel in run.refused:
        print(f"{wheel}: does not install, see wheels.log", file=sys.stderr)
    ended = {run.status(stage) for stage in chosen}
    return 1 if FAILED in ended or run.refused else 0 if ended <= {DONE, MISSING} else LEFT


if __name__ == "__main__":
    sys.exit(main())
