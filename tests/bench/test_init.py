"""`palkernels init` from checkpoints: what it writes, what it says, and that it writes all or nothing."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import three_checkpoints
from support.commands import running, terminated_amid_writing
from support.figure1 import run
from support.towers import equal

from palkernels.bench import init
from palkernels.bench.init_options import Options, parse_encoders
from palkernels.model import PalForConditionalGeneration, build


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_checkpoints(tmp_path_factory.mktemp("parts"))


def options(parts: Path, *words: str) -> list[object]:
    return ["--llm", parts / "llm", "--encoder", f"whisper={parts / 'whisper'}", *words]


def test_a_model_of_trained_parts(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the one that `build` returns; what is said of it is what it is; and it can be asked."""
    words = ["--integration", "plits", "--connector", "mlp,stack=4", "--seed", "7", "--dtype", "bf16"]
    assert run("init", tmp_path / "new" / "model", *options(parts, *words)) == 0
    said = capsys.readouterr().out.splitlines()
    entry = {"type": "whisper", "checkpoint": parts / "whisper", "integration": "plits"}
    model, _ = build(parts / "llm", [{**entry, "connector": {"type": "mlp", "stack": 4}}], seed=7, dtype=torch.bfloat16)
    loaded = PalForConditionalGeneration.from_pretrained(tmp_path / "new" / "model")
    assert loaded.dtype == torch.bfloat16
    assert equal(loaded.state_dict(), model.state_dict())
    connector = sum(weight.numel() for weight in model.multi_modal_projector.parameters()) / 1e6
    assert said[0] == f"Model: {tmp_path / 'new' / 'model'}"
    assert said[1].startswith("  language model: llama, 3 layers of width 32, vocabulary 260, the audio token 259, ")
    assert said[2].endswith(f"; plits through mlp, stack 4, {connector:.1f} M parameters")
    assert said[3].endswith("in bfloat16; untrained: connector of whisper")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert json.loads((tmp_path / "new" / "model" / "untrained.json").read_text()) == {
        "untrained": ["connector of whisper"],
        "seed": 7,
    }
    assert (
        run("ask", "--model", tmp_path / "new" / "model", "What is it?", "--max-new-tokens", 4, "--device", "cpu") == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "This model is untrained in its connector of whisper: what it says of a sound means nothing yet."


def test_an_empty_directory_that_is_there(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the current one, and stays the same directory."""
    before = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    assert run("init", ".", *options(parts, "--layers", "1-")) == 0
    assert tmp_path.stat().st_ino == before
    assert PalForConditionalGeneration.from_pretrained(tmp_path).config.layers == [1, 2]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_small_model_in_other_ways(tmp_path: Path) -> None:
    """Without parts the other options still say how audio enters."""
    words = ["--integration", "flamingo", "--connector", "qformer,num_queries=2,num_layers=1,width=16,num_heads=2"]
    assert run("init", tmp_path / "m", *words) == 0
    config = PalForConditionalGeneration.from_pretrained(tmp_path / "m").config
    assert [entry["integration"] for entry in config.encoders] == ["flamingo"]
    assert json.loads((tmp_path / "m" / "untrained.json").read_text())["untrained"][-1] == "gated layers"
    assert run("ask", "--model", tmp_path / "m", "What?", "--max-new-tokens", 2, "--device", "cpu") == 0


def entries(encoders: list[str], **words: Any) -> list[dict[str, Any]]:
    return parse_encoders(Options(Path("x"), "llm", tuple(encoders), **{key: tuple(v) for key, v in words.items()}))


def test_options_of_encoders() -> None:
    """For all of them, for one, and for those that a connector fuses."""
    mlp = {"type": "mlp"}
    assert entries(["whisper=a=b", "sslam"]) == [
        {"type": "whisper", "checkpoint": "a=b", "integration": "lal", "connector": mlp},
        {"type": "sslam", "checkpoint": None, "integration": "lal", "connector": mlp},
    ]
    got = entries(["clap=c", "whisper=w", "sslam=s"], connectors=["lfst,depth=1", "whisper=mlp,stack=2"],
                  integrations=["plits", "whisper=lal"])  # fmt: skip
    assert got == [
        {"type": ["sslam", "clap"], "checkpoint": ["s", "c"], "integration": "plits",
         "connector": {"type": "lfst", "depth": 1}},
        {"type": "whisper", "checkpoint": "w", "integration": "lal", "connector": {"type": "mlp", "stack": 2}},
    ]  # fmt: skip
    values = entries(["sslam"], connectors=["sslam=qformer,dropout=0.5,num_queries=3,x=true,y=name"])[0]["connector"]
    assert values == {"type": "qformer", "dropout": 0.5, "num_queries": 3, "x": True, "y": "name"}


def test_every_mistake_is_one_line(parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And leaves nothing behind."""
    target = tmp_path / "new" / "model"
    (tmp_path / "new").mkdir()
    llm, whisper, clap = ["--llm", parts / "llm"], f"whisper={parts / 'whisper'}", f"clap={parts / 'clap'}"
    for words, message in (
        (llm, "--encoder must be given with --llm, got none"),
        (["--encoder", whisper], "--llm must be given with --encoder, got none"),
        ([*llm, "--encoder", "x=y"], "--encoder must be TYPE=DIRECTORY, TYPE being whisper, clap or sslam, got 'x=y'"),
        ([*llm, "--encoder", "whisper="], "--encoder must be TYPE=DIRECTORY"),
        (options(parts, "--integration", "x"), "--integration must be lal, plits or flamingo, got 'x'"),
        (options(parts, "--integration", "clap=lal"), "--integration must name an encoder that is there, whisper, got"),
        (options(parts, "--integration", "lal", "--integration", "plits"), "--integration must be given once, got"),
        (options(parts, "--connector", "x"), "--connector must be mlp, qformer or lfst, got 'x'"),
        (options(parts, "--connector", "mlp,stack"), "--connector must have settings such as mlp,stack=4, got 'stack'"),
        (options(parts, "--connector", "mlp,stack=0"), "stack must be a positive integer, got 0"),
        (options(parts, "--connector", "mlp,size=4"), 'must have keys of "input_size", "hidden_size"'),
        (options(parts, "--connector", "lfst"), "--connector lfst must have the encoders sslam and clap, got no sslam"),
        (
            options(parts, "--encoder", "sslam", "--encoder", clap, "--connector", "lfst"),
            "--connector lfst must be for sslam and clap, got whisper: whisper=mlp is its own",
        ),
        (
            [*llm, "--encoder", "sslam", "--encoder", clap, "--connector", "lfst", "--integration", "clap=plits"],
            "--integration must be one for encoders that a connector fuses, got lal and plits",
        ),
        (options(parts, "--layers", "9"), "layers must be from 0 to 2"),
        (options(parts, "--dtype", "int8"), "--dtype must be one of auto, bf16"),
        (options(parts, "--seed", "-1"), "seed must be an integer from 0"),
        (["--llm", tmp_path / "none", "--encoder", whisper], "must be a directory, a .gguf file or a name on the hub"),
        ([*llm, "--encoder", f"whisper={parts / 'clap'}"], "must hold a Whisper model, got model_type 'clap'"),
    ):
        assert run("init", target, *words) == 2, message
        said = capfd.readouterr().err.strip().splitlines()
        assert said[-1].startswith("error: ")
        assert message in said[-1]
        assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_failure_in_the_midst_leaves_nothing(
    parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """A full disk, say, after the weights were written."""

    def full(directory: Path, *arguments: Any) -> None:
        assert (directory / "model.safetensors").is_file()
        raise OSError(28, "No space left on device")

    if there:
        (tmp_path / "model").mkdir()
    monkeypatch.setattr(init, "write_untrained", full)
    assert run("init", tmp_path / "model", *options(parts)) == 2
    assert "No space left on device" in capfd.readouterr().err
    assert list(tmp_path.rglob("*")) == [tmp_path / "model"] * there


def test_a_folder_that_cannot_be_written(parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("init", tmp_path / "file" / "model", *options(parts)) == 2
    assert "Not a directory" in capfd.readouterr().err.splitlines()[-1]


def test_an_end_in_the_midst_leaves_nothing(parts: Path, tmp_path: Path) -> None:
    """Ctrl-C, or a time limit, when half of it is written."""
    (tmp_path / "new").mkdir()
    words = [str(word) for word in ("init", tmp_path / "new" / "model", *options(parts))]
    with running(words, tmp_path, terminated_amid_writing) as command:
        ended, _, error = command.end()
    assert ended == 128 + signal.SIGTERM, error
    assert error.splitlines()[-1] == "error: terminated"
    assert os.listdir(tmp_path / "new") == []
