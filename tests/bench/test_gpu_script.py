"""bench/gpu.sh on a machine without a GPU: its stages, with stand-ins for python and compute-sanitizer."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"


@pytest.fixture
def run(tmp_path: Path):
    """Runs the script; commands whose arguments contain ``failing`` exit with 3, with ``slow`` never by themselves."""

    def run(
        *arguments: str, failing: str = "nothing at all", slow: str = "nothing at all", budget: str = ""
    ) -> tuple[int, list[dict], list[str]]:
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        calls = tmp_path / "calls"
        calls.write_text("")
        for name in ("python", "compute-sanitizer"):
            (tools / name).write_text(
                f'#!/bin/sh\necho "{name} $*" >>{calls}\n'
                f'echo "interpret=${{TRITON_INTERPRET:-unset}}"\ncase "$*" in *"{failing}"*) exit 3;; '
                f'*"{slow}"*) trap "echo interrupted; exit 1" INT; while :; do sleep 0.1; done;; esac\n'
            )
            (tools / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
        environment |= {"BUDGET": budget} if budget else {}
        done = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, check=False, cwd=tmp_path)
        stages = tmp_path / "out" / "stages.jsonl"
        lines = [json.loads(line) for line in stages.read_text().splitlines()] if stages.exists() else []
        return done.returncode, lines, calls.read_text().splitlines()

    return run


def test_stages(run, tmp_path: Path) -> None:
    code, stages, calls = run("out")
    assert code == 0
    assert [stage["stage"] for stage in stages] == [
        "install",
        "doctor",
        "gpu",
        "microbench",
        "host",
        "figure1",
        "tests",
    ]
    assert all(stage["exit_code"] == 0 for stage in stages)
    assert "--no-index --no-deps --no-build-isolation -e ." in calls[0]
    assert "microbench --device cuda" in calls[3]
    assert calls[3].endswith(f"--json {tmp_path / 'out' / 'microbench.json'}")
    assert "microbench --host --device cuda" in calls[4]
    assert calls[4].endswith(f"--json {tmp_path / 'out' / 'host.json'}")
    assert "figure1 --device cuda --methods all" in calls[5]
    assert calls[5].endswith(f"--out {tmp_path / 'out' / 'figure1'}")
    assert "--device cuda" in calls[6]
    assert str(tmp_path / "out" / "tests.xml") in calls[6]
    limits = [
        int(x)
        for x in re.findall(r"^ +stage (?:tests|microbench|host|figure1) (\d+)", SCRIPT.read_text(), re.MULTILINE)
    ]
    assert len(limits) == 4
    assert sum(limits) <= 520  # of 540 seconds
    # On the GPU, not in the interpreter that the tests' own environment asks for.
    assert (tmp_path / "out" / "tests.log").read_text() == "interpret=unset\n"


def test_a_failing_stage_is_recorded_and_does_not_stop_the_others(run) -> None:
    code, stages, _ = run("out", failing="--junitxml")
    assert code == 1
    assert [stage["exit_code"] for stage in stages] == [0, 0, 0, 0, 0, 0, 3]


def test_a_stage_at_its_limit_is_interrupted_and_writes_what_it_has(run, tmp_path: Path) -> None:
    code, stages, _ = run("out", slow="microbench", budget="7")
    assert code == 1
    assert [stage["exit_code"] for stage in stages] == [0, 0, 0, 124, 124, 124, 124]
    assert (tmp_path / "out" / "microbench.log").read_text().splitlines()[-1] == "interrupted"
    assert (tmp_path / "out" / "tests.log").read_text() == "no time left\n"


@pytest.mark.parametrize(("failing", "last"), [("pip install", "install"), ("get_device_name", "gpu")])
def test_without_an_installation_or_a_gpu_nothing_is_measured(run, failing: str, last: str) -> None:
    code, stages, _ = run("out", failing=failing)
    assert code == 1
    assert stages[-1]["stage"] == last
    assert stages[-1]["exit_code"] == 3


def test_sanitize(run) -> None:
    code, stages, calls = run("--sanitize", "out", failing="racecheck")
    assert code == 1
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert [stage["stage"] for stage in stages] == ["install", "doctor", "gpu", "launches", *tools]
    assert [stage["exit_code"] for stage in stages if stage["stage"] in tools] == [0, 3, 0, 0]
    sanitizer = [call for call in calls if call.startswith("compute-sanitizer")]
    assert [f"--tool {tool} --error-exitcode 1" in call for tool, call in zip(tools, sanitizer, strict=True)] == [
        True
    ] * 4


@pytest.mark.parametrize("arguments", [(), ("",), ("a", "b"), ("--sanitize",), ("--help",)])
def test_usage(run, arguments: tuple[str, ...]) -> None:
    code, stages, calls = run(*arguments)
    assert (code, stages, calls) == (2, [], [])
