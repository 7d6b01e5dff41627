"""A report holds the document's figures, and nothing from elsewhere."""

import copy
import functools
import re
from html.parser import HTMLParser
from typing import Any

from support import documents

from palkernels.bench.methods import METHODS
from palkernels.bench.report import html


class Page(HTMLParser):
    """The text of each section, its tables as lists of rows, and every reference."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.references: list[str] = []
        self.tags: set[str] = set()
        self._section, self._cell = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.tags.add(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "section":
            self._section = named["id"] or ""
        elif tag == "table":
            self.tables.setdefault(self._section, []).append([])
        elif tag == "tr":
            self.tables[self._section][-1].append([])
        self._cell = tag in ("td", "th")
        if self._cell:
            self.tables[self._section][-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = False

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if self._cell:
            self.tables[self._section][-1][-1][-1] += data


def page(document: dict[str, Any]) -> Page:
    return Page(html.report_page(document))


@functools.cache
def simulated_page() -> Page:
    return page(documents.simulated())


def test_it_opens_from_a_file_alone() -> None:
    report = simulated_page()
    assert report.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert all(x.startswith(("data:image/svg+xml;base64,", "#")) for x in report.references)
    links = {x[1:] for x in report.references if x.startswith("#")}
    assert links == set(report.sections) - {""}
    assert not re.search(r"@import|url\(", html.report_page(documents.simulated()))


def test_conditions_of_a_simulation() -> None:
    said = simulated_page().sections["conditions"]
    for words in (
        "NVIDIA A100-SXM4-80GB: 80 % of 300 TFLOP/s and 90 % of 2.00 TB/s",
        "all 16 layers",
        "bfloat16 in training, float16 in inference",
        "torch 2.11.0",
        "the encoder; the optimizer, its states included; the host",
        "2026-01-02",
    ):
        assert words in said
    command = " ".join(said.split()).partition("palkernels simulate ")[2]
    assert command.strip() == "--model llama-3.2-1b --audio-tokens 512 --lengths --no-serving"
    assert "liger-kernel" not in said  # not installed


def test_conditions_of_a_measurement() -> None:
    said = page(documents.measured()).sections["conditions"]
    for words in ("Some Processor (cpu), 2 CPU threads", "2 of 16 layers", "2 training steps, 5 inferences"):
        assert words in said
    assert "On a CPU the defaults are reduced: 2 of 16 layers." in said
    assert "palkernels figure1 --audio 'my clip.wav' --model llama-3.2-1b" in " ".join(said.split())
    assert "points are missing" not in said
    document = documents.measured()
    document["meta"]["complete"] = False
    assert "points are missing" in page(document).sections["conditions"]


def test_methods_are_explained() -> None:
    said = simulated_page().sections["methods"]
    assert METHODS["lal-eager"].about in said
    assert METHODS["plits-pooled"].about not in said  # it is not in the document


def test_every_point_with_both_baselines() -> None:
    train, infer = simulated_page().tables["points"]
    lines = {line[1]: line for line in train}
    lal = ["", "LAL", "sdpa", "4.00", "-75.0 %", "-60.0 %", "3.00", "-80.0 %", "-66.7 %"]
    assert lines["LAL"] == [*lal, "10.0", "5.00x", "4.00x", "20.0", "5.00x", "4.00x"]
    assert lines["PLITS"][:5] == ["512", "PLITS", "sdpa", "16.00", ""]
    assert lines["LAL, fused loss"][3:] == ["not installed: liger-kernel"]
    assert [line[1] for line in infer[2:]] == ["PLITS", "LAL, eager", "LAL"]


def test_an_error_stands_beside_its_figure() -> None:
    document = documents.simulated()
    assert "error" not in page(document).sections["points"]
    lal = next(row for row in document["rows"] if (row["method"], row["device"]) == ("lal", documents.GPUS[1]))
    lal["error_against_measured"] = {"peak_memory_bytes": 0.05, "samples_per_second": 0.5}
    head, *lines = page(document).tables["points"][0][1:]
    line = next(line for line in lines if line[1] == "LAL")
    assert [x for name, x in zip(head, line, strict=True) if name == "error"] == ["+5.0 %", "", "+50.0 %"]


def test_the_paper_beside_ours() -> None:
    (table,) = simulated_page().tables["paper"]
    lines = {line[0]: line[1:] for line in table}
    assert lines["Training step: peak memory, against PLITS"] == ["-64.1 % (v2), about -60 % (v3)", "-75.0 %"]
    assert lines["Training step: peak memory, against PLITS, tuned"] == ["", "-60.0 %"]
    assert lines["Training step: throughput on H200, against PLITS"] == ["+247.5 % (v2), about +190 % (v3)", "+400.0 %"]
    assert lines["Inference: peak memory, against PLITS"] == ["-83 % (as others report it)", "-50.0 %"]
    assert "Inference: peak memory, against PLITS, tuned" not in lines  # it was not run


def test_where_the_gain_comes_from() -> None:
    memory, _, time, *_ = simulated_page().tables["gain"]
    assert [line[1:] for line in memory[2:]] == [
        ["16.00", ""],
        ["-6.00", "50.0 %"],
        ["-4.00", "33.3 %"],
        ["-2.00", "16.7 %"],
        ["4.00", ""],
        ["-12.00", "100.0 %"],
    ]
    assert [line[1] for line in time[2:]] == ["1,000", "-200", "-400", "-200", "200", "-800"]


def test_what_memory_consists_of() -> None:
    train, _ = simulated_page().tables["memory"]
    assert train[1] == ["audio tokens", "method", "parameters", "activations", "peak"]
    assert train[2] == ["512", "PLITS", "1.00", "15.00", "16.00"]


def test_levers_against_lal() -> None:
    (table,) = simulated_page().tables["levers"]
    lal, recompute, fused = table[2:]
    assert lal[2:] == ["4.00", "", "3.00", "", "200", "", "100", ""]
    assert recompute[2:] == ["3.00", "-25.0 %", "2.00", "-33.3 %", "250", "+25.0 %", "125", "+25.0 %"]
    assert fused[2:] == ["not installed: liger-kernel"]


def test_serving_and_exponents() -> None:
    report = simulated_page()
    (table,) = report.tables["serving"]
    lal = ["", "8", "LAL", "100", "-75.0 %", "50.0", "-75.0 %", "1,500", "1.50x"]
    assert table[3] == [*lal, "25.0", "-75.0 %", "3,000", "1.50x"]
    (table,) = report.tables["lengths"]
    assert table[2] == ["Training step", "audio tokens", "1.25", "1.25", "1.25", "1.25", "1.00", "1.00", "", ""]


def test_eager_mode_beside_captured_graphs() -> None:
    report = page(documents.simulated_eager())
    groups, heads, *lines = report.tables["points"][0]
    assert groups[-4:] == [f"throughput {gpu}, {how}" for gpu in ("A100", "H200") for how in ("captured", "eager")]
    assert len(heads) == 9 + 4 * 3
    lal = next(line for line in lines if line[1] == "LAL")
    assert lal[9:15] == ["10.0", "5.00x", "4.00x", "5.00", "2.50x", "4.00x"]
    assert "throughput 5.00x on A100 (eager 2.50x)" in report.sections[""]
    said = report.sections["conditions"]
    assert "eager: 16.7 us a kernel in inference, 32.7 us in training, 321 us one of this library's" in said
    assert "the host" not in said
    lines = {line[0]: line[1:] for line in report.tables["paper"][0]}
    assert lines["Training step: throughput on H200, eager, against PLITS"][-1] == "+150.0 %"
    assert report.tables["levers"][0][2][6:] == ["200", "", "400", "", "100", "", "200", ""]
    lal = report.tables["serving"][0][3]
    assert lal[5:13] == ["50.0", "-75.0 %", "1,500", "1.50x", "100", "-50.0 %", "750", "0.75x"]


def test_serving_that_was_measured_names_no_device() -> None:
    document = documents.measured()
    document["serving"] = [
        {key: value for key, value in row.items() if key != "device"}
        for row in documents.simulated()["serving"]
        if row["device"] == documents.GPUS[0]
    ]
    (table,) = page(document).tables["serving"]
    assert table[-1][2:] == ["LAL", "100", "-75.0 %", "50.0", "-75.0 %", "1,500", "1.50x"]


def test_clips_that_fill_a_part_of_the_window() -> None:
    shown = page(documents.measured() | {"short_clips": documents.short_clips()})
    (table,) = shown.tables["short-clips"]
    assert ["", "40", "LAL", "3.00", "1.50x", "0.700", "-30.0 %"] in table


def test_sections_without_data_are_left_out() -> None:
    always = {"", "conditions", "methods", "figure-1", "points"}
    report = page(documents.measured())
    assert set(report.sections) == always | {"paper", "gain"}
    document = documents.measured()
    document["rows"] = [row for row in document["rows"] if row["method"] == "lal"]
    assert set(page(document).sections) == always
    document = documents.simulated()
    for row in document["rows"]:
        row.pop("memory_breakdown", None)
    document |= {"lengths": [], "serving": [], "exponents": []}
    assert set(page(document).sections) == always | {"paper", "gain", "levers"}
    assert set(page({**document, "rows": []}).sections) == {"", "conditions", "methods", "figure-1"}


def test_a_simulation_without_exponents() -> None:
    document = documents.simulated()
    del document["exponents"]
    report = page(document)
    assert "lengths" in report.sections
    assert "lengths" not in report.tables


def test_each_number_of_text_tokens_has_its_tables() -> None:
    document = documents.simulated()
    more = copy.deepcopy(document["rows"])
    for row in more:
        row["text_tokens"], row["peak_memory_bytes"] = 512, row["peak_memory_bytes"] and 2 * row["peak_memory_bytes"]
    document["rows"] += more
    report = page(document)
    assert report.tables["points128"][0][2][3] == "16.00"
    assert report.tables["points512"][0][2][3] == "32.00"


def test_what_a_document_says_is_text() -> None:
    document = documents.measured()
    document["meta"]["audio_file"] = "<script>alert(1)</script>.wav"
    report = page(document)
    assert "script" not in report.tags
    assert "<script>alert(1)</script>.wav" in report.sections["conditions"]
