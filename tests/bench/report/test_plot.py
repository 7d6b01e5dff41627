"""The picture comes from the JSON alone and says what was measured."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from support import documents

from palkernels.bench.methods import METHODS
from palkernels.bench.report import charts, plot
from palkernels.bench.report.points import Points
from palkernels.bench.report.roles import style_of


@pytest.fixture
def document() -> dict[str, Any]:
    return documents.measured()


def texts(document: dict[str, Any]) -> list[str]:
    return [text.get_text() for text in plot.draw(document).findobj(Text)]


def test_says_gains_conditions_and_failures(document: dict[str, Any]) -> None:
    written = texts(document)
    for gain in ("3.00x", "-25.0 %", "-75.0 %", "1.50x", "-10.0 %", "-50.0 %"):
        assert written.count(gain) == 1, gain
    assert written.count("out of memory") == 3  # memory, memory above the static part, throughput
    everything = "\n".join(written)
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


def test_a_simulation_shows_memory_once_and_each_gpus_throughput() -> None:
    figure = plot.draw(documents.simulated())
    assert [ax.get_title() for ax in figure.axes[:3]] == ["peak memory", "throughput on A100", "throughput on H200"]
    drawn = [{to_hex(line.get_color()) for line in ax.lines if line.get_linestyle() != ":"} for ax in figure.axes[:3]]
    shown = {style_of(method).color for method in ("plits", "plits-tuned", "lal-eager", "lal")}  # and no lever
    assert drawn == [shown] * 3
    everything = "\n".join(text.get_text() for text in figure.findobj(Text))
    for said in ("simulated for A100 and H200", "simulated, not measured", "-75.0 %", "-60.0 %", "5.00x", "4.00x"):
        assert said in everything
    assert METHODS["lal-recompute"].label not in everything


def test_eager_mode_has_panels_of_its_own() -> None:
    document = documents.simulated_eager()
    figure = plot.draw(document)
    ways = [f"throughput on {gpu}, {how}" for gpu in ("A100", "H200") for how in ("captured", "eager")]
    assert [ax.get_title() for ax in figure.axes[:5]] == ["peak memory", *ways]
    lengths = charts.draw_lengths(document, "train").axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in lengths[1].lines}  # type: ignore[arg-type]
    assert drawn["LAL, H200"] == [pytest.approx(4.0 * count) for count in (64, 128, 256)]


def test_every_method_has_a_colour_and_a_marker_of_its_own() -> None:
    styles = [style_of(method) for method in (*METHODS, "an unknown one")]
    for looks in ([style.color for style in styles], [style.marker for style in styles]):
        assert len(set(looks)) == len(METHODS) + 1


@pytest.mark.parametrize("document", [documents.simulated(), documents.simulated_eager()])
def test_what_is_written_does_not_overlap(document: dict[str, Any]) -> None:
    for count in (1024, 1500, 3000):
        more = [{**row, "audio_tokens": count} for row in document["rows"] if row["audio_tokens"] == 512]
        document["rows"] += more
    figure = plot.draw(document)
    figure.canvas.draw()
    for ax in figure.axes:
        labels = [text for text in ax.texts if text.get_text().strip()] + ax.get_xticklabels()
        boxes = [text.get_window_extent() for text in labels]
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:index]), labels[index].get_text()


def test_a_picture_says_of_which_results_it_is(document: dict[str, Any]) -> None:
    same = json.loads(json.dumps(document, indent=4, sort_keys=True))
    assert plot.digest(document) == plot.digest(same)
    assert plot.digest(document).encode() in plot.render(document)
    document["rows"][0]["peak_memory_bytes"] += 1
    assert plot.digest(document) != plot.digest(same)


def test_bars_show_what_memory_consists_of() -> None:
    document = documents.simulated()
    figure = charts.draw_memory(document["meta"], Points(document["rows"]))
    train, infer = figure.axes
    assert [label.get_text() for label in infer.get_yticklabels()] == ["PLITS", "LAL, eager", "LAL"]
    ends = {round(bar.get_x() + bar.get_width(), 6) for bar in train.patches}
    assert {16.0, 10.0, 6.0, 4.0, 3.0} <= ends  # each method's peak
    assert "LAL, fused loss" not in [label.get_text() for label in train.get_yticklabels()]  # it did not run


def test_lengths_are_drawn_with_their_exponents() -> None:
    figure = charts.draw_lengths(documents.simulated(), "train")
    time, memory, flops = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in time.lines}  # type: ignore[arg-type]
    assert drawn["PLITS, A100: p = 1.25"] == [pytest.approx(2.0 * count) for count in (64, 128, 256)]
    assert "LAL, H200: p = 1.25" in drawn
    assert [line.get_label() for line in memory.lines] == ["PLITS: p = 1.00", "LAL: p = 1.00"]
    assert [line.get_label() for line in flops.lines] == ["PLITS", "LAL"]  # no growth was found


def test_draws_with_one_method_or_mode_and_nothing_that_fits(document: dict[str, Any]) -> None:
    rows = document["rows"]
    for some in (rows[:2], rows[4:], [r for r in rows if r["method"] == "lal"], [rows[2]], []):
        assert plot.render({**document, "rows": some}).startswith(b"\x89PNG")
    other = [{**rows[0], "method": "third"}]
    assert plot.render({**document, "rows": rows + other}).startswith(b"\x89PNG")


def test_dollar_signs_are_no_formula(document: dict[str, Any]) -> None:
    document["meta"]["model"] = r"$\nothing$"
    document["meta"]["connector"] = "$^$"
    assert plot.render(document).startswith(b"\x89PNG")


def test_more_devices_than_dashes() -> None:
    document = documents.simulated()
    sweep = [row for row in document["lengths"] if row["device"] == documents.GPUS[0]]
    document["lengths"] += [{**row, "device": f"GPU {index}"} for row in sweep for index in range(3)]
    time, *_ = charts.draw_lengths(document, "train").axes
    assert len(time.lines) == 2 * 5


def test_command(document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "figure1.json", tmp_path / "again.png"
    source.write_text(json.dumps(document))
    assert plot.main([str(source), str(target)]) == 0
    width, height = struct.unpack(">II", target.read_bytes()[16:24])
    assert width > 1200
    assert height > 700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.png", "figure1.json"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**document, "meta": {**document["meta"], "versions": "none"}}))
    source.write_text("{}")
    for arguments in (
        [str(other), str(target)],
        [str(source), str(target)],
        [str(tmp_path / "none"), str(target)],
        [str(source)],
    ):
        assert plot.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
