"""Tables say what the points are; figures are written alike everywhere."""

from typing import Any

import pytest
from support import documents

from palkernels.bench.report import tables
from palkernels.bench.report.compiled import compiled
from palkernels.bench.report.markdown import to_markdown
from palkernels.bench.report.points import MEMORY, RATE, Points
from palkernels.bench.report.table import Column, Table, change, gib, number


def test_a_table_of_points_without_baselines() -> None:
    rows = [documents.row("lal", "train", 512, 6.0, 3.0, 0.5)]
    assert tables.every_point(Points(rows), "train").rows == [["512", "LAL", "sdpa", "3.00", "0.50", "6.00"]]
    assert tables.paper(Points(rows)) is None


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.0734, "0.0734"), (7.28, "7.28"), (99.96, "100"), (5440.3, "5,440"), (-123.4, "-123"), (0, "0.00")],
)
def test_numbers(x: float, text: str) -> None:
    assert number(x) == text


@pytest.mark.parametrize(("size", "text"), [(79.274, "79.27"), (0.0351, "0.04"), (0.00351, "0.0035"), (4e-9, "0.00")])
def test_sizes(size: float, text: str) -> None:
    assert gib(size) == text


def test_changes() -> None:
    assert change(-0.641) == "-64.1 %"
    assert change(0.02) == "+2.0 %"
    assert change(-0.0001) == "+0.0 %"
    assert change(None) == ""


def test_gains_are_the_table_under_a_plot() -> None:
    points = Points(documents.simulated()["rows"])
    table = tables.gains(points, "train", RATE, documents.GPUS[0])
    assert [column.heading for column in table.columns] == ["", "512"]
    assert table.rows == [["LAL vs PLITS", "5.00x"], ["LAL vs tuned", "4.00x"]]
    table = tables.gains(points, "infer", MEMORY, None)
    assert table.rows == [["LAL vs PLITS", "-50.0 %"], ["LAL vs tuned", ""]]


def test_markdown() -> None:
    table = Table("not written", [Column("", text=True), Column("GiB", "peak"), Column("ms")])
    table.rows = [["a|b", "1.00", "2"], ["c", "out of memory"]]
    assert to_markdown(table).splitlines() == [
        "|  | peak GiB | ms |",
        "| --- | ---: | ---: |",
        r"| a\|b | 1.00 | 2 |",
        "| c | out of memory |  |",
    ]


def test_compiled_generation() -> None:
    def row(method: str, eager: float, rate: float, status: str = "ok") -> dict[str, Any]:
        sizes = {"audio_tokens": 1500, "text_tokens": 128, "new_tokens": 32, "batch_size": 12, "dtype": "bfloat16"}
        rates = {"samples_per_second": {"p50": eager}, "compiled_samples_per_second": {"p50": rate}}
        return {"method": method, "status": status, **sizes, **rates}

    table = compiled([row("plits", 20.0, 50.0), row("lal", 10.0, 200.0, "compiled 1 times while timed")])
    assert table is not None
    assert table.title == "Generation with compiled steps: batch 12, 128 text tokens, 32 new tokens, bfloat16"
    assert table.rows == [
        ["1,500", "PLITS", "20.0", "50.0", "2.50x", "", "ok"],
        ["1,500", "LAL", "10.0", "200", "20.00x", "4.00x", "compiled 1 times while timed"],
    ]
    assert compiled([]) is None


def test_clips_that_fill_a_part_of_the_window() -> None:
    table = tables.short_clips(documents.short_clips())
    assert table is not None
    assert table.rows == [
        ["0.8", "40", "PLITS", "2.00", "", "1.00", ""],
        ["0.8", "40", "LAL", "3.00", "1.50x", "0.700", "-30.0 %"],
        ["30", "1,500", "PLITS", "0.500", "", "4.00", ""],
        ["30", "1,500", "LAL", "1.00", "2.00x", "1.00", "-75.0 %"],
    ]
    on_gpu = tables.short_clips(documents.short_clips(on_gpu=True))
    assert on_gpu is not None
    assert [row[3:] for row in on_gpu.rows] == [["2.00", ""], ["3.00", "1.50x"], ["0.500", ""], ["1.00", "2.00x"]]
    assert tables.short_clips([]) is None
