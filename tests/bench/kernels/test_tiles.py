"""`palkernels doctor --tiles` through its command line. It compiles little: one kernel of one head dim."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from palkernels.bench.cli import main
from palkernels.bench.kernels import tiles as command
from palkernels.kernels import aot, tiles

SMALL = ("--arch", 80, "--dtype", "bfloat16", "--kernel", "key_gradient", "--head-dims", 32)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *map(str, arguments)])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def cells(table: str) -> list[list[str]]:
    """The body of a table, whose last line is its caption. A kernel stands only where another one's rows end."""
    lines = [f"{line:140}" for line in table.splitlines()]
    rule = next(number for number, line in enumerate(lines) if line.startswith("---"))
    headings, body = lines[2:rule], lines[rule + 1 : -1]  # below the title and the groups' names
    blank = [all(line[place] == " " for line in (*headings, *body)) for place in range(140)]
    starts = [place for place in range(139) if not blank[place] and (place == 0 or blank[place - 1])]
    found: list[list[str]] = []
    for line in body:
        row = [line[start:end].strip() for start, end in pairwise([*starts, 140])]
        found.append([row[0] or found[-1][0], *row[1:]])
    return found


def printed(row: dict[str, Any]) -> list[str]:
    """A JSON row as the table has it."""
    tile = row["tile"]
    return [
        row["kernel"],
        row["gradients"],
        row["features"],
        str(row["head_dim"]),
        f"{tile['block_m']} x {tile['block_n']}",
        str(tile["num_warps"]),
        str(tile["num_stages"]),
        str(tile["max_registers"] or ""),
        str(row["registers"]),
        f"{row['shared_bytes']:,}",
        str(row["stack_bytes"]),
        str(row["wgmma"]),
        "serialised" if row["serialised"] else "",
    ]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything compiles afresh."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python script for the test to write, which runs in place of the compiler's process."""
    script, executable = tmp_path / "compiler.py", tmp_path / "python"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    executable.chmod(0o755)
    monkeypatch.setattr(command.sys, "executable", str(executable))  # type: ignore[attr-defined]
    return script


def lines(selection: command.Selection) -> list[str]:
    """What the compiler's process prints for the selection, with made-up figures."""
    found = []
    for kernel, arch, _, head_dim, tile, features in selection.variants:
        split = kernel == "key_gradient" and tiles.splits_key_gradient(head_dim)
        for gradients in ("dK", "dV") if split else ("dK dV" if kernel == "key_gradient" else "",):
            variant = (kernel, gradients, arch, selection.dtype, head_dim, features, tile)
            reason = "(C7515) Potential Performance Loss" if features == "all" else ""
            found.append(json.dumps(asdict(aot.Compiled(*variant, 97, 8, 4096, 12, 3, 0, 0, 0, reason))))
    return found


@pytest.mark.usefixtures("own_cache")
def test_compiles_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tests' own environment asks for the interpreter; the compiler runs all the same."""
    path = tmp_path / "new" / "tiles.json"
    assert run("--tiles", *SMALL, "--json", path) == 0
    shown = capsys.readouterr()
    document = json.loads(path.read_text())
    rows = document["rows"]
    assert [row["features"] for row in rows] == list(aot.FEATURES)
    for row in rows:
        assert (row["kernel"], row["gradients"], row["head_dim"]) == ("key_gradient", "dK dV", 32)
        assert tiles.Tile(**row["tile"]) == tiles.TILES["key_gradient"][80][2, 32]
        assert 0 < row["registers"] <= 255
        assert 0 < row["shared_bytes"] <= document["meta"]["shared_memory_limit"] == aot.SHARED_MEMORY[80]
    assert document["meta"]["versions"]["triton"]
    assert cells(shown.out) == [printed(row) for row in rows]
    for text in ("sm_80, bfloat16", "of 101,376", "registers", "shared bytes", "stack", "wgmma"):
        assert text in shown.out
    assert shown.err == ""  # the progress bar is for terminals
    assert os.listdir(path.parent) == ["tiles.json"]


