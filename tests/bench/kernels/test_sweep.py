"""`palkernels microbench --sweep`: which tiles it tries, what it says of them, and which it times."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from palkernels.bench.cli import main
from palkernels.bench.errors import UserError
from palkernels.bench.kernels import sweep
from palkernels.bench.kernels.candidates import candidates, compile_all
from palkernels.bench.kernels.cases import shape_case
from palkernels.kernels import tiles

SHIPPED = tiles.Tile(64, 64, 4, 3, max_registers=168)
USED = {
    "capability": 90, "registers": 120, "stack_bytes": 0, "shared_bytes": 40_960, "wgmma": 4, "serialised": "",
}  # fmt: skip


def test_the_tiles_near_the_shipped_one():
    found = candidates(SHIPPED)
    assert found[0] == SHIPPED
    assert len(set(found)) == len(found)
    for tile in found[1:]:
        changed = [x.name for x in dataclasses.fields(tile) if getattr(tile, x.name) != getattr(SHIPPED, x.name)]
        assert 1 <= len(changed) <= 2
    assert tiles.Tile(64, 32, 8, 3, max_registers=168) in found
    assert tiles.Tile(64, 64, 4, 2) in found
    assert {tile.block_m for tile in candidates(SHIPPED, fixed=("block_m",))} == {64}


def test_small_tiles_have_no_neighbours_that_cannot_be():
    found = candidates(tiles.Tile(16, 16, 8, 1))
    assert min(min(tile.block_m, tile.block_n) for tile in found) == 16
    assert min(tile.num_stages for tile in found) == 1


def test_a_tile_whose_warps_split_its_keys():
    """Beside it stands the same one whose warps do not, and none whose warps would have too few."""
    shipped = tiles.Tile(16, 64, 4, 3, splits_keys=True)
    found = candidates(shipped, fixed=("block_m",))
    assert dataclasses.replace(shipped, splits_keys=False) in found
    assert tiles.Tile(16, 128, 8, 3, splits_keys=True) in found
    assert tiles.Tile(16, 64, 8, 3) in found
    assert all(tile.block_n >= 64 for tile in found if tile.splits_keys)
    assert sweep._size(dataclasses.asdict(shipped)) == "16 x 64, split"


def test_what_the_compiler_makes_of_tiles():
    """In two processes; a tile that does not compile says so and stops no other."""
    chosen = [tiles.Tile(16, 32, 4, 2), tiles.Tile(16, 16, 3, 2)]  # warps are a power of two
    (first, good), (second, bad) = compile_all("decode", 90, "bfloat16", 64, chosen, processes=2)
    assert [first, second] == chosen
    assert good[0]["tile"]["block_n"] == 32
    assert 0 < good[0]["registers"] <= 255
    assert good[0]["shared_bytes"] > 0
    assert list(bad[0]) == ["failed"]


@pytest.mark.parametrize(
    ("launches", "said"),
    [
        ([USED], ""),
        ([USED, USED | {"stack_bytes": 300}], "spills 300 bytes"),
        ([USED | {"shared_bytes": 300_000}], "shared memory must be at most 232,448, got 300,000"),
        ([{"failed": "out of patience"}], "does not compile: out of patience"),
    ],
)
def test_tiles_that_cannot_be_good_are_not_timed(launches, said):
    assert sweep._against(launches) == said


def test_a_tile_is_checked_and_timed_by_itself(monkeypatch):
    """On a CPU, where no kernel runs: the launches would take the tile, and the shipped ones come back."""
    used = []
    measure = sweep.measure
    monkeypatch.setattr(sweep, "measure", lambda *given: used.append(dict(tiles.overrides)) or measure(*given))
    case = shape_case("forward", "1,4,2,9,20,16", torch.float32, torch.device("cpu"))
    compiled = [(SHIPPED, [USED]), (tiles.Tile(32, 64, 4, 3), [USED]), (tiles.Tile(16, 16, 4, 1), [{"failed": "no"}])]
    rows = list(sweep._timed(sweep.Options("forward", seconds=0.001), "forward", case, compiled))
    assert used == [{"forward": SHIPPED}, {"forward": tiles.Tile(32, 64, 4, 3)}]
    assert tiles.overrides == {}
    assert [row["status"] for row in rows] == ["ok", "ok", "does not compile: no"]
    assert [row["microseconds"] is not None for row in rows] == [True, True, False]


def test_a_tile_that_cannot_be_launched_stops_no_other(monkeypatch):
    measure = sweep.measure

    def launched(*given):
        if tiles.overrides["forward"] != SHIPPED:
            raise RuntimeError("out of resource: shared memory")
        return measure(*given)

    monkeypatch.setattr(sweep, "measure", launched)
    case = shape_case("forward", "1,4,2,9,20,16", torch.float32, torch.device("cpu"))
    compiled = [(tiles.Tile(32, 64, 4, 3), [USED]), (SHIPPED, [USED])]
    rows = list(sweep._timed(sweep.Options("forward", seconds=0.001), "forward", case, compiled))
    assert [row["status"] for row in rows] == ["failed: out of resource: shared memory", "ok"]
    assert rows[0]["microseconds"] is None
    monkeypatch.setattr(sweep, "works", lambda device: False)
    with pytest.raises(RuntimeError, match="out of resource"):
        list(sweep._timed(sweep.Options("forward", seconds=0.001), "forward", case, compiled))


def test_compile_only_needs_no_gpu(monkeypatch, tmp_path, capsys):
    one_by_one = USED | {"serialised": "(C7515) Potential Performance Loss"}
    monkeypatch.setattr(sweep, "compile_all", lambda *given: ((tile, [one_by_one]) for tile in given[4]))
    path = tmp_path / "new" / "rows.json"
    options = ["--model", "llama-3.2-1b", "--model", "llama-3.2-3b", "--device", "cpu", "--json", str(path)]
    with pytest.raises(SystemExit) as ended:
        main(["microbench", "--sweep", "backward", "--compile-only", *options])
    assert ended.value.code == 0
    document = json.loads(path.read_text())
    assert document["meta"]["complete"] is True
    assert document["meta"]["arch"] == 90
    rows = document["rows"]
    sweeps = dict.fromkeys((row["kernel"], row["model"]) for row in rows)
    assert list(sweeps) == [
        (kernel, model) for kernel in ("query_gradient", "key_gradient") for model in ("llama-3.2-1b", "llama-3.2-3b")
    ]
    first = next(row for row in rows if row["kernel"] == "key_gradient")
    assert first["tile"] == dataclasses.asdict(tiles.TILES["key_gradient"][90][2, 64])
    printed = capsys.readouterr().out
    assert "key_gradient, llama-3.2-3b, 1500 audio tokens, bfloat16" in printed
    assert "shipped, serialised" in printed


def test_decoding_takes_as_few_rows_as_hold_its_queries(monkeypatch):
    monkeypatch.setattr(sweep, "compile_all", lambda *given: ((tile, [USED]) for tile in given[4]))
    case = shape_case("decode", "1,32,8,128,1500,64", torch.bfloat16, torch.device("cpu"))
    chosen = [tile for tile, _ in sweep._compiled("decode", 90, case)]
    assert {tile.block_m for tile in chosen} == {16}
    assert chosen[0] == tiles.choose("decode", 90, torch.bfloat16, 64, False, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"op": "forwards"}, "--sweep must be forward, backward, decode, got 'forwards'"),
        ({"op": "forward", "device": "cpu"}, "--sweep must be given with a GPU, or with --compile-only, got neither"),
        ({"op": "forward", "models": ("llama",)}, "--model must be among llama-3.2-1b, "),
    ],
)
def test_refusals(options, said):
    with pytest.raises(UserError) as raised:
        sweep.run(sweep.Options(**options), Console(file=io.StringIO()))
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compile-only"], "--compile-only must be given with --sweep, got it without --sweep"),
        (["--sweep", "forward", "--op", "decode"], "--sweep must not be given with --op"),
    ],
)
def test_options_that_exclude_each_other(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["microbench", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
