"""The command's help and version: what they say, and that they load nothing slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.figure1 import run

from palkernels.bench import commands, machine
from palkernels.bench.methods import METHODS
from palkernels.bench.presets import PRESETS


def test_the_names_are_those_of_the_registries() -> None:
    """The command has copies, since the registries take seconds to import."""
    assert tuple(METHODS) == commands.METHOD_NAMES
    assert tuple(PRESETS) == commands.MODEL_NAMES


def test_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("figure1", "simulate"):
        assert run(command, "--help") == 0
        shown = "".join(capsys.readouterr().out.replace("│", " ").split())  # names are broken at hyphens
        assert [name for name in METHODS if name not in shown] == []


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], []):
        assert run(*arguments) == 0
        assert "doctor" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out == f"palkernels {machine.package_version('palkernels')}\n"
    assert run("figure1", "--help") == 0
    text = capsys.readouterr().out
    for option in ("audio", "model", "layers", "audio-tokens", "text-tokens", "train-batch", "infer-batch"):
        assert f"--{option} " in text
    for option in ("new-tokens", "methods", "device", "dtype", "repeats", "out", "seed", "encoder-checkpoint"):
        assert f"--{option} " in text


NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["figure1", "--help"], ["ask", "--serve", NOBODY, "What?"]], ids=" ".join
)
def test_what_runs_no_model_loads_nothing_slow(arguments: list[str]) -> None:
    code = f"""
import sys
from palkernels.bench.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
slow = sorted({{"torch", "transformers", "matplotlib", "triton", "numpy"}} & set(sys.modules))
assert not slow, slow
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


@pytest.mark.slow
def test_run_as_a_module() -> None:
    """As `accelerate launch -m` and `torchrun -m` run it: it works, fails and takes Ctrl-C as the command does."""
    command = [sys.executable, "-P", "-m", "palkernels.bench.cli"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"palkernels {machine.package_version('palkernels')}\n"
    done = subprocess.run([*command, "train", "none.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: none.yaml: ")


def test_signals_are_taken_where_a_module_is_run(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import sys\nfrom palkernels.bench import process\n"
        "def main():\n    print(process.is_the_program(sys._getframe()))\nmain()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    for way in (["-m", "program"], ["program.py"], ["-c", "import program"]):
        command = [sys.executable, *way]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == ("False\n" if way[0] == "-c" else "True\n"), way
