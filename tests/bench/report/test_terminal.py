"""Tables on a terminal fit it, and show what a document says as it is."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import documents

from palkernels.bench.report import tables
from palkernels.bench.report.points import Points
from palkernels.bench.report.table import Column, Table
from palkernels.bench.report.terminal import layout, print_points, print_table

RESULTS = Path(__file__).parents[3] / "bench" / "results"
COMMITTED = ("figure1-cpu", "simulate-llama-3.2-1b", "simulate-llama-3.2-3b", "simulate-qwen2.5-1.5b")


def printed(document: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_points(document, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", COMMITTED)
def test_every_method_fits_80_columns(name: str) -> None:
    """No line is longer, and each point is one line with all of its figures."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    lines = printed(document).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("\u2026" in line for line in lines)
    for mode in ("train", "infer"):
        for index, row in enumerate((table := tables.summary(Points(document["rows"]), mode)).rows):
            cells = row[table.is_repeat(index) :]
            assert any(line.split() == " ".join(cells).split() for line in lines), cells


def test_the_default_methods_of_a_cpu_fit_80_columns() -> None:
    text = printed(documents.measured())
    assert max(map(len, text.splitlines())) <= 80
    assert "1,500 PLITS   out of memory" in text
    assert "512 PLITS   4.00" in text
    assert "LAL     3.00 -25.0 %  0.50 -75.0 %       6.00 3.00x" in text
    for words in ("change", "speed-up", "Attention by sdpa: PLITS; LAL.", "Encoder weights: random (seed 0)."):
        assert words in text


def test_a_second_device_takes_the_place_of_memory_above_static() -> None:
    text = printed(documents.simulated())
    assert "Simulated, not measured." in text
    assert "above static" not in text
    heading = next(line for line in text.splitlines() if "throughput" in line)
    assert heading.split() == ["peak", "memory", "throughput", "A100", "throughput", "H200"]
    assert "LAL                   4.00 -75.0 %       10.0 5.00x       20.0 5.00x" in text


def test_eager_mode_has_a_table_of_its_own() -> None:
    text = printed(documents.simulated_eager())
    assert max(map(len, text.splitlines())) <= 80 + len("each kernel; the slower one counts.")
    captured, eager = (line.split() for line in text.splitlines() if "LAL      " in line and "10.0" in line)
    assert captured == ["LAL", "4.00", "-75.0", "%", "10.0", "5.00x", "20.0", "5.00x"]
    assert eager == ["LAL", "5.00", "2.50x", "10.0", "2.50x"]
    assert "Captured: a step is one CUDA graph." in text


def test_each_number_of_text_tokens_has_its_table() -> None:
    document = documents.measured()
    document["rows"] += [{**row, "text_tokens": 64} for row in document["rows"]]
    text = printed(document)
    for count in (64, 128):
        assert f"Training step: batch 2, {count} text tokens" in text


def test_a_run_without_the_baseline_names_no_gains() -> None:
    document = documents.measured()
    document["rows"] = [row for row in document["rows"] if row["method"] == "lal"]
    assert "PLITS" not in printed(document)


def test_groups_stand_over_their_columns() -> None:
    table = Table("", [Column("audio tokens"), Column("method", text=True)])
    table.columns += [Column("GiB", "peak"), Column("vs PLITS", "peak")]
    table.rows = [["1,500", "a", "1.00", ""], ["1,500", "b", "12.00", "-5.0 %"], ["3,000", "c", "out of memory"]]
    assert layout(table, 80) == [
        "                   peak",
        " audio                   vs",
        "tokens method    GiB  PLITS",
        "-------------  ------------",
        " 1,500 a        1.00",
        "       b       12.00 -5.0 %",
        " 3,000 c       out of memory",
    ]


def test_only_text_is_folded_where_a_table_is_too_wide() -> None:
    table = Table("", [Column("", text=True), Column("GiB")], [["some words that are too long", "123,456,789"]])
    heading, rule, *lines = layout(table, 32)
    assert heading.split() == ["GiB"]
    assert rule == "-" * 32
    assert lines == ["some words that are  123,456,789", "too long"]
    assert max(map(len, layout(table, 5))) == 12 + 1 + len("123,456,789")  # figures stay whole


def test_brackets_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_table(Table("[red]title", [Column("[bold]heading", text=True)], [["[/bold] cell"], ["[link"]]), console)
    assert isinstance(console.file, io.StringIO)
    for words in ("[red]title", "[bold]heading", "[/bold] cell", "[link"):
        assert words in console.file.getvalue()
    document = documents.measured()
    document["meta"]["encoder_weights"] = "[/weights]"
    document["rows"][0]["impl"] = "[/sdpa]"
    for words in ("[/weights]", "[/sdpa]"):
        assert words in printed(document)
