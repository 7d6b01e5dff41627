"""`palkernels figure1` where something is wrong: too little memory, a loss that is no number, mistakes of the user."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from support.commands import running, with_little_memory
from support.figure1 import FILES, run, small
from transformers import BertConfig, GPT2Config

from palkernels.bench.cli import main
from palkernels.bench.methods import Batch
from palkernels.bench.methods.lal import Lal
from palkernels.bench.methods.plits import Plits


@pytest.mark.usefixtures("no_pictures")
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


@pytest.mark.usefixtures("no_pictures")
def test_other_errors_are_not_taken_for_it(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Lal, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main([str(x) for x in (*small(tiny, tmp_path / "out"), "--repeats", 1)])
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
    with running(arguments, tmp_path, with_little_memory) as command:
        ended, _, error = command.end()
    assert ended == 0, error
    rows = json.loads((out / "figure1.json").read_text())["rows"]
    status = {(row["mode"], row["method"]): row["status"] for row in rows}
    assert status == {
        ("train", "plits"): "out of memory",
        ("train", "lal"): "ok",
        ("infer", "plits"): "ok",
        ("infer", "lal"): "ok",
    }


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


@pytest.mark.usefixtures("no_pictures")
def test_a_loss_that_is_not_finite_stops_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No speed figure comes from a run that computes nonsense."""
    real = Lal.loss
    monkeypatch.setattr(Lal, "loss", lambda self, *arguments: real(self, *arguments) * float("nan"))
    assert run(*small(tiny, tmp_path / "out"), "--repeats", 1) == 2
    assert "LAL's training loss must be finite, got nan" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_batch_that_does_not_fit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs too large to be made are out of memory as well, and the other points are still measured."""
    make = Batch.make

    def fail(clip: Any, *rest: Any) -> Batch:
        if clip.shape[0] == 256:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return make(clip, *rest)

    monkeypatch.setattr(Batch, "make", fail)
    assert run(*small(tiny, tmp_path / "out"), "--repeats", 1) == 0
    rows = json.loads((tmp_path / "out" / "figure1.json").read_text())["rows"]
    assert {row["audio_tokens"] for row in rows if row["status"] == "out of memory"} == {256}
    assert {row["audio_tokens"] for row in rows if row["status"] == "ok"} == {16}
