"""`palkernels microbench --host` on the stand-in for a GPU: what it writes and refuses, and how it ends."""

import json
import subprocess
import sys

import pytest

from palkernels.bench.cli import main
from palkernels.bench.kernels import host, host_calls

COMMAND = [sys.executable, "-P", "-c", "from palkernels.bench.cli import main; main()", "microbench", "--host"]
ATTENTION = ("forward", "decode", "forward_with_gradients", "backward")


def palkernels(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("host") / "new" / "rows.json"
    arguments = ["--device", "cpu", "--seconds", "0.001", "--json", str(path)]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


@pytest.mark.slow
def test_the_rows(measured):
    rows = measured[0]["rows"]
    assert tuple(dict.fromkeys(row["op"] for row in rows)) == host_calls.OPS
    for op in ATTENTION:
        names = [row["implementation"] for row in rows if row["op"] == op]
        grown = ["palkernels (grown)"] if op == "decode" else []
        assert names == ["palkernels", "palkernels (first)", *grown, "sdpa", "cat + sdpa"]
    projections = [row for row in rows if row["op"] == "audio_kv"]
    layers = [(row["implementation"], row["shape"]["layers"]) for row in projections]
    all_layers = [("palkernels (all layers)", 16), ("eager (all layers)", 16)]
    assert layers == [("palkernels", 1), ("palkernels (first)", 1), ("eager", 1), *all_layers]
    assert len({(row["op"], row["implementation"]) for row in rows}) == len(rows)
    for row in rows:
        assert 0 < row["p10_microseconds"] <= row["host_microseconds"] <= row["p90_microseconds"]
        assert row["batches"] >= 3


def test_each_call_launches_our_kernels(measured):
    """So that no other implementation is timed in their place."""
    rows = measured[0]["rows"]
    launches = {(row["op"], row["implementation"]): row["launches"] for row in rows if row["op"] in ATTENTION}
    ours = {key: count for key, count in launches.items() if count is not None}
    assert ours == {
        **{(op, "palkernels"): 1 + (op == "backward") for op in ATTENTION},
        **{(op, "palkernels (first)"): 1 + (op == "backward") for op in ATTENTION},
        ("decode", "palkernels (grown)"): 1,
    }
    assert all(row["launches"] for row in rows if row["op"] == "audio_kv" and row["implementation"].startswith("palk"))


def test_it_says_what_it_cannot_show(measured):
    document, text = measured
    conditions = document["conditions"]
    assert conditions["device"] == "stand-in"
    assert all(conditions["versions"].values())
    assert set(conditions["implementations"]) == {row["implementation"] for row in document["rows"]}
    assert "no kernel runs, and results are memory as it happened to be" in conditions["cannot_show"]
    words = " ".join(text.split())
    for sentence in (*conditions["cannot_show"], *conditions["implementations"].values()):
        assert sentence in words
    assert "SDPA's backend: FLASH_ATTENTION" in text


def test_a_growing_cache_never_has_a_geometry_twice():
    import torch

    with torch.no_grad():  # a batch switches gradients, and the context switches them back
        batch = host_calls._growing(host_calls.SMALL_DECODE, torch.device("cpu"))
        calls = [call for _ in range(40) for call in batch(20)]
        geometries = {(call.args[1].shape, call.args[1].stride()) for call in calls}
        assert len(geometries) == len(calls)
        keys = [call.args[1].shape[2] for call in calls]
        assert keys == list(range(keys[0], keys[0] + len(keys)))
        assert all(call.args[1].is_contiguous() for call in calls)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (None, "the stand-in for a GPU must have a C compiler (CC, cc, gcc or clang), got none"),
        ("/bin/false", "the stand-in's driver must compile with /bin/false, got: exit code 1"),
    ],
    ids=["none", "one that fails"],
)
def test_without_a_compiler(compiler, message, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", compiler)
    assert palkernels("microbench", "--host", "--device", "cpu", "--json", tmp_path / "new" / "rows.json") == 2
    assert capfd.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "cache").rglob("*.so*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-3.2-1b"], "--host must not be given with --model"),
        (["--op", "forward"], "--host must not be given with --op"),
        (["--audio-tokens", "9"], "--host must not be given with --audio-tokens"),
        (["--shape", "1,2,1,4,8,16"], "--host must not be given with --shape"),
        (["--dtype", "bf16"], "--host must not be given with --dtype"),
        (["--peers", "sdpa"], "--host must not be given with --peers"),
        (["--tile", "forward=64,64,4,2"], "--host must not be given with --tile"),
        (["--once"], "--host must not be given with --once"),
        (["--seconds", "0"], "--seconds must be above 0 and at most 60, got 0.0"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:INDEX, got 'tpu'"),
        (["--json", "folder"], "--json's folder must be free for folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert palkernels("microbench", "--host", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_an_interrupted_run_leaves_no_process(tmp_path, monkeypatch, capfd):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(host.subprocess, "Popen", Recorded)
    monkeypatch.setattr(host.json, "loads", interrupted)
    path = tmp_path / "new" / "rows.json"
    assert palkernels("microbench", "--host", "--device", "cpu", "--json", path) == 130
    assert capfd.readouterr().err == "error: interrupted\n"
    (process,) = started
    assert process.wait(60) == -9  # a busy machine takes its time to end what was killed
    assert not path.parent.exists()


def test_a_process_that_ends_early_is_no_result(monkeypatch):
    monkeypatch.setattr(host.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="must end with exit code 0, got 1"):
        host._measure(host_calls.STAND_IN, 1.0)
