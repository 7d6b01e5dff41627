"""The picture comes from the JSON alone and says what was measured."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from palkernels.bench import plot, results
from palkernels.bench.errors import UserError

GIB = 2**30


def row(method: str, mode: str, count: int, speed: float | None, memory: float, above: float) -> dict[str, Any]:
    fits = speed is not None
    return {
        "method": method,
        "mode": mode,
        "audio_tokens": count,
        "text_tokens": 128,
        "batch_size": 2,
        "dtype": "bfloat16",
        "impl": "sdpa",
        "samples_per_second": {"p50": speed, "samples": [speed, speed] if fits else []},
        "peak_memory_bytes": int(memory * GIB) if fits else None,
        "peak_above_static_bytes": int(above * GIB) if fits else None,
        "memory_source": "tracked tensor allocations",
        "source": "measured",
        "status": "ok" if fits else "out of memory",
    }


@pytest.fixture
def document() -> dict[str, Any]:
    meta = {
        "device": "cpu",
        "device_name": "Some Processor",
        "threads": 2,
        "versions": {"palkernels": "0.1.0", "torch": "2.11.0", "transformers": "5.23.0"},
        "date": "2026-01-02T03:04:05+00:00",
        "model": "llama-3.2-1b",
        "layers": 2,
        "full_layers": 16,
        "llm_weights": "random (seed 0)",
        "encoder": "whisper-tiny",
        "encoder_weights": "random (seed 0)",
        "connector": "MLP, random (seed 0)",
        "optimizer": "fused AdamW",
        "text_tokens": 128,
        "new_tokens": 8,
        "train_batch": 2,
        "infer_batch": 1,
        "dtype": "bfloat16",
        "repeats": {"train": 2, "infer": 5},
    }
    rows = [
        row("plits", "train", 512, 2.0, 4.0, 2.0),
        row("lal", "train", 512, 6.0, 3.0, 0.5),
        row("plits", "train", 1500, None, 0, 0),
        row("lal", "train", 1500, 5.0, 3.5, 0.7),
        row("plits", "infer", 512, 10.0, 1.0, 0.2),
        row("lal", "infer", 512, 15.0, 0.9, 0.1),
    ]
    return {"meta": meta, "rows": rows}


def texts(document: dict[str, Any]) -> list[str]:
    return [text.get_text() for text in plot.draw(document).findobj(Text)]


def test_says_gains_conditions_and_failures(document: dict[str, Any]) -> None:
    found = texts(document)
    for gain in ("3.00x", "-25.0 %", "-75.0 %", "1.50x", "-10.0 %", "-50.0 %"):
        assert found.count(gain) == 1, gain
    assert found.count("out of memory") == 3  # memory, memory above the static part, throughput
    everything = "\n".join(found)
    for said in (
        "llama-3.2-1b, 2 of 16 layers, bfloat16, on Some Processor",
        "batch 2, 128 text tokens",
        "batch 1, 128 text tokens, 8 new tokens",
        "arXiv 2506.10423 v2, full-depth LLM",
        "audio encoder whisper-tiny, weights random (seed 0)",
    ):
        assert said in everything


def test_the_papers_headline_is_held_against_our_baseline(document: dict[str, Any]) -> None:
    figure = plot.draw(document)
    memory, _, throughput = figure.axes[:3]
    (line,) = [line for line in throughput.lines if line.get_linestyle() == ":"]
    assert list(line.get_ydata()) == [2.0 * 3.475]  # type: ignore[arg-type]
    (line,) = [line for line in memory.lines if line.get_linestyle() == ":"]
    assert list(line.get_ydata()) == [pytest.approx(4.0 * 0.359)]  # type: ignore[arg-type]


def test_draws_with_one_method_or_mode_and_nothing_that_fits(document: dict[str, Any]) -> None:
    rows = document["rows"]
    for some in (rows[:2], rows[4:], [r for r in rows if r["method"] == "lal"], [rows[2]], []):
        assert plot.render({**document, "rows": some}).startswith(b"\x89PNG")
    other = [{**rows[0], "method": "third"}]
    assert plot.render({**document, "rows": rows + other}).startswith(b"\x89PNG")


def test_command(document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "figure1.json", tmp_path / "again.png"
    source.write_text(json.dumps(document))
    assert plot.main([str(source), str(target)]) == 0
    width, height = struct.unpack(">II", target.read_bytes()[16:24])
    assert width > 1200
    assert height > 700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.png", "figure1.json"]
    source.write_text("{}")
    for arguments in ([str(source), str(target)], [str(tmp_path / "none"), str(target)], [str(source)]):
        assert plot.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_comparisons(document: dict[str, Any]) -> None:
    rows = document["rows"]
    base = results.baseline_of(rows[1], rows)
    assert base == rows[0]
    assert results.speed_up(rows[1], base) == 3.0
    assert results.reduction(rows[1], base, "peak_memory_bytes") == 0.25
    assert results.baseline_of(rows[0], rows) is None  # the baseline itself
    assert results.baseline_of(rows[3], rows) is None  # the baseline did not fit


def test_percent() -> None:
    assert results.percent(0.641) == "-64.1 %"
    assert results.percent(-0.02) == "+2.0 %"
    assert results.percent(0.0001) == "+0.0 %"
    assert results.percent(None) == ""


def test_csv_has_a_line_per_row(document: dict[str, Any]) -> None:
    lines = results.csv_text(document["rows"], "random (seed 0)").splitlines()
    assert len(lines) == 1 + len(document["rows"])
    assert "samples_per_second_p50" in lines[0]
    assert "2.0 2.0" in lines[1]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_files_are_written_all_or_none(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")
    real, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises((UserError, KeyboardInterrupt)):
        results.write_all(tmp_path, {"a": b"new", "b": b"new", "c": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_is_made_and_removed_with_its_run(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"

    def fail() -> None:
        assert out.is_dir()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), results.writable_folder(out, ("a",)):
        fail()
    assert list(tmp_path.iterdir()) == []
    with results.writable_folder(out, ("a",)):
        pass
    assert out.is_dir()
    with pytest.raises(ZeroDivisionError), results.writable_folder(out, ("a",)):
        fail()
    assert out.is_dir()  # it was there before
