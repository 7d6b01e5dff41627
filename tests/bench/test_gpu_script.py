"""bench/gpu.sh on a machine without a GPU: its stages and its calls, with stand-ins for what it starts.

test_gpu_rehearsal.py runs the stages themselves.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from support.limits import child

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
PYTHON = """#!/bin/sh
echo "$*" >>calls
echo "interpret=${TRITON_INTERPRET:-unset} ptxas=${TRITON_PTXAS_PATH:-unset} path=$PYTHONPATH"
case "$*" in *"$FAILING"*) exit 3;; *"$SLOW"*) trap "echo interrupted; exit 1" INT
    echo $$ >slow; while :; do sleep 0.05; done;; esac
case "$*" in *importlib.util*) echo "{\\"gpu\\": \\"$GPU\\", \\"modules\\": [$MODULES]}";; esac
for word; do
    case "$before" in
        --json) echo {} >"$word";;
        --out) mkdir -p "$word"; echo {} >"$word/figure1.json";;
        --target) mkdir -p "$word/bin"; echo >"$word/bin/ptxas"; chmod +x "$word/bin/ptxas";;
    esac
    before=$word
done
"""
SANITIZER = ["memcheck", "racecheck", "initcheck", "synccheck"]
SWEEPS = ["sweep-forward", "sweep-backward", "sweep-decode"]
ORDER = [
    "doctor",
    "launches",
    "microbench",
    "host",
    "figure1",
    "compiled",
    "tests",
    "gluon-tests",
    "eight-bits",
    *SWEEPS,
    *SANITIZER,
]  # without wheels


class Machine:
    """Runs the script. Commands that contain `failing` exit with 3, with `slow` never by themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.gpu, self.modules, self.failing, self.slow = "NVIDIA H200", "", "nothing at all", "nothing at all"
        for name, text in (("python", PYTHON), ("compute-sanitizer", '#!/bin/sh\nshift 4\nexec "$@"\n')):
            (folder / name).write_text(text.replace("calls", f"{folder}/calls").replace(">slow", f">{folder}/slow"))
            (folder / name).chmod(0o755)

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        environment = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "GPU": self.gpu,
            "MODULES": self.modules, "FAILING": self.failing, "SLOW": self.slow,
        }  # fmt: skip
        return [str(SCRIPT), str(self.out), "--python", str(self.folder / "python"), *arguments], environment

    def run(self, *arguments: str) -> tuple[int, str, list[str]]:
        """Return the exit code, the errors, and the commands of Python that were started."""
        (self.folder / "calls").write_text("")
        command, environment = self.command(*arguments)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=self.folder)
        return done.returncode, done.stderr, self.calls()

    def calls(self) -> list[str]:
        text = (self.folder / "calls").read_text()
        return [line for line in text.splitlines() if line.startswith(("-m", "-c", "scripts/"))]

    def ended(self) -> dict[str, str]:
        stages = json.loads((self.out / "stages.json").read_text())["stages"]
        return {name: stage["status"] for name, stage in stages.items()}

    def wait_for_slow(self, run: subprocess.Popen[str]) -> int:
        """Wait until a slow command runs; return its process."""
        while not (self.folder / "slow").exists() or not (text := (self.folder / "slow").read_text().strip()):
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.01)
        return int(text)


