"""`palkernels figure1` through its command line, on a model small enough for seconds."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig

from palkernels.bench import machine
from palkernels.bench.cli import main
from palkernels.bench.experiments import measure
from palkernels.bench.methods import DEFAULT_METHODS, METHODS, Batch, Lal, Method, Plits

FILES = ["figure1.csv", "figure1.html", "figure1.json", "figure1.png"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    LlamaConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def small(tiny: Path, out: Path) -> list[object]:
    sizes = ["--text-tokens", 16, "--new-tokens", 2, "--repeats", 2, "--dtype", "fp32", "--device", "cpu"]
    return ["figure1", "--model", tiny, "--audio-tokens", "16,256", *sizes, "--out", out]


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """One whole run, in a process of its own as a user has it: its JSON, its folder and what it printed."""
    out = tmp_path_factory.mktemp("run") / "results"
    installed = Path(sysconfig.get_path("scripts")) / "palkernels"
    command = [str(installed), *map(str, small(tiny, out))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads((out / "figure1.json").read_text()), out, done.stdout


def test_writes_four_files_and_nothing_else(measured: tuple[dict[str, Any], Path, str]) -> None:
    document, out, _ = measured
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "figure1.png").read_bytes().startswith(b"\x89PNG")
    with open(out / "figure1.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(document["rows"])
    for line, row in zip(lines, document["rows"], strict=True):
        assert line["method"] == row["method"]
        assert int(line["peak_memory_bytes"]) == row["peak_memory_bytes"]
        assert float(line["samples_per_second_p50"]) == row["samples_per_second"]["p50"]


def test_rows_are_complete(measured: tuple[dict[str, Any], Path, str]) -> None:
    rows = measured[0]["rows"]
    points = [(row["mode"], row["audio_tokens"], row["method"]) for row in rows]
    assert points == [(m, n, method) for m in ("train", "infer") for n in (16, 256) for method in ("plits", "lal")]
    for row in rows:
        assert list(row) == [
            "method",
            "mode",
            "audio_tokens",
            "text_tokens",
            "batch_size",
            "dtype",
            "impl",
            "samples_per_second",
            "peak_memory_bytes",
            "peak_above_static_bytes",
            "memory_source",
            "source",
            "status",
        ]
        assert (row["text_tokens"], row["batch_size"], row["dtype"]) == (16, 2, "float32")
        assert (row["impl"], row["source"], row["status"]) == ("sdpa", "measured", "ok")
        assert row["memory_source"] == "tracked tensor allocations"
        samples = row["samples_per_second"]["samples"]
        assert len(samples) == 2
        assert all(math.isfinite(x) and x > 0 for x in samples)
        assert min(samples) <= row["samples_per_second"]["p50"] <= max(samples)
        assert 0 < row["peak_above_static_bytes"] < row["peak_memory_bytes"]


def test_lal_needs_less_memory(measured: tuple[dict[str, Any], Path, str]) -> None:
    rows = {(row["mode"], row["audio_tokens"], row["method"]): row for row in measured[0]["rows"]}
    for mode, share in (("train", 0.3), ("infer", 0.6)):
        plits, lal = rows[mode, 256, "plits"], rows[mode, 256, "lal"]
        assert lal["peak_memory_bytes"] < plits["peak_memory_bytes"]
        assert lal["peak_above_static_bytes"] < share * plits["peak_above_static_bytes"]


def test_meta_says_what_was_measured(measured: tuple[dict[str, Any], Path, str], tiny: Path) -> None:
    meta = measured[0]["meta"]
    assert meta["device"] == "cpu"
    assert meta["processor"] == meta["device_name"] == machine.cpu_name()
    assert set(meta["versions"]) == {"palkernels", "torch", "triton", "transformers", "liger-kernel", "python"}
    assert meta["complete"] is True
    assert (meta["model"], meta["layers"], meta["full_layers"]) == (str(tiny), 2, 3)
    assert meta["llm_weights"] == meta["encoder_weights"] == "random (seed 0)"
    assert (meta["encoder"], meta["audio_file"], meta["seed"]) == ("whisper-tiny", "bundled clip", 0)
    assert meta["threads"] >= 1
    assert meta["date"][4] == "-"
    assert meta["options"]["audio_tokens"] == [16, 256]
    assert "2 of 3 layers" in meta["reductions"]


def test_says_what_is_to_come_and_where_the_plot_is(measured: tuple[dict[str, Any], Path, str]) -> None:
    _, out, printed = measured
    lines = printed.splitlines()
    assert any(line.startswith("On a CPU the defaults are reduced: 2 of 3 layers, training") for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("Estimated time: about"))
    first = next(i for i, line in enumerate(lines) if line.startswith("train, 16 audio tokens: PLITS"))
    assert start < first
    assert "LLM weights random (seed 0)" in printed
    assert "Whisper tiny, encoder weights random (seed 0)" in printed
    assert "speed-up" in printed
    assert "change" in printed
    assert lines[-2:] == [f"Plot: {out / 'figure1.png'}", f"Report: {out / 'figure1.html'}"]


def test_methods_take_turns(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A B A B ..., so that a drift of the machine hits all methods; the tracked pass comes first and is not timed."""
    calls: list[str] = []

    def recorded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Method, *arguments: Any) -> Any:
            tracked = torch.utils._python_dispatch._get_current_dispatch_mode() is not None
            calls.append(f"{self.name} {name}{' tracked' if tracked else ''}")
            return real(self, *arguments)

        return call

    for method in (Plits, Lal):
        for name in ("loss", "generate"):
            monkeypatch.setattr(method, name, recorded(name, getattr(method, name)))
    assert run(*small(tiny, tmp_path / "out"), "--audio-tokens", 16, "--repeats", 3) == 0
    expected = []
    for name in ("loss", "generate"):
        expected += [f"plits {name} tracked", f"lal {name} tracked", *[f"plits {name}", f"lal {name}"] * 3]
    assert calls == expected


