"""bench/gpu.sh rehearsed from end to end on a machine without a GPU, killed on its way, and made results of."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from support.figure1 import tiny_config
from support.limits import child
from support.posing import posing

from palkernels.bench.kernels.cases import OPS, model_cases
from palkernels.bench.kernels.microbench import MODELS
from palkernels.bench.kernels.peers import PEERS, peers_of

ROOT = Path(__file__).parents[2]
POINTS = 4  # of Figure 1 in small: two modes, two numbers of audio tokens


def load(path: str):
    specification = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = sys.modules[Path(path).stem] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


stages = load("scripts/gpu/stages.py").stages([])
gpu_results, update_docs = load("scripts/gpu_results.py"), load("scripts/update_docs.py")


class Rehearsal:
    def __init__(self, folder: Path, python: Path) -> None:
        self.folder, self.python, self.out = folder, python, folder / "out"
        sanitizer = folder / "compute-sanitizer"
        sanitizer.write_text('#!/bin/sh\necho "$3 $4 $6 $7" for "$2"\n')  # the command itself has a stage of its own
        sanitizer.chmod(0o755)
        (folder / "wheels").mkdir()
        with zipfile.ZipFile(folder / "wheels" / "flash_attn_4-4-py3-none-any.whl", "w") as wheel:
            wheel.writestr("flash_attn/cute/__init__.py", "")

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        command = [str(ROOT / "bench" / "gpu.sh"), str(self.out), "--python", str(self.python)]
        command += ["--wheels", str(self.folder / "wheels"), "--budget", "6000", *arguments]
        environment = os.environ | {"PYTHON": sys.executable, "PATH": f"{self.folder}:{os.environ['PATH']}"}
        return command, environment

    def run(self, *arguments: str) -> tuple[int, str]:
        command, environment = self.command(*arguments)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    def ended(self) -> dict[str, str]:
        entries = json.loads((self.out / "stages.json").read_text())["stages"]
        return {name: entry["status"] for name, entry in entries.items()}

    def log(self, name: str) -> list[str]:
        return (self.out / f"{name}.log").read_text().splitlines()


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Every stage has run; amid Figure 1 everything was killed, and called again."""
    folder = tmp_path_factory.mktemp("rehearsal")
    tiny_config().save_pretrained(folder / "model")
    with posing(folder, folder / "model") as python:
        rehearsal = Rehearsal(folder, python)
        command, environment = rehearsal.command()
        figure1 = rehearsal.out / "figure1" / "figure1.json"
        with child(command, env=environment) as first:
            while not figure1.exists():
                assert first.poll() is None, first.communicate()[1]
                time.sleep(0.01)
            first.kill()
        rehearsal.kept = {(row["mode"], row["audio_tokens"]) for row in json.loads(figure1.read_text())["rows"]}
        rehearsal.killed = rehearsal.ended()
        rehearsal.code, rehearsal.printed = rehearsal.run()
        yield rehearsal


@pytest.mark.slow
def test_every_stage_runs_to_its_end(rehearsed):
    assert rehearsed.code == 0, rehearsed.printed
    missing = {"flash-attn-2", "flash-attn-3", "flashinfer", "flashinfer-paged", "ptxas"}
    assert rehearsed.ended() == {x.name: "missing" if x.name in missing else "done" for x in stages}
    for stage in stages:
        if stage.output and stage.name not in missing:
            json.loads((rehearsed.out / stage.output).read_text())
    assert rehearsed.log("launches")[-1].startswith("audio_kv: largest error")
    assert rehearsed.log("memcheck") == ["--error-exitcode 1 scripts/launches.py  for memcheck"]


@pytest.mark.slow
def test_figure_1_goes_on_where_it_was_killed(rehearsed):
    assert rehearsed.killed["figure1"] == "cut"
    assert "tests" not in rehearsed.killed
    document = json.loads((rehearsed.out / "figure1" / "figure1.json").read_text())
    assert document["meta"]["complete"] is True
    assert len({(row["mode"], row["audio_tokens"]) for row in document["rows"]}) == POINTS
    assert rehearsed.kept
    log = rehearsed.log("figure1")
    for mode, count in rehearsed.kept:  # measured once; it may have been killed before it could say so
        assert sum(line.startswith(f"{mode}, {count} audio tokens: ") for line in log) <= 1


