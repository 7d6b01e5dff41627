"""One table of tested versions: the constraints, the package's bounds and the docs say the same, and doctor what lies
outside."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest

from palkernels.bench import doctor, machine, versions
from palkernels.bench.versions import TESTED, Assembler, against

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize(("file", "end"), [("constraints-oldest.txt", 0), ("constraints.txt", 1)])
def test_both_ends_are_pinned(file: str, end: int) -> None:
    pins = pinned(file)
    for name, ends in TESTED.items():
        if name != "python":
            assert pins[name].startswith(f"{ends[end]}."), name


def test_the_package_begins_at_the_oldest_and_has_no_end() -> None:
    extras = {name: some for name, some in PROJECT["optional-dependencies"].items() if name != "vllm"}  # one release
    requirements = [*PROJECT["dependencies"], *chain(*extras.values())]
    requirements.append(f"python{PROJECT['requires-python']}")
    for name in ("python", "torch", "transformers", "torchaudio"):
        assert f"{name}>={TESTED[name][0]}" in requirements
    assert not [requirement for requirement in requirements if "<" in requirement]


@pytest.mark.parametrize("name", TESTED)
def test_the_docs_have_the_table(name: str) -> None:
    oldest, newest = TESTED[name]
    row = re.search(rf"^\| {name} \| ([\d.]+) \| ([\d.]+) \|", (ROOT / "docs/support.md").read_text(), re.M | re.I)
    assert row is not None
    assert row.groups() == (oldest, newest)


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("torch", "2.11.0+cu130", None),
        ("torch", "2.14.9", None),
        ("torch", "2.10.0", "older than what is tested, 2.11 to 2.14"),
        ("torch", "2.15.0a0+git12", "newer than what is tested, 2.11 to 2.14"),
        ("torch", "3.0.0", "newer than what is tested, 2.11 to 2.14"),
        ("torchaudio", "2.12.0", "newer than what is tested, 2.11"),
        ("matplotlib", "9.0.0", None),
    ],
)
def test_what_lies_outside(name: str, version: str, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TESTED, "torch", ("2.11", "2.14"))
    monkeypatch.setitem(TESTED, "torchaudio", ("2.11", "2.11"))
    assert against(name, version) == said


def test_doctor_names_versions_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "package_version", lambda name: "99.1.0" if name == "transformers" else "2.11.0")
    text = doctor.diagnosis()
    assert f"\n  transformers  99.1.0 (newer than what is tested, {' to '.join(TESTED['transformers'])})\n" in text
    assert "\n  torch         2.11.0\n" in text


def test_the_assembler_and_what_is_known_against_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = versions.find_assembler(80)
    assert own.variable is None
    assert own.path.is_file()
    assert re.fullmatch(r"\d+\.\d+", own.version)
    assert own.against() is None  # the reports are of Hopper

    stand_in = tmp_path / "ptxas"
    stand_in.write_text('#!/bin/sh\necho "Cuda compilation tools, release 12.9, V12.9.86"\n')
    stand_in.chmod(0o755)
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):  # Hopper's, by Triton's version
        monkeypatch.setenv(variable, str(stand_in))
    hopper = versions.find_assembler(90)
    assert (hopper.path, hopper.version) == (stand_in, "12.9")
    assert "reported to compute wrong products and gradients on sm_90" in (hopper.against() or "")
    text = doctor.diagnosis()
    assert f"sm_90    12.9, TRITON_PTXAS_PATH={stand_in}\n    before 13.3 ptxas is reported" in text
    assert text.count("is reported") == 1


@pytest.mark.parametrize(("version", "wrong"), [("12.8", True), ("13.2", True), ("13.3", False), ("13.10", False)])
def test_assemblers_with_the_fix(version: str, wrong: bool) -> None:
    for capability in versions.CAPABILITIES:
        assembler = Assembler(capability, Path("ptxas"), version, None)
        assert (assembler.against() is not None) == (wrong and capability == 90)


def test_doctor_without_an_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(capability: int) -> None:
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(versions, "find_assembler", missing)
    assert "\n  sm_90    none: Cannot find ptxas\n" in doctor.diagnosis()