def test_out_of_memory_is_a_result(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Plits.loss

    def too_much(self: Plits, model: Any, connector: Any, batch: Any) -> Any:
        if batch.states.shape[1] == 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, model, connector, batch)

    monkeypatch.setattr(Plits, "loss", too_much)
    out = tmp_path / "out"
    assert run(*small(tiny, out), "--repeats", 1) == 0
    rows = json.loads((out / "figure1.json").read_text())["rows"]
    failed = [row for row in rows if row["status"] != "ok"]
    assert [(row["method"], row["mode"], row["audio_tokens"]) for row in failed] == [("plits", "train", 256)]
    (row,) = failed
    assert row["status"] == "out of memory"
    assert row["samples_per_second"] == {"p50": None, "samples": []}
    assert row["peak_memory_bytes"] is row["peak_above_static_bytes"] is None
    assert row["impl"] == "sdpa"
    assert len(rows) == 8
    assert "PLITS out of memory" in capsys.readouterr().out


def test_other_errors_are_not_taken_for_it(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Lal, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main([str(x) for x in small(tiny, tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_memory_really_running_out(tiny: Path, tmp_path: Path) -> None:
    """In a process whose machine seems to have little left: the limit turns a kill into a recorded point."""
    config = json.loads((tiny / "config.json").read_text())
    wide = tmp_path / "wide"
    wide.mkdir()
    # Logits of 900 audio tokens: 900 x 60000 x 4 bytes = 206 MiB, and several of them.
    (wide / "config.json").write_text(json.dumps({**config, "vocab_size": 60000}))
    out = tmp_path / "out"
    arguments = [str(x) for x in (*small(wide, out), "--audio-tokens", 900, "--repeats", 1)]
    code = f"""
from palkernels.bench import machine
from palkernels.bench.cli import main
machine.available_bytes = lambda: machine._MARGIN + 450 * 2**20
main({arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "figure1.json").read_text())["rows"]
    status = {(row["mode"], row["method"]): row["status"] for row in rows}
    assert status == {
        ("train", "plits"): "out of memory",
        ("train", "lal"): "ok",
        ("infer", "plits"): "ok",
        ("infer", "lal"): "ok",
    }


def test_equal_seeds_do_equal_work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step, infer = measure._train_step, measure._infer

    def train_step(*arguments: Any) -> torch.Tensor:
        seen.append((loss := step(*arguments)).item())
        return loss

    def generated(*arguments: Any) -> torch.Tensor:
        seen.extend((tokens := infer(*arguments)).flatten().tolist())
        return tokens

    monkeypatch.setattr(measure, "_train_step", train_step)
    monkeypatch.setattr(measure, "_infer", generated)
    runs = []
    for seed in (0, 0, 1):
        seen.clear()
        assert run(*small(tiny, tmp_path / "out"), "--audio-tokens", 16, "--repeats", 1, "--seed", seed) == 0
        runs.append(list(seen))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert all(map(math.isfinite, runs[0]))


def test_one_method_and_own_audio(tiny: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, np.zeros(4000, dtype=np.float32), 8000)
    out = tmp_path / "out"
    arguments = ["--methods", "lal", "--audio", clip, "--audio-tokens", 16, "--layers", 1, "--train-batch", 3]
    assert run(*small(tiny, out), *arguments) == 0
    document = json.loads((out / "figure1.json").read_text())
    assert [(row["method"], row["mode"], row["batch_size"]) for row in document["rows"]] == [
        ("lal", "train", 3),
        ("lal", "infer", 2),
    ]
    assert document["meta"]["audio_file"] == str(clip)
    assert document["meta"]["layers"] == 1


def mistakes(tmp_path: Path, tiny: Path) -> dict[str, list[object]]:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is not audio\n" * 100)
    soundfile.write(tmp_path / "whole.wav", np.zeros(16000, dtype=np.float32), 16000)
    cut = (tmp_path / "whole.wav").read_bytes()[:5000]
    (tmp_path / "cut.wav").write_bytes(cut)
    soundfile.write(tmp_path / "long.flac", np.zeros(601 * 4000, dtype=np.int16), 4000)
    (tmp_path / "file").touch()
    (tmp_path / "blocked" / "figure1.csv").mkdir(parents=True)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(**sizes, intermediate_size=32).save_pretrained(tmp_path / "bert")
    GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    return {
        "missing file": ["--audio", tmp_path / "none.wav"],
        "empty file": ["--audio", tmp_path / "empty.wav"],
        "no audio": ["--audio", tmp_path / "text.wav"],
        "cut file": ["--audio", tmp_path / "cut.wav"],
        "long file": ["--audio", tmp_path / "long.flac"],
        "a folder": ["--audio", tmp_path],
        "unknown model": ["--model", "llama-9"],
        "unsupported model": ["--model", tmp_path / "bert"],
        "other sizes": ["--model", tmp_path / "gpt2"],
        "too many layers": ["--layers", 4],
        "no layers": ["--layers", 0],
        "no number": ["--layers", "many"],
        "no counts": ["--audio-tokens", ""],
        "bad counts": ["--audio-tokens", "12,x"],
        "zero count": ["--audio-tokens", "0,12"],
        "same count twice": ["--audio-tokens", "12,12"],
        "more than the model takes": ["--audio-tokens", 2000],
        "one text token": ["--text-tokens", 1],
        "no batch": ["--train-batch", 0],
        "negative batch": ["--infer-batch", -1],
        "no new tokens": ["--new-tokens", 0],
        "no repeats": ["--repeats", 0],
        "bad seed": ["--seed", -1],
        "unknown method": ["--methods", "plits,magic"],
        "no method": ["--methods", ","],
        "unknown dtype": ["--dtype", "int8"],
        "unknown device": ["--device", "tpu"],
        "absent device": ["--device", "cuda:99"],
        "unknown encoder": ["--encoder-size", "huge"],
        "no checkpoint": ["--encoder-checkpoint", tmp_path / "none"],
        "a file as folder": ["--out", tmp_path / "file"],
        "a file above the folder": ["--out", tmp_path / "file" / "out"],
        "no place for a folder": ["--out", "/proc/none/out"],
        "a folder as file": ["--out", tmp_path / "blocked"],
        "nothing to resume": ["--resume"],
        "a measurement's option in a simulation": ["--simulate", "--device", "cpu", "--dtype", "fp32"],
        "unknown option": ["--no-such-option"],
    }


def test_every_mistake_is_one_line(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line that starts with "error: ", and no file left behind."""
    cases = mistakes(tmp_path, tiny)
    before = sorted(tmp_path.rglob("*"))
    for what, arguments in cases.items():
        assert run(*small(tiny, tmp_path / "out" / "deep"), *arguments) == 2, what
        error = capfd.readouterr().err
        assert error.startswith("error: "), (what, error)
        assert error.count("\n") == 1, (what, error)
        assert sorted(tmp_path.rglob("*")) == before, what


def test_results_of_an_earlier_run_survive_a_mistake(tiny: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text("earlier")
    assert run(*small(tiny, tmp_path), "--encoder-size", "huge") == 2
    assert [(tmp_path / name).read_text() for name in FILES] == ["earlier"] * 4
    assert len(list(tmp_path.iterdir())) == 4


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No speed figure comes from a run that computes nonsense."""
    real = Lal.loss
    monkeypatch.setattr(Lal, "loss", lambda self, *arguments: real(self, *arguments) * float("nan"))
    assert run(*small(tiny, tmp_path / "out")) == 2
    assert "LAL's training loss must be finite, got nan" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_batch_that_does_not_fit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs too large to be made are out of memory as well, and the other points are still measured."""
    make = Batch.make

    def fail(clip: Any, *rest: Any) -> Batch:
        if clip.shape[0] == 256:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return make(clip, *rest)

    monkeypatch.setattr(Batch, "make", fail)
    assert run(*small(tiny, tmp_path / "out")) == 0
    rows = json.loads((tmp_path / "out" / "figure1.json").read_text())["rows"]
    assert {row["audio_tokens"] for row in rows if row["status"] == "out of memory"} == {256}
    assert {row["audio_tokens"] for row in rows if row["status"] == "ok"} == {16}


@pytest.mark.parametrize(
    ("number", "code", "message"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_nothing(number: signal.Signals, code: int, message: str, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*map(str, small(tiny, out)), "--repeats", "100000"]
    command = [sys.executable, "-c", f"from palkernels.bench.cli import main; main({arguments!r})"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("Estimated"):
        assert line, process.communicate()
    time.sleep(1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_valid_and_goes_on(number: signal.Signals, code: int, tiny: Path, tmp_path: Path) -> None:
    """What was measured before the signal is written, and `--resume` measures the rest alone."""
    out = tmp_path / "out"
    arguments = [*map(str, small(tiny, out)), "--audio-tokens", "16,32,64,128"]
    command = [sys.executable, "-c", f"from palkernels.bench.cli import main; main({arguments!r})"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("train, 32 audio tokens"):
        assert line, process.communicate()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert sorted(path.name for path in out.iterdir()) == FILES
    first = json.loads((out / "figure1.json").read_text())
    assert first["meta"]["complete"] is False
    assert 4 <= len(first["rows"]) < 16

    assert run(*arguments, "--resume") == 0
    second = json.loads((out / "figure1.json").read_text())
    assert second["meta"]["complete"] is True
    assert second["meta"]["date"] == first["meta"]["date"]
    assert len(second["rows"]) == 16
    assert second["rows"][: len(first["rows"])] == first["rows"]


def test_resume_needs_the_same_conditions(
    measured: tuple[dict[str, Any], Path, str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = measured
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    assert run(*small(tiny, copy), "--resume", "--seed", 1) == 2
    assert "--resume must be given what the run in --out was given, got seed 0 and now 1" in capsys.readouterr().err
    before = json.loads((copy / "figure1.json").read_text())
    assert run(*small(tiny, copy), "--resume") == 0  # nothing is left to do
    assert json.loads((copy / "figure1.json").read_text()) == before


def test_all_methods_and_serving(tiny: Path, tmp_path: Path) -> None:
    """Levers have no inference; what cannot run here is a row that says why; serving has the two that it compares."""
    out = tmp_path / "out"
    arguments = ["--methods", "all", "--serving", "--audio-tokens", 16, "--repeats", 1, "--layers", 1]
    assert run(*small(tiny, out), *arguments) == 0
    document = json.loads((out / "figure1.json").read_text())
    rows = {(row["mode"], row["method"]): row for row in document["rows"]}
    assert {method for mode, method in rows if mode == "train"} == set(METHODS)
    assert {method for mode, method in rows if mode == "infer"} == set(DEFAULT_METHODS)
    assert rows["train", "lal-fused-loss"]["status"] == "needs a GPU"
    assert {row["status"] for key, row in rows.items() if key != ("train", "lal-fused-loss")} == {"ok"}
    serving = document["serving"]
    assert [(row["clips"], row["questions"], row["method"]) for row in serving] == [
        (clips, questions, method) for clips, questions in measure.SERVING for method in ("plits", "lal")
    ]
    per_token = 2 * 1 * 2 * 16 * 4  # K and V, layers, heads, head dim, bytes
    cached = {(row["clips"], row["questions"], row["method"]): row["kv_bytes_per_clip"] // per_token for row in serving}
    assert cached[1, 8, "plits"] == 8 * (16 + 16 + 2)
    assert cached[1, 8, "lal"] == 16 + 8 * (16 + 2)
    assert cached[12, 12, "plits"] == cached[12, 12, "lal"] == 16 + 16 + 2
    for row in serving:
        assert row["first_token_seconds"] > 0
        assert row["tokens_per_second"] is None or row["tokens_per_second"] > 0  # two tokens may drown in noise


def test_resume_sees_another_model_and_measures_points_that_lack_a_method(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory may hold another model than it did; a file may have been cut."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny, model)
    arguments = [*small(model, out), "--audio-tokens", 16, "--repeats", 1]
    assert run(*arguments) == 0
    document = json.loads((out / "figure1.json").read_text())
    cut = {"meta": document["meta"], "rows": document["rows"][1:]}
    (out / "figure1.json").write_text(json.dumps(cut))
    assert run(*arguments, "--resume") == 0
    rows = json.loads((out / "figure1.json").read_text())["rows"]
    assert sorted((row["mode"], row["method"]) for row in rows) == sorted(
        (mode, method) for mode in ("train", "infer") for method in ("plits", "lal")
    )
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    assert run(*arguments, "--resume") == 2
    assert "got digests {'model config': " in capsys.readouterr().err
    (out / "figure1.json").write_text(json.dumps({"meta": {}, "rows": []}))
    assert run(*arguments, "--resume") == 2
    assert "--resume must find a run of this version of figure1" in capsys.readouterr().err


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


def test_help_loads_no_model_library() -> None:
    code = """
import sys
import sysconfig
from palkernels.bench.cli import main
try:
    main(["figure1", "--help"])
except SystemExit:
    pass
assert not {"transformers", "matplotlib", "triton"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
