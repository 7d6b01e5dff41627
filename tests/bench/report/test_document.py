"""Documents are read if they are whole, and written all or not at all, also as CSV."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from support import documents

from palkernels.bench.errors import UserError
from palkernels.bench.report import document as results


def test_csv_has_a_line_per_row() -> None:
    document = documents.measured()
    lines = results.csv_text(document["rows"], "random (seed 0)").splitlines()
    assert len(lines) == 1 + len(document["rows"])
    assert "samples_per_second_p50" in lines[0]
    assert "2.0 2.0" in lines[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": ["lal"]}, "a row whose method is ['lal']"),
        ({"status": None}, "a row whose status is None"),
        ({"text_tokens": "128"}, "a row whose text_tokens is '128'"),
        ({"device": 1}, "a row whose device is 1"),
        ({"peak_memory_bytes": None}, "a row that is ok and lacks a figure"),
        ({"samples_per_second": {"p50": 1.0, "samples": ["1"]}}, "a row that is ok and lacks a figure"),
        ({"samples_per_second": {"p50": 1.0}}, "'samples'"),
    ],
)
def test_a_row_must_be_one(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    document, path = documents.measured(), tmp_path / "figure1.json"
    path.write_text(json.dumps(document))
    assert results.read(path) == document
    document["rows"][1] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=re.escape(reason)):
        results.read(path)


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
