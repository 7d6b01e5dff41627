"""Runs of a recipe on a small model: the model and its rows in a folder, and what two runs must have in common."""

import json
import os
import signal
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from palkernels.model.training.checkpoints import read_json
from palkernels.model.training.recipe import load_recipe
from palkernels.model.training.run import train
from support.audio_llm import build_pal, entry, processor_of
from support.samples import TEMPLATE, row, write_clip, write_lines

ROWS = 10
# What decides the weights of a second stage: dropout's random numbers, two pieces a step, and an epoch's last step that
# is not full.
RECIPE = """\
model: ./model
data: {train: [rows.jsonl], eval: [held_out.jsonl]}
defaults: {batch: 4, lr: 1e-2}
stages:
  - {name: align, train: connector, steps: 3}
  - {name: adapt, train: [connector, lora], epochs: 1.5, gradient_accumulation: 2, lora: {r: 2, dropout: 0.3}}
output: out
checkpoint: {steps: 2}
"""


def make(folder, recipe=RECIPE, tower="sslam", **settings):
    """Write a model, clips, rows and a recipe into a folder."""
    model = build_pal(entry(tower, **settings))
    model.save_pretrained(folder / "model")
    processor_of(model, chat_template=TEMPLATE).save_pretrained(folder / "model")
    rows = []
    for i in range(ROWS):
        write_clip(folder / "clips" / f"{i}.wav", 0.05 + 0.02 * i, 200 + 100 * i)
        rows.append(row(f"clips/{i}.wav", "ab"[i % 2] * (1 + i % 3), "<audio>What?", task="odd" if i % 2 else "even"))
    lost = rows[0] | {"audios": ["clips/lost.wav"]}
    for name, kept in (("rows", [*rows, lost]), ("held_out", rows[:3])):
        write_lines(folder / f"{name}.jsonl", *kept)
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def run(folder, *overrides, resume=False, **settings):
    """Train, and return the folder of the last stage and what was said."""
    said = []
    last = train(load_recipe(folder / "recipe.yaml", overrides), resume=resume, say=said.append, **settings)
    return last, said


def weights(output):
    """The weights after each stage, whole and small."""
    files = sorted(Path(output).glob("stages/*/*.safetensors"))
    return {f"{file.parent.name}/{file.name}": load_file(file) for file in files}


def lines(output):
    """The log but for what it took."""
    entries = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in entry.items() if not name.endswith("seconds")} for entry in entries]


def same(output, want):
    """Two runs gave the same weights and logs, to the bit."""
    got, expected = weights(output), weights(want)
    assert got.keys() == expected.keys()
    assert len(got) == 4
    for file, tensors in expected.items():
        assert got[file].keys() == tensors.keys()
        for name, x in tensors.items():
            assert torch.equal(got[file][name], x), f"{file} {name}"
    assert lines(output) == lines(want)
    assert [read_json(file) for file in sorted(Path(output).glob("stages/*/stage.json"))] == [
        read_json(file) for file in sorted(Path(want).glob("stages/*/stage.json"))
    ]


def killed(folder, output, moment, names):
    """Run or resume in another process, which is killed at the ``moment``-th call of one of several functions; returns
    how many there were before it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def counting(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        try:
            for owner, name in names:
                setattr(owner, name, counting(getattr(owner, name)))
            run(folder, f"output={output}", resume=True)
            os.write(writer, str(count).encode())
        except BaseException:
            traceback.print_exc()  # to what pytest shows
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert said, "the run failed"
    return int(said)
