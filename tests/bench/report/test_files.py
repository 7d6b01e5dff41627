"""A run's files hold its document, each in its format."""

import csv
import io
import json

from support import documents

from palkernels.bench.report import files

NAMES = ("simulate.json", "simulate.csv", "simulate.png", "simulate.html")


def test_files_are_what_their_names_say() -> None:
    document = documents.simulated()
    written = files.contents(document, NAMES)
    assert tuple(written) == NAMES
    assert json.loads(written["simulate.json"]) == document
    assert written["simulate.png"].startswith(b"\x89PNG")
    assert written["simulate.html"].startswith(b"<!DOCTYPE html>")
    lines = list(csv.DictReader(io.StringIO(written["simulate.csv"].decode())))
    assert len(lines) == len(document["rows"])
    for line, row in zip(lines, document["rows"], strict=True):
        assert line["device"] == row["device"]
        assert line["samples_per_second_p50"] == str(row["samples_per_second"]["p50"] or "")
        parts = row.get("memory_breakdown", {})
        assert line["memory_parameters_bytes"] == str(parts.get("parameters", ""))
        assert line["memory_kv_cache_bytes"] == str(parts.get("K/V cache", ""))
    assert not any(value.startswith("{") for line in lines for value in line.values())


def test_a_measured_csv_names_the_encoders_weights() -> None:
    written = files.contents(documents.measured(), ("figure1.csv",))["figure1.csv"].decode()
    assert "random (seed 0)" in written.splitlines()[1]