@pytest.fixture
def gpu(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_all_stages_in_the_order_of_their_worth(gpu: Machine) -> None:
    code, printed, calls = gpu.run("--new", "tests/attention/test_decode.py")
    assert code == 0, printed
    ended = gpu.ended()
    assert [name for name, status in ended.items() if status == "done"] == [*ORDER[:2], "new", *ORDER[2:]]
    missing = {
        "flash-attn-2": "flash_attn.flash_attn_interface",
        "flash-attn-4": "flash_attn.cute",
        "flashinfer": "flashinfer",
        "gluon": "triton.experimental.gluon",
    }
    assert all(f"== {peer}: not installed: {module}\n" in printed for peer, module in missing.items())
    assert "== ptxas: no wheel brought ptxas\n" in printed
    assert "--no-index --no-deps --no-build-isolation -e ." in calls[0]
    decode = next(call for call in calls if "test_decode" in call)
    assert "--device cuda" in decode
    assert f"--passed {gpu.out}/passed.txt" in decode
    # On the GPU, not in the interpreter that the tests' own environment asks for.
    assert (gpu.out / "tests.log").read_text().startswith("interpret=unset ptxas=unset")


def test_what_is_done_is_not_run_again(gpu: Machine) -> None:
    gpu.run()
    code, _, calls = gpu.run()
    assert code == 0
    assert len(calls) == 2  # installed, and looked at
    gpu.run("--new", "tests/attention")
    _, _, calls = gpu.run("--new", "tests/kernels")  # another command is another stage
    assert len(calls) == 3
    assert calls[2].endswith("tests/kernels")


def test_a_failing_stage_stops_no_other_and_comes_last_in_the_next_call(gpu: Machine) -> None:
    gpu.failing = "microbench --device"
    code, _, _ = gpu.run("--only", "doctor,microbench,host")
    assert code == 1
    assert gpu.ended() == {"doctor": "done", "microbench": "failed", "host": "done"}
    gpu.failing = "nothing at all"
    code, _, calls = gpu.run("--only", "microbench,launches")
    assert code == 0
    assert calls[2] == "scripts/launches.py"
    assert "microbench --device cuda" in calls[3]


def test_a_stage_without_its_file_has_failed(gpu: Machine) -> None:
    python = gpu.folder / "python"
    python.write_text(python.read_text().replace('echo {} >"$word";;', "echo '{' >\"$word\";;"))
    code, _, _ = gpu.run("--only", "microbench,doctor")
    assert code == 1
    assert gpu.ended() == {"doctor": "done", "microbench": "failed"}


def test_a_stage_at_the_end_of_the_time_is_interrupted_and_goes_on(gpu: Machine) -> None:
    gpu.slow = "figure1"
    code, _, _ = gpu.run("--only", "figure1,tests", "--budget", "10")
    assert code == 3
    assert gpu.ended() == {"figure1": "cut"}
    assert (gpu.out / "figure1.log").read_text().splitlines()[-1] == "interrupted"
    (gpu.out / "figure1").mkdir()
    (gpu.out / "figure1" / "figure1.json").write_text("{}")  # the points that it had
    gpu.slow = "nothing at all"
    code, _, calls = gpu.run("--only", "figure1,tests")
    assert code == 0
    assert calls[2].endswith(f"--out {gpu.out}/figure1 --resume")
    assert "--resume" not in calls[3]


def test_without_an_installation_or_a_gpu_nothing_is_measured(gpu: Machine) -> None:
    for failing, name in (("pip install", "install"), ("get_device_name", "probe")):
        gpu.failing = failing
        code, printed, calls = gpu.run()
        assert code == 1
        assert printed.endswith(f"error: {name} must succeed, got what {name}.log says\n")
        assert failing in calls[-1] or name == "probe"


def test_one_folder_is_of_one_gpu_and_one_library(gpu: Machine) -> None:
    gpu.run("--only", "doctor")
    gpu.gpu = "NVIDIA H100 80GB HBM3"
    code, printed, _ = gpu.run()
    assert code == 1
    assert printed.endswith("error: OUTDIR must be of this gpu, NVIDIA H100 80GB HBM3, got results of NVIDIA H200\n")
    gpu.gpu = "NVIDIA H200"
    path = gpu.out / "stages.json"
    path.write_text(path.read_text().replace('"library": "', '"library": "other'))
    code, printed, _ = gpu.run()
    assert code == 1
    assert "error: OUTDIR must be of this library, " in printed


def test_peers_come_as_wheels_over_several_calls(gpu: Machine) -> None:
    wheels = gpu.folder / "wheels"
    wheels.mkdir()
    (wheels / "flash_attn_4.whl").touch()
    options = ("--only", "flash-attn-4,flashinfer,ptxas", "--wheels", str(wheels))
    gpu.modules = '"flash_attn.cute"'
    code, _, calls = gpu.run(*options)
    assert code == 0
    site = gpu.folder / "out-site"
    assert calls[1].endswith(f"--no-compile --upgrade --target {site} {wheels}/flash_attn_4.whl")
    assert gpu.ended() == {"flash-attn-4": "done", "flashinfer": "missing", "ptxas": "done"}
    assert f"ptxas=unset path={site}" in (gpu.out / "flash-attn-4.log").read_text()
    assert f"ptxas={site}/bin/ptxas path={site}" in (gpu.out / "ptxas.log").read_text()
    (wheels / "flashinfer.whl").touch()
    (wheels / "bad.whl").touch()
    gpu.modules, gpu.failing = '"flash_attn.cute", "flashinfer"', "bad.whl"
    code, printed, calls = gpu.run(*options)
    assert code == 1  # said, though everything that can run has run
    assert "bad.whl: does not install, see wheels.log\n" in printed
    assert sum("pip install" in call for call in calls) == 3  # the project and the two new wheels
    assert gpu.ended() == {"flash-attn-4": "done", "flashinfer": "done", "ptxas": "done"}


def test_one_run_at_a_time_and_an_end_that_leaves_nothing_behind(gpu: Machine) -> None:
    gpu.slow = "doctor"
    command, environment = gpu.command()
    with child(command, env=environment, cwd=gpu.folder) as first:
        process = gpu.wait_for_slow(first)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == "error: OUTDIR must be used by one run at a time, got another one in it\n"
        first.send_signal(signal.SIGTERM)
        assert first.communicate()[1].endswith("error: interrupted\n")
        assert first.returncode == 130
    assert gpu.ended() == {"doctor": "cut"}
    assert not is_alive(process)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_killed_with_a_stage_that_runs(gpu: Machine) -> None:
    gpu.slow = "doctor"
    command, environment = gpu.command()
    with child(command, env=environment, cwd=gpu.folder) as first:
        process = gpu.wait_for_slow(first)
        first.kill()
    while is_alive(process):  # the kernel ends what it had started
        time.sleep(0.01)
    gpu.slow = "nothing at all"
    assert gpu.run()[0] == 0


def test_killed_at_random_moments_and_resumed(gpu: Machine) -> None:
    moments = random.Random(int.from_bytes(os.urandom(4)))
    archive = gpu.folder / "results.tar.gz"
    command, environment = gpu.command("--archive", str(archive))
    logs: dict[str, str] = {}  # of what is done
    for _ in range(6):
        with child(command, env=environment, cwd=gpu.folder) as run:
            time.sleep(moments.uniform(0.05, 0.6))
            run.kill()
        ended = gpu.ended() if (gpu.out / "stages.json").exists() else {}
        for name, log in logs.items():
            assert ended[name] == "done"
            assert (gpu.out / f"{name}.log").read_text() == log, f"{name} was done and has been run again"
        logs = {name: (gpu.out / f"{name}.log").read_text() for name, status in ended.items() if status == "done"}
    assert gpu.run("--archive", str(archive))[0] == 0
    assert [name for name, status in gpu.ended().items() if status == "done"] == ORDER
    with tarfile.open(archive) as packed:
        names = packed.getnames()
        assert {"out/stages.json", "out/microbench.json", "out/figure1/figure1.json"} <= set(names)
        assert json.load(packed.extractfile("out/stages.json")) == json.loads((gpu.out / "stages.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "docter"], "--only must name some of doctor, launches, "),
        (["--wheels", "nowhere"], "--wheels must be a folder, got 'nowhere'"),
        (["--archive", "out/x.tar.gz"], "--archive must be outside OUTDIR, got 'out/x.tar.gz'"),
    ],
)
def test_usage(gpu: Machine, arguments: list[str], said: str) -> None:
    code, printed, calls = gpu.run(*arguments)
    assert (code, calls) == (2, [])
    assert said in printed
