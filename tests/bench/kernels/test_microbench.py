"""`palkernels microbench`: what it checks, refuses and writes. On a CPU, which takes the same way as a GPU."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from support.commands import running

from palkernels.bench import machine
from palkernels.bench.cli import main
from palkernels.bench.errors import UserError
from palkernels.bench.instruments import rates
from palkernels.bench.kernels import microbench, peers
from palkernels.bench.kernels.cases import OPS, Case
from palkernels.bench.kernels.microbench import Options

CPU = torch.device("cpu")
SHAPE = "1,4,2,9,20,16"
SDPA = next(peer for peer in peers.PEERS if peer.key == "sdpa")


def run(**options):
    if options.get("once"):
        options["seconds"] = None
    console = Console(width=140, record=True, file=io.StringIO())
    ok = microbench.run(Options(**{"device": "cpu", "seconds": 0.001, "shape": SHAPE} | options), console)
    return ok, console.export_text()


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    folder = tmp_path_factory.mktemp("microbench")
    path = folder / "rows.json"
    arguments = ["microbench", "--device", "cpu", "--shape", SHAPE, "--seconds", "0.001", "--json", str(path)]
    with running(arguments, folder) as command:
        ended, printed, error = command.end()
    assert ended == 0, error
    return json.loads(path.read_text()), printed, path


def test_the_file(document):
    assert document[0]["complete"] is True
    rows = document[0]["benchmarks"]
    ceilings = document[0]["machine_info"]["ceilings"]
    ours_by_op = {row["params"]["op"]: row for row in rows if row["name"] == peers.OURS}
    assert list(ours_by_op) == list(OPS)
    others = [row for row in rows if row["name"] != peers.OURS]
    assert len(others) == len(OPS) + 2  # projections have two peers
    for peer in others:
        ours = ours_by_op[peer["params"]["op"]]
        assert ours["params"] | {"implementation": ""} == peer["params"] | {"implementation": ""}
        for row in (ours, peer):
            extra = row["extra_info"]
            assert extra["status"] == "ok"
            assert 0 < extra["p10_seconds"] <= extra["p50_seconds"] <= extra["p90_seconds"]
            limit = max(extra["flops"] / ceilings["flops_per_second"], extra["bytes"] / ceilings["bytes_per_second"])
            assert extra["limit_seconds"] == limit
            assert extra["share_of_limit"] == pytest.approx(limit / extra["p50_seconds"])
            assert row["stats"]["min"] <= row["stats"]["median"] <= row["stats"]["max"]
        ratio = peer["extra_info"]["p50_seconds"] / ours["extra_info"]["p50_seconds"]
        assert peer["extra_info"]["slower_than_ours"] == pytest.approx(ratio)
        assert ours["extra_info"]["slower_than_ours"] is None


def test_the_table(document):
    assert max(map(len, document[1].splitlines())) <= 140
    for text in ("median us", "cat + SDPA (PyTorch's", "RMSNorm, Linear, RoPE", "TB/s", "TFLOP/s", "slower"):
        assert text in document[1]


def test_pytest_benchmark_compares_the_file(document):
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(document[2])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Median" in done.stdout


def test_a_wrong_result_has_no_speed_and_fails_the_run(monkeypatch, tmp_path):
    wrong = dataclasses.replace(SDPA, prepare=lambda case: lambda inputs: [inputs["query"] * 1.0])
    monkeypatch.setattr(peers, "PEERS", (wrong,))
    path = tmp_path / "rows.json"
    ok, text = run(ops=("forward",), json=path)
    assert not ok
    ours, peer = json.loads(path.read_text())["benchmarks"]
    assert ours["extra_info"]["status"] == "ok"
    assert peer["extra_info"]["status"].startswith("wrong: error")
    assert peer["stats"] == {}
    assert "p50_seconds" not in peer["extra_info"]
    assert "wrong: error" in text


@pytest.mark.parametrize("wrong", [float("nan"), 1e-3])
def test_gradients_are_checked_too(monkeypatch, wrong):

    def prepare(case):
        run = SDPA.prepare(case)

        def spoiled(inputs):
            (out,) = run(inputs)
            out.register_hook(lambda grad: grad * (1 + wrong))
            return [out]

        return spoiled

    monkeypatch.setattr(peers, "PEERS", (dataclasses.replace(SDPA, prepare=prepare),))
    ok, text = run(ops=("backward",))
    assert not ok
    assert "wrong: error" in text


def test_a_peer_that_raises_has_a_row_with_the_reason(monkeypatch):
    def prepare(case):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(peers, "PEERS", (dataclasses.replace(SDPA, prepare=prepare),))
    ok, text = run(ops=("forward",))
    assert ok
    assert "failed: no kernel for this shape" in text


def test_a_peer_that_breaks_the_device_leaves_what_was_measured(monkeypatch, tmp_path):
    """What comes after it does not run and says why; the file is there, and the run has failed."""

    def prepare(case):
        if case.op == "decode":
            monkeypatch.setattr(machine, "sync", lambda device: failing())
            failing()
        return SDPA.prepare(case)

    def failing():
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(peers, "PEERS", (dataclasses.replace(SDPA, name="culprit", prepare=prepare),))
    path = tmp_path / "rows.json"
    ok, text = run(ops=("forward", "decode", "both"), json=path)
    assert not ok
    status = [row["extra_info"]["status"] for row in json.loads(path.read_text())["benchmarks"]]
    assert status[:3] == ["ok", "ok", "ok"]
    assert status[3] == "broke the device: an illegal memory access was encountered"
    assert status[4:] == ["not run: culprit broke the device"] * 2
    assert "not run: culprit broke the device (both 20)" in text


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path):
    def prepare(case):
        if case.op == "decode":
            raise KeyboardInterrupt
        return SDPA.prepare(case)

    monkeypatch.setattr(peers, "PEERS", (dataclasses.replace(SDPA, prepare=prepare),))
    path = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        run(ops=("forward", "decode"), json=path)
    document = json.loads(path.read_text())
    assert [row["params"]["op"] for row in document["benchmarks"]] == ["forward", "forward"]
    assert document["complete"] is False


def test_a_peer_without_gradients_says_so(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", (dataclasses.replace(SDPA, has_gradients=False),))
    ok, text = run(ops=("backward",))
    assert ok
    assert "computes no gradients" in text


def test_the_exit_code_of_a_wrong_result(monkeypatch):
    monkeypatch.setattr(microbench, "run", lambda options, console: False)
    with pytest.raises(SystemExit) as exit:
        main(["microbench", "--shape", SHAPE])
    assert exit.value.code == 1


def test_the_file_says_what_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(microbench, "_tiles", lambda given, device: contextlib.nullcontext())
    path = tmp_path / "rows.json"
    run(ops=("forward",), tiles=("forward=64,64,4,2",), json=path)
    rows = json.loads(path.read_text())["benchmarks"]
    assert [row["options"] for row in rows] == [{"tiles": ["forward=64,64,4,2"], "seconds": 0.001}] * 2


def test_a_fault_of_this_library_is_not_hidden(monkeypatch):
    monkeypatch.setattr(Case, "ours", lambda self, inputs, impl: 1 / 0 if impl == "sdpa" else [inputs["query"]])
    with pytest.raises(ZeroDivisionError):
        run(ops=("forward",))


def test_what_is_not_installed_says_so(monkeypatch):
    names = ["flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute", "flashinfer"]
    names.append("triton.experimental.gluon")
    optional = [peer for peer in peers.PEERS if peer.module is not None]
    assert {peer.module for peer in optional} == set(names)
    monkeypatch.setattr(peers, "PEERS", tuple(dataclasses.replace(peer, devices=("cpu",)) for peer in optional))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, text = run(ops=("forward",), peers=tuple(peer.key for peer in optional))
    for name in names:
        assert f"not installed: {name}" in text


def test_once_runs_and_times_nothing(monkeypatch):
    monkeypatch.setattr(rates, "measure_rates", lambda *args: 1 / 0)
    ok, text = run(ops=("both",), once=True)
    assert ok
    assert text == "both ran once, after once to warm up\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "1,4,2,9,20"}, "--shape must be six whole numbers B,Hq,Hkv,T,N,D, got '1,4,2,9,20'"),
        ({"shape": "1,4,3,9,20,16"}, "--shape must be positive numbers with Hq a multiple of Hkv"),
        ({"shape": None, "once": True, "ops": ("forward",)}, "--once must be given with --shape and one --op"),
        ({"once": True}, "--once must be given with --shape and one --op"),
        ({"ops": ("sideways",)}, "--op must be among forward, .*, got 'sideways'"),
        ({"peers": ("flash",)}, "--peers must be among sdpa-flash, .*, got 'flash'"),
        ({"shape": None, "models": ("gpt-2",)}, "--model must be among llama-3.2-1b, .*, got 'gpt-2'"),
        ({"models": ("llama-3.2-1b",)}, "--shape must not be given with --model"),
        ({"shape": None, "seconds": float("inf")}, "--seconds must be above 0 and at most 60, got inf"),
        ({"dtype": "float8"}, "--dtype must be one of auto, bf16, .*, got 'float8'"),
        ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:INDEX, got 'tpu'"),
        ({"audio_tokens": (9,)}, "--shape must not be given with --audio-tokens"),
        ({"once": True, "ops": ("both",), "peers": ("sdpa",)}, "--once must not be given with --peers"),
        ({"peers": ("sdpa-flash",)}, "--peers must be among sdpa, eager, modules for these operations on this device"),
        ({"peers": ("eager",), "ops": ("forward",)}, "--peers must be among sdpa for these operations on this device"),
        ({"tiles": ("forward=64,64,4,2",)}, "--tile must be given with a GPU"),
        ({"seconds": 0.0}, "--seconds must be above 0 and at most 60, got 0.0"),
        ({"shape": None, "audio_tokens": (0,)}, "--audio-tokens must be positive, got 0"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ("forward", "--tile must be KERNEL=M,N,WARPS,STAGES"),
        ("forward=64,60,4,2", "block_n must be a power of two"),
        ("sideways=64,64,4,2", "--tile must name one of forward"),
    ],
)
def test_refused_tiles(tile, message):
    with pytest.raises(UserError, match=message):
        microbench._tiles((tile,), torch.device("cuda"))


def test_tiles_are_used():
    from palkernels.kernels import tiles

    with microbench._tiles(("forward=64,32,4,3,168", "decode=16,64,2,2"), torch.device("cuda")):
        assert tiles.choose("forward", 90, torch.bfloat16, 64, False) == tiles.Tile(64, 32, 4, 3, 168)
        assert tiles.choose("decode", 90, torch.bfloat16, 64, False) == tiles.Tile(16, 64, 2, 2)
    assert tiles.choose("forward", 90, torch.bfloat16, 64, False) != tiles.Tile(64, 32, 4, 3, 168)
