"""`palkernels init` and `ask`, end to end."""

import io
import json
import subprocess
import sys
import wave
from pathlib import Path

import pytest
from support.sounds import sine, write
from transformers import AutoModelForMultimodalLM, AutoProcessor

from palkernels.bench.cli import main
from palkernels.model import AUDIO_TOKEN, PalForConditionalGeneration

UNTRAINED = "The weights of this model are random: its answer means nothing."


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture(scope="module", params=["lal", "plits"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("init") / "model"
    assert run("init", directory, "--integration", request.param) == 0
    return directory


def test_a_question_about_a_file(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44_100)
        file.writeframes(bytes(range(256)) * 200)
    answers = []
    for audio in (["--audio", tmp_path / "a.wav"], []):  # a file, and the bundled clip
        assert run("ask", "--model", made, *audio, "What is it?", "--max-new-tokens", 8) == 0
        said, _, answer = capsys.readouterr().out.partition("\n")
        assert said == UNTRAINED
        answers.append(answer)
    (made / "untrained.json").rename(tmp_path / "untrained.json")
    assert run("ask", "--model", made, "What is it?", "--max-new-tokens", 8) == 0
    assert capsys.readouterr().out == answers[1]
    (tmp_path / "untrained.json").rename(made / "untrained.json")


def test_several_sounds(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All are heard: what is answered is what the model says to all of them."""
    for name, frequency in (("low", 200.0), ("high", 3000.0)):
        write(tmp_path / f"{name}.wav", sine(frequency))
    model = AutoModelForMultimodalLM.from_pretrained(made).eval()
    processor = AutoProcessor.from_pretrained(made)
    for names in (["low", "high"], ["high", "low"], ["high"]):
        files = [tmp_path / f"{name}.wav" for name in names]
        options = [word for file in files for word in ("--audio", file)]
        assert run("ask", "--model", made, *options, "What are they?", "--max-new-tokens", 8, "--device", "cpu") == 0
        answer = capsys.readouterr().out.removeprefix(f"{UNTRAINED}\n")
        sounds = [{"type": "audio", "path": str(file)} for file in files]
        messages = [{"role": "user", "content": [*sounds, {"type": "text", "text": "What are they?"}]}]
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        assert len(inputs["input_features"]) == len(files)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_what_init_writes_is_a_model_like_any(made: Path) -> None:
    assert not [path for path in made.iterdir() if path.suffix not in (".json", ".jinja", ".safetensors")]
    model, processor = AutoModelForMultimodalLM.from_pretrained(made), AutoProcessor.from_pretrained(made)
    assert processor.audio_token_id == model.config.audio_token_id
    assert json.loads((made / "untrained.json").read_text()) == {
        "untrained": ["language model", "encoder whisper", "connector of whisper"],
        "seed": 0,
    }


def test_every_mistake_is_one_line(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "text.wav").write_text("no sound")
    for arguments, message in (
        (["init", made], "must be a new or empty directory, got one with something in it"),
        (["init", __file__], "must be a new or empty directory, got a file"),
        (["init", tmp_path / "new", "--integration", "x"], "--integration must be lal, plits or flamingo, got 'x'"),
        (["ask", "--model", tmp_path / "empty", "?"], "--model must be a directory with a saved model"),
        (["ask", "--model", tmp_path / "other", "?"], "--model must be a saved audio LLM"),
        (["ask", "--model", made, "--audio", tmp_path / "text.wav", "?"], "must hold intact WAV, FLAC, OGG or MP3"),
        (["ask", "--model", made, "--audio", tmp_path / "none.wav", "?"], "must exist, got no such file"),
        (["ask", "--model", made, "--device", "tpu", "?"], "--device must be auto, cpu, cuda or cuda:INDEX"),
        (["ask", "--model", made, f"{AUDIO_TOKEN}?"], "content must be"),
    ):
        assert run(*arguments) == 2
        said = capfd.readouterr().err.strip().splitlines()
        assert said[-1].startswith("error: ")
        assert message in said[-1]
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path: Path) -> None:
    """The command works in a fresh process without a network."""
    assert run("init", tmp_path / "m") == 0
    code = f"""
import socket
def refuse(*arguments):
    raise OSError("no network")
socket.socket.connect = refuse
from palkernels.bench.cli import main
main({["ask", "--model", str(tmp_path / "m"), "What?"]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(f"{UNTRAINED}\n")


def test_a_conversation(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions in turn, as arguments or as lines of the standard input; their clip is encoded once."""
    encoded = []
    listen = PalForConditionalGeneration.get_audio_features
    monkeypatch.setattr(
        PalForConditionalGeneration,
        "get_audio_features",
        lambda self, *given, **more: encoded.append(1) or listen(self, *given, **more),
    )
    options = "ask", "--model", made, "--max-new-tokens", 4, "--device", "cpu"
    assert run(*options, "What is it?", "And why?") == 0
    assert len(encoded) == 1
    first, *answers = capsys.readouterr().out.split("> ")
    assert first == f"{UNTRAINED}\n" or first == ""
    assert answers[0].startswith("What is it?\n")
    assert answers[-1].startswith("And why?\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n\nAnd why?\n"))
    assert run(*options) == 0
    lines = "".join(part.partition("\n")[2] for part in answers)
    assert capsys.readouterr().out == lines
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert run(*options) == 2
    assert "a question must be given" in capsys.readouterr().err
