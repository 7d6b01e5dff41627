"""Every example runs as it stands, on a CPU, without a network, and shows what it is about."""

import importlib.util
import re
import socket
from pathlib import Path

import pytest
import torch

ALL = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
EXAMPLES = [path for path in ALL if path.stem != "serve"]  # which needs vLLM, and a network within the machine
# What each must print: the claim that it makes of the library.
SHOWN = {
    "attach": ("bit for bit: True", "stock one again: True", "generated: ["),
    "audio_llm": ("answer to 'A deep tone.': 'A deep tone.'", "answer to 'A high tone.': 'A high tone.'"),
    "lora": ("right: 100% of new clips", "right after loading: 100%"),
    "varlen": ("largest difference from each row alone: ",),
}


def load(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"an example must need no network, got a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, no_network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = load(path)
    lines = module.__doc__.strip().splitlines()
    assert len(lines) == 2
    module.main()
    printed = capsys.readouterr().out
    for shown in SHOWN[path.stem]:
        assert shown in printed
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_packed_rows_are_exact(capsys):
    (path,) = (path for path in EXAMPLES if path.stem == "varlen")
    load(path).main()
    (largest,) = re.findall(r"alone: (\S+)", capsys.readouterr().out)
    assert float(largest) <= 4 * torch.finfo(torch.float32).eps


def test_every_example_is_shown():
    assert {path.stem for path in EXAMPLES} == set(SHOWN)


def test_examples_are_made_of_public_parts():
    """What an example needs, a user needs: nothing comes from the benchmarks or from modules inside."""
    for path in ALL:
        modules = re.findall(r"^(?:from|import) (palkernels\S*)", path.read_text(), re.MULTILINE)
        assert set(modules) <= {"palkernels", "palkernels.model"}, path.name