@pytest.mark.slow
def test_tests_that_have_passed_are_not_run_again(rehearsed):
    path, state = rehearsed.out / "passed.txt", rehearsed.out / "stages.json"
    passed = path.read_text().splitlines()
    assert len(passed) > 2
    path.write_text("\n".join(passed[:-1]) + "\n" + passed[-1][:9])  # killed amid the last line
    entries = json.loads(state.read_text())
    entries["stages"]["tests"]["status"] = "cut"
    state.write_text(json.dumps(entries))
    code, printed = rehearsed.run()
    assert code == 0, printed
    run = [line.split()[0] for line in rehearsed.log("tests") if " PASSED" in line]
    assert run == [*passed, passed[-1]]
    assert path.read_text().splitlines() == passed


@pytest.mark.slow
def test_what_was_measured_becomes_results_and_pages(rehearsed, tmp_path, capsys):
    gpu_results.main([str(rehearsed.out), "--results", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    names = ["figure1-h100", "compiled-h100", "microbench-h100", "flash-attn-4-h100", "gluon-h100", "host-h100"]
    names += [f"sweep-{op}-h100" for op in ("forward", "backward", "decode")] + ["eight-bits-h100"]
    assert printed[:10] == [f"{name}.json" for name in names]
    assert "flashinfer: missing" in printed[10:]
    documents = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(documents) == sorted(names)
    pages = {entry.mark: update_docs.content(entry, documents) for entry in update_docs.ENTRIES if entry.pattern}
    assert pages["figure1-gpus"].startswith("### Measured on ")
    assert "| 16 | LAL |" in pages["compiled-gpus"]
    kernels = pages["kernels-gpus"]
    assert kernels.startswith("### More on the GPU H100\n\n")
    assert "| smollm2-135m | decode |" in kernels
    assert "Beside flash-attn 4, in a run of its own:" in kernels
    assert "The host's time of a call:" in kernels
    with pytest.raises(SystemExit, match=r"--replace be given, got figure1-h100.json, compiled-h100.json, "):
        gpu_results.main([str(rehearsed.out), "--results", str(tmp_path)])
    gpu_results.main([str(rehearsed.out), "--results", str(tmp_path), "--replace"])


@pytest.mark.slow
def test_what_is_cut_gives_no_result_but_the_points_of_figure_1(rehearsed, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(rehearsed.out, out)
    entries = json.loads((out / "stages.json").read_text())
    for name in ("figure1", "microbench", "sweep-decode"):
        entries["stages"][name]["status"] = "cut"
    (out / "stages.json").write_text(json.dumps(entries))
    (tmp_path / "results").mkdir()
    gpu_results.main([str(out), "--results", str(tmp_path / "results"), "--card", "h100b"])
    names = ("compiled", "eight-bits", "figure1", "flash-attn-4", "gluon", "host", "sweep-backward", "sweep-forward")
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [f"{name}-h100b.json" for name in names]
    printed = capsys.readouterr().out.splitlines()
    assert "microbench: cut" in printed
    assert "figure1: cut: the points that it has are taken" in printed


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_the_name_of_a_card(gpu, name):
    assert gpu_results.card(gpu) == name


def test_the_peers_of_the_stages_are_known_on_a_gpu():
    """As `palkernels microbench --device cuda` checks them; no tensor is made."""
    modules = {peer.key: peer.module for peer in PEERS if peer.module is not None}
    assert {stage.name: stage.needs for stage in stages if stage.needs} == modules
    checked = 0
    for stage in stages:
        words = stage.command
        if "--peers" in words:
            ops = tuple(words[i + 1] for i, word in enumerate(words) if word == "--op") or OPS
            shape = (ops, (1500,), torch.bfloat16, torch.device("cuda"))
            cases = [case for model in MODELS for case in model_cases(model, *shape)]
            known = {peer.key for case in cases for peer in peers_of(case, tuple(peer.key for peer in PEERS))}
            assert set(words[words.index("--peers") + 1].split(",")) <= known
            checked += 1
    assert checked >= 5
