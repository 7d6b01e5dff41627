"""One call of bench/gpu.sh: what it starts, and how every stage has ended so far."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages import PEERS, Stage

__all__ = ["DONE", "FAILED", "MISSING", "Run", "RunError"]

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, CUT, MISSING = "done", "failed", "cut", "missing"
LEAST = 5  # seconds in which a stage may do something
GRACE = 15  # seconds in which a stage that is interrupted may write what it has

INSTALL = ("-m", "pip", "install", "--no-index", "--no-deps")
# What there is: the GPU, and which of the modules in argv are installed.
PROBE = """
import importlib.util, json, sys, torch
def installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
print(json.dumps({"gpu": torch.cuda.get_device_name(), "modules": [name for name in sys.argv[1:] if installed(name)]}))
"""


class RunError(Exception):
    """Nothing can be run."""


class Run:
    """One call: its time, and how every stage has ended so far, in this call or before."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.outdir.absolute()
        self.site = self.out.with_name(self.out.name + "-site")
        self.end = time.monotonic() + options.budget
        self.path = self.out / "stages.json"
        self.state: dict[str, Any] = {"stages": {}}
        if self.path.exists():
            self.state = json.loads(self.path.read_text())
        self.modules: list[str] = []
        self.refused: list[str] = []  # wheels that do not install

    @property
    def left(self) -> int:
        return int(self.end - time.monotonic())

    def prepare(self) -> None:
        """Install the project and the wheels, and see what there is. All of it in every call, since the machine may be
        another one.

        Raises:
            RunError: something of it fails, or OUTDIR is of another GPU or library.
        """
        self._must("install", (*INSTALL, "--no-build-isolation", "-e", "."))
        # A list beside what is installed: both are gone with the machine.
        listed = self.site / "wheels.txt"
        before = listed.read_text().splitlines() if listed.exists() else []
        wheels = sorted(self.options.wheels.glob("*.whl")) if self.options.wheels else []
        for wheel in wheels:  # one by one: a bad one stops neither the others nor what needs none
            if wheel.name not in before:
                target = ("--no-compile", "--upgrade", "--target", str(self.site), str(wheel.absolute()))
                if self._execute("wheels", [self.options.python, *INSTALL, *target], 60, {}) == 0:
                    before.append(wheel.name)
                    _write(listed, "".join(f"{name}\n" for name in before))
                else:
                    self.refused.append(wheel.name)
        self._must("probe", ("-c", PROBE, *PEERS.values()))
        found = json.loads((self.out / "probe.log").read_text().splitlines()[-1])
        self.modules = found["modules"]
        for key, value in (("gpu", found["gpu"]), ("library", _digest())):
            if self.state.setdefault(key, value) != value:
                raise RunError(f"OUTDIR must be of this {key}, {value}, got results of {self.state[key]}")
        self._save()

    def work(self, chosen: list[Stage]) -> None:
        """Run what is left of the stages: what failed before comes last; what is cut goes on while there is time."""
        order = sorted(chosen, key=lambda stage: self.status(stage) == FAILED)
        for stage in order:
            if self.status(stage) != DONE and self.left >= LEAST:
                self._take(stage, stage.seconds * (1 + self._entry(stage).get("cuts", 0)))
        for stage in order:
            while stage.goes_on and self.status(stage) == CUT and self.left >= 2 * LEAST:
                self._take(stage, self.left)

    def status(self, stage: Stage) -> str:
        """Return how a stage has ended; "" if it was not begun, or with another command."""
        return str(self._entry(stage).get("status", ""))

    def _entry(self, stage: Stage) -> dict[str, Any]:
        entry: dict[str, Any] = self.state["stages"].get(stage.name, {})
        return entry if entry.get("command") == [*stage.program, *stage.command] else {}

    def _must(self, name: str, command: tuple[str, ...]) -> None:
        (self.out / f"{name}.log").unlink(missing_ok=True)
        if self._execute(name, [self.options.python, *command], 60, {}) != 0:
            raise RunError(f"{name} must succeed, got what {name}.log says")

    def _take(self, stage: Stage, limit: int) -> None:
        """Run a stage, and note how it ended."""
        entry = self._entry(stage) or {"command": [*stage.program, *stage.command], "cuts": 0}
        entry |= {"seconds": 0, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        if missing := self._missing(stage):
            print(f"== {stage.name}: {missing}", file=sys.stderr, flush=True)
            self._note(stage, entry | {"status": MISSING, "missing": missing})
            return
        self._note(stage, entry | {"status": CUT, "cuts": entry["cuts"] + 1})  # so it is if this process is killed
        variables = dict(stage.variables)
        if stage.with_ptxas:
            names = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")  # Triton takes the second from sm_100 on
            variables |= dict.fromkeys(names, str(self.ptxas))
        command = [*stage.program, self.options.python, *(x.replace("{out}", str(self.out)) for x in stage.command)]
        if stage.resume and (self.out / stage.output).exists():
            command.append(stage.resume)
        began = time.monotonic()
        code = self._execute(stage.name, command, min(limit, self.left), variables)
        entry |= {"seconds": round(time.monotonic() - began), "exit_code": code}
        if code is None:
            self._note(stage, entry | {"status": CUT, "cuts": entry["cuts"] + 1})
            return
        if code == 0 and stage.output and not _is_json(self.out / stage.output):
            entry["wrote"] = f"no {stage.output}"
            code = 1
        self._note(stage, entry | {"status": DONE if code == 0 else FAILED})

    def _missing(self, stage: Stage) -> str:
        """Return what a stage needs and is not there."""
        if stage.program and shutil.which(stage.program[0]) is None:
            return f"not installed: {stage.program[0]}"
        if stage.needs and stage.needs not in self.modules:
            return f"not installed: {stage.needs}"
        return "no wheel brought ptxas" if stage.with_ptxas and self.ptxas is None else ""

    @property
    def ptxas(self) -> Path | None:
        """The assembler that a wheel brought."""
        return next((path for path in sorted(self.site.glob("**/bin/ptxas")) if os.access(path, os.X_OK)), None)

    def _execute(self, name: str, command: list[str], limit: int, variables: dict[str, str]) -> int | None:
        """Run a command with its output in a log; return its exit code, or None if it was stopped at its limit."""
        print(f"== {name}", file=sys.stderr, flush=True)
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}  # on the GPU
        environment |= {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | variables
        if self.site.exists():
            paths = [str(self.site), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        log = self.out / f"{name}.log"
        with (
            log.open("ab") as written,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, cwd=ROOT,
                env=environment, process_group=0, preexec_fn=_die_with_parent,
            ) as process,
        ):  # fmt: skip
            code: int | None = None
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            finally:  # nothing may hold the GPU any longer
                _signal_group(process, signal.SIGKILL)
        last = log.read_bytes()[-2000:].decode(errors="replace").splitlines()[-5:]
        print("\n".join(last), file=sys.stderr, flush=True)
        return code

    def _note(self, stage: Stage, entry: dict[str, Any]) -> None:
        self.state["stages"][stage.name] = entry
        self._save()

    def _save(self) -> None:
        _write(self.path, json.dumps(self.state, indent=1) + "\n")
        if self.options.archive is not None:
            partial = self.options.archive.with_name(self.options.archive.name + ".partial")
            with tarfile.open(partial, "w:gz") as archive:
                archive.add(self.out, self.out.name)
            partial.replace(self.options.archive)


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a process that is killed leaves the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def _digest() -> str:
    """Return what tells one state of the library from another."""
    digest = hashlib.sha256()
    for path in sorted(path for top in ("palkernels", "model") for path in (ROOT / top).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _die_with_parent() -> None:
    """Let the kernel kill this process where its parent dies: no orphan may hold the GPU."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
