"""`palkernels figure1` through its command line, on a model small enough for seconds."""

import csv
import functools
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from support.figure1 import FILES, run, small, tiny_config
from support.towers import SMALL_TOWERS, whisper_checkpoint

from palkernels.bench import machine, presets
from palkernels.bench.experiments import compiled, figure1, measure
from palkernels.bench.experiments.settings import Options
from palkernels.bench.methods import DEFAULT_METHODS, METHODS, Method
from palkernels.bench.methods.lal import Lal
from palkernels.bench.methods.plits import Plits
from palkernels.model.encoders.whisper import WHISPER_SIZES


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


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_the_defaults_fit_eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer, and none of what is measured is broken."""
    monkeypatch.setitem(presets.PRESETS, "smollm2-135m", tiny_config)
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: True)  # the longer of both dtypes' names
    text = io.StringIO()
    monkeypatch.setitem(WHISPER_SIZES, "tiny", SMALL_TOWERS["whisper"])
    figure1.run(Options(device="cpu", out=tmp_path / "out"), Console(width=80, file=text))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "smollm2-135m, all 3 layers, bfloat16, on cpu; LLM weights random (seed 0)"
    rows = json.loads((tmp_path / "out" / "figure1.json").read_text())["rows"]
    for plits, lal in zip(rows[::2], rows[1::2], strict=True):
        rates = (f"{row['samples_per_second']['p50']:.3g} samples/s" for row in (plits, lal))
        point = f"{plits['mode']}, {plits['audio_tokens']} audio tokens: PLITS {next(rates)}, LAL {next(rates)}"
        assert point in lines


@pytest.mark.usefixtures("no_pictures")
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


@pytest.mark.usefixtures("no_pictures")
def test_equal_seeds_do_equal_work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step, infer = measure._train_step, measure.infer

    def train_step(*arguments: Any) -> torch.Tensor:
        seen.append((loss := step(*arguments)).item())
        return loss

    def generated(*arguments: Any) -> torch.Tensor:
        seen.extend((tokens := infer(*arguments)).flatten().tolist())
        return tokens

    monkeypatch.setattr(measure, "_train_step", train_step)
    monkeypatch.setattr(measure, "infer", generated)
    runs = []
    for seed in (0, 0, 1):
        seen.clear()
        assert run(*small(tiny, tmp_path / "out"), "--audio-tokens", 16, "--repeats", 1, "--seed", seed) == 0
        runs.append(list(seen))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert all(map(math.isfinite, runs[0]))


@pytest.mark.usefixtures("no_pictures")
def test_one_method_and_own_audio(tiny: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, np.zeros(4000, dtype=np.float32), 8000)
    out = tmp_path / "out"
    arguments = [
        "--methods",
        "lal",
        "--audio",
        clip,
        "--audio-tokens",
        16,
        "--layers",
        1,
        "--train-batch",
        3,
        "--repeats",
        1,
    ]
    assert run(*small(tiny, out), *arguments) == 0
    document = json.loads((out / "figure1.json").read_text())
    assert [(row["method"], row["mode"], row["batch_size"]) for row in document["rows"]] == [
        ("lal", "train", 3),
        ("lal", "infer", 2),
    ]
    assert document["meta"]["audio_file"] == str(clip)
    assert document["meta"]["layers"] == 1


@pytest.mark.usefixtures("no_pictures")
def test_all_methods_and_serving(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levers have no inference; what cannot run here is a row that says why; serving has the two that it compares."""
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)  # must not be imported
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


@pytest.mark.usefixtures("no_pictures")
def test_clips_that_fill_a_part_of_the_window(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole models train on clips of 0.8 and 3 s: 40 and 150 of the encoder's 1,500 states are valid."""
    out = tmp_path / "out"
    whisper_checkpoint(tmp_path / "whisper")
    arguments = ["--audio-tokens", 16, "--repeats", 1, "--clip-seconds", "0.8,3"]
    arguments += ["--encoder-checkpoint", tmp_path / "whisper"]
    assert run(*small(tiny, out), *arguments) == 0
    rows = json.loads((out / "figure1.json").read_text())["short_clips"]
    assert [(row["seconds"], row["audio_tokens"], row["method"]) for row in rows] == [
        (seconds, states, method) for seconds, states in ((0.8, 40), (3.0, 150)) for method in ("plits", "lal")
    ]
    assert all(row["window_tokens"] == 1500 and row["batch_size"] == 2 for row in rows)
    assert all(row["samples_per_second"]["p50"] > 0 and row["processor_seconds_per_sample"] > 0 for row in rows)
    assert "Whole models, training: batch 2, 16 text tokens" in capsys.readouterr().out
    assert run(*small(tiny, out), *arguments, "--resume") == 0
    assert json.loads((out / "figure1.json").read_text())["short_clips"] == rows  # measured once


@pytest.mark.usefixtures("no_pictures")
def test_generation_with_compiled_steps(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "CompileConfig", functools.partial(compiled.CompileConfig, backend="eager"))
    out = tmp_path / "out"
    arguments = ["--audio-tokens", 16, "--repeats", 2, "--new-tokens", 5, "--compiled"]
    assert run(*small(tiny, out), *arguments) == 0
    rows = json.loads((out / "figure1.json").read_text())["compiled"]
    assert [(row["method"], row["audio_tokens"]) for row in rows] == [("plits", 16), ("lal", 16)]
    assert all(row["status"] == "ok" for row in rows)
    for row in rows:
        assert row["graphs"] >= 1  # compiled while it warmed up, and not since
        for key in ("samples_per_second", "compiled_samples_per_second"):
            assert len(row[key]["samples"]) == 2
            assert row[key]["p50"] > 0
    assert "Generation with compiled steps: batch 2, 16 text tokens, 5 new tokens" in capsys.readouterr().out
    assert run(*small(tiny, out), *arguments, "--resume") == 0
    assert json.loads((out / "figure1.json").read_text())["compiled"] == rows  # measured once


@pytest.mark.parametrize("text", ["0", "31", "1,x", "nan"])
def test_clips_that_no_window_holds_are_refused(text: str, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*small(tiny, out), "--clip-seconds", text) == 2
    assert not out.exists()
