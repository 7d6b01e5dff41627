"""`palkernels compare` matches points and says what differs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from support import documents

from palkernels.bench.cli import main
from palkernels.bench.compare import differences, match_points, ratio


def run(tmp_path: Path, *contents: Any) -> int:
    paths = []
    for name, document in zip("ab", contents, strict=True):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, paths)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_ratios_of_the_same_points() -> None:
    first, second = documents.measured(), documents.measured()
    second["rows"][1] = documents.row("lal", "train", 512, 12.0, 1.5, 0.25)
    second["rows"].reverse()
    comparison = match_points(first, second)
    assert len(comparison.pairs) == len(first["rows"])
    assert comparison.only_first == comparison.only_second == []
    pair = next(pair for pair in comparison.pairs if pair[0] is first["rows"][1])
    assert ratio(*pair, "peak_memory_bytes") == 0.5
    assert ratio(*pair, "peak_above_static_bytes") == 0.5
    assert ratio(*pair, "samples_per_second") == 2.0
    pair = next(pair for pair in comparison.pairs if pair[0]["status"] != "ok")
    assert ratio(*pair, "samples_per_second") is None


@pytest.mark.parametrize(
    "change",
    [{"method": "lal-eager"}, {"audio_tokens": 513}, {"text_tokens": 64}, {"batch_size": 3}, {"dtype": "float32"}],
)
def test_points_that_are_in_one_only(change: dict[str, Any]) -> None:
    first, second = documents.measured(), documents.measured()
    second["rows"][1] |= change
    comparison = match_points(first, second)
    assert comparison.only_first == [first["rows"][1]]
    assert comparison.only_second == [second["rows"][1]]


def test_a_simulation_beside_a_measurement() -> None:
    simulated, measured = documents.simulated(), documents.measured()
    comparison = match_points(simulated, measured)
    assert {(a["device"], b["method"]) for a, b in comparison.pairs} == {
        (device, method) for device in documents.GPUS for method in ("plits", "lal")
    }
    measured["meta"]["device_name"] = documents.GPUS[1]  # measured on a GPU that is simulated
    for pairs in (match_points(simulated, measured).pairs, match_points(measured, simulated).pairs):
        assert {row["device"] for pair in pairs for row in pair} == {documents.GPUS[1]}


def test_two_simulations_match_by_device() -> None:
    comparison = match_points(documents.simulated(), documents.simulated())
    assert all(a["device"] == b["device"] for a, b in comparison.pairs)
    assert len(comparison.pairs) == len(documents.simulated()["rows"])


def test_what_differs_in_the_conditions() -> None:
    first = documents.measured()["meta"]
    second = copy.deepcopy(first)
    assert differences(first, second) == []
    second |= {"model": "qwen2.5-1.5b", "dtype": "float32", "options": {}}
    second["versions"]["torch"] = "2.12.0"
    second["gpu"] = "A GPU"
    assert differences(first, second) == [
        ("versions: torch", "2.11.0", "2.12.0"),
        ("model", "llama-3.2-1b", "qwen2.5-1.5b"),
        ("dtype", "bfloat16", "float32"),
        ("gpu", "-", "A GPU"),
    ]


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = documents.measured(), documents.measured()
    second["rows"][1] = documents.row("lal", "train", 512, 12.0, 1.5, 0.25)
    second["rows"][-1]["audio_tokens"] = 600
    second["meta"]["model"] = "[bold]other"
    assert run(tmp_path, first, second) == 0
    said = capsys.readouterr().out
    plits, lal, *_ = said.partition("Training step\n")[2].partition("----\n")[2].splitlines()
    assert plits.split()[:2] == ["512", "PLITS"]
    assert lal.split() == ["LAL", "3.00", "1.50", "0.500", "0.50", "0.25", "0.500", "6.00", "12.0", "2.000"]
    assert "out of memory" in said
    assert "[bold]other" in said
    assert "Only in A: infer, batch 2, 128 text tokens, bfloat16: LAL with 512" in said
    assert "Only in B: infer, batch 2, 128 text tokens, bfloat16: LAL with 600" in said


def test_names_with_brackets_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = documents.measured(), documents.measured()
    for document in (first, second):
        document["rows"][0]["method"] = "[/method]"
        document["rows"][1]["status"] = "[/status]"
    second["meta"]["[/key]"] = "[/value]"
    assert run(tmp_path, first, second) == 0
    said = capsys.readouterr().out
    for name in ("[/method]", "[/status]", "[/key]", "[/value]"):
        assert name in said


def test_conditions_of_any_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = documents.simulated(), documents.simulated()
    first["meta"] |= {"gpus": {"A GPU": {"flops_per_second": 1e15}}, "device_name": ["none"]}
    second["meta"]["gpus"] = None
    assert run(tmp_path, first, second) == 0
    said = capsys.readouterr().out
    assert "gpus: A GPU: flops per second 1e+15 -" in " ".join(said.split())


def test_an_unknown_mode_has_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = documents.measured()
    document["rows"][0]["mode"] = "chat"
    assert run(tmp_path, document, document) == 0
    assert "\nchat\n" in capsys.readouterr().out


def test_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = documents.measured()
    for row in second["rows"]:
        row["batch_size"] = 7
    assert run(tmp_path, documents.measured(), second) == 0
    said = capsys.readouterr().out
    assert "The conditions are the same." in said
    assert "No point is in both." in said


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"meta": {}, "rows": [{"method": "lal"}]}', '{"benchmarks": []}'])
def test_what_holds_no_results_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, documents.measured(), text) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(
        f"error: '{tmp_path / 'b.json'}' must hold the results of palkernels figure1 or simulate"
    )
    assert said.err.count("\n") == 1