@pytest.mark.usefixtures("own_cache")
def test_a_tile_that_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With an assembler that refuses everything."""
    assembler = tmp_path / "ptxas"
    assembler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "release 12.8, V12.8" && exit\necho "ptxas fatal: no" >&2\nexit 255\n'
    )
    assembler.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(assembler))
    assert run("--tiles", *SMALL, "--json", tmp_path / "new" / "tiles.json") == 2
    shown = capfd.readouterr()
    tile = tiles.TILES["key_gradient"][80][2, 32]
    where = f"key_gradient, head dim 32, {tile.block_m} x {tile.block_n}, features: {aot.FEATURES[0]}"
    assert shown.err == f"error: every tile must compile for sm_80: {where}, got ptxas fatal: no\n"
    assert shown.out == ""
    assert not (tmp_path / "new").exists()


def test_all_tiles_and_their_progress(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where dK and dV are split one tile has two rows, and still counts once."""
    selection = command.select(arch=90)
    found, count = lines(selection), len(selection.variants)
    assert len(found) > count
    compiler.write_text(f"print({chr(10).join(found)!r})")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    assert run("--tiles", "--arch", 90) == 0
    assert f"{count}/{count}" in capsys.readouterr().err
    monkeypatch.delenv("FORCE_COLOR")
    assert run("--tiles", "--arch", 90) == 0
    shown = cells(capsys.readouterr().out)
    assert shown == [printed(json.loads(line)) for line in found]
    assert {tuple(row[:2]) for row in shown if row[3] == "256"} == {
        ("forward", ""),
        ("decode", ""),
        ("query_gradient", ""),
        ("key_gradient", "dK"),
        ("key_gradient", "dV"),
    }


def test_the_compiler_gets_the_options(compiler: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiler.write_text('import os, sys\nsys.exit(" ".join([*sys.argv[1:], os.environ.get("TRITON_INTERPRET", "")]))')
    options = ("--dtype", "float16", "--kernel", "forward", "--kernel", "key_gradient", "--head-dims", "128,64,64")
    assert run("--tiles", "--arch", 100, *options) == 2
    want = "100 --dtypes float16 --kernels forward key_gradient --head-dims 128 64"
    assert f"got -P -m palkernels.kernels.aot {want}\n" in capsys.readouterr().err


def test_the_tile_that_failed_is_named(compiler: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one after those that were compiled; a split one has compiled with its second row."""
    selection = command.select(arch=90, kernels=("key_gradient",), head_dims=(128, 256))
    found = lines(selection)
    compiler.write_text(f"import os\nprint({chr(10).join(found[:3])!r}, flush=True)\nos.kill(os.getpid(), 9)")
    assert run("--tiles", "--arch", 90, "--kernel", "key_gradient", "--head-dims", "128,256") == 2
    where = command._title(selection.variants[2])
    assert capsys.readouterr().err == f"error: every tile must compile for sm_90: {where}, got exit code -9\n"


def test_an_interrupted_run_leaves_no_compiler(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = lines(command.select(arch=80))[0]
    compiler.write_text(f"import time\nprint({first!r}, flush=True)\ntime.sleep(1000)")
    started: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupted(**fields: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(command.aot, "Compiled", interrupted)
    assert run("--tiles", "--arch", 80, "--json", tmp_path / "new" / "tiles.json") == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    (process,) = started
    assert process.wait(60) == -9  # a busy machine takes its time to end what was killed
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", 90], "--arch must be given with --tiles, got it without --tiles"),
        (["--dtype", "float16"], "--dtype must be given with --tiles, got it without --tiles"),
        (["--kernel", "forward"], "--kernel must be given with --tiles, got it without --tiles"),
        (["--head-dims", "64"], "--head-dims must be given with --tiles, got it without --tiles"),
        (["--json", "rows"], "--json must be given with --tiles, got it without --tiles"),
        (["--tiles", "--arch", 70], "--arch must be 80, 90 or 100, got 70"),
        (["--tiles", "--dtype", "bf16"], "--dtype must be bfloat16, float16 or float32, got bf16"),
        (["--tiles", "--kernel", "all"], "--kernel must be forward, decode, query_gradient or key_gradient, got all"),
        (["--tiles", "--head-dims", "64,48"], "--head-dims must be 32, 64, 128 or 256, got 48"),
        (["--tiles", "--head-dims", ""], "--head-dims must be whole numbers separated by commas, got ''"),
        (["--tiles", "--json", "folder"], "--json's folder must be free for folder, got a folder of that name in"),
        (["--tiles", "--json", "file/rows"], "--json's folder must be a folder that can be written to, got"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes(
    arguments: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("capability", "arch"), [(80, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80)])
def test_the_default_is_the_gpu_at_hand(capability: int, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "capability", lambda device: capability)
    selection = command.select()
    assert selection.arch == arch


def test_the_defaults_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.select() == command.Selection(90, "bfloat16", tiles.KERNELS, (32, 64, 128, 256))
