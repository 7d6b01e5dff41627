"""Documents are written all or not at all, also as CSV."""

import os
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
