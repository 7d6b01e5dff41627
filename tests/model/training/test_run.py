"""Whole runs of a recipe: what they leave behind, and that they come to the same whatever happens on the way."""

import importlib.util
import json
import os
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support import runs
from support.audio_llm import build_pal, entry
from support.runs import lines, run, same, weights
from support.samples import TEMPLATE, write_clip, write_damaged

from palkernels.model import AudioError, PalForConditionalGeneration, PalProcessor
from palkernels.model.training.loop import audio_tokens
from palkernels.model.training.run import RunError, Stopped
from palkernels.model.training.trained import load_trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.make(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run: its folder, and what it said."""
    last, said = run(folder)
    return last.parents[1], said


def test_what_a_run_leaves(folder, whole):
    output, said = whole
    assert any("rows.jsonl: 10 samples of 11; dropped: 1 audio missing" in line for line in said)
    (dropped,) = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    assert (dropped["source"], dropped["reason"]) == ("rows.jsonl:11", "audio missing")
    steps = [entry for entry in lines(output) if "loss" in entry]
    assert [(entry["stage"], entry["step"], entry["samples"]) for entry in steps] == [
        ("align", 1, 4), ("align", 2, 8), ("align", 3, 10),
        ("adapt", 1, 4), ("adapt", 2, 8), ("adapt", 3, 10), ("adapt", 4, 14), ("adapt", 5, 15),
    ]  # fmt: skip
    assert all(entry["audio_tokens"] > 0 and entry["grad_norm"] > 0 for entry in steps)
    scores = [entry for entry in lines(output) if "accuracy" in entry]
    assert [entry["stage"] for entry in scores] == ["align", "adapt"]
    assert scores[0].keys() >= {"eval_loss", "accuracy", "by_task"}
    assert scores[0]["by_task"].keys() == {"even", "odd"}
    assert not list(output.glob("checkpoints/*/*"))


def test_scores_say_what_was_spent_until_then(folder, tmp_path):
    """Also between two lines of the loss, and behind the last; a clip has the tokens of each of its windows."""
    output = tmp_path / "out"
    words = [f"output={output}", "stages.0.steps=5", "stages.1.epochs=0.4", "log.steps=2", "log.eval_steps=1"]
    run(folder, *words)
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    align = [entry for entry in entries if entry["stage"] == "align"]
    scores = {entry["step"]: entry for entry in align if "accuracy" in entry}
    losses = {entry["step"]: entry for entry in align if "loss" in entry}
    assert (list(scores), list(losses)) == ([1, 2, 3, 4, 5], [2, 4])
    tokens = [scores[step]["audio_tokens"] for step in scores]
    assert tokens == sorted(set(tokens))
    assert all(scores[step]["audio_tokens"] == losses[step]["audio_tokens"] for step in losses)
    assert all(a["cpu_seconds"] < b["cpu_seconds"] for a, b in pairwise(scores.values()))
    model = build_pal(entry("sslam", "lal", "qformer"))  # of 5 tokens a window
    assert audio_tokens(model, {"audio_lengths": torch.tensor([[512 * 2 + 8], [8]])}) == 5 * (3 + 1)


def test_each_stage_is_a_whole_model(folder, whole):
    """It loads with its processor; the small file puts the same into the model that the stage began with."""
    output, _ = whole
    before = folder / "model"
    for stage in ("1-align", "2-adapt"):
        after = output / "stages" / stage
        model = PalForConditionalGeneration.from_pretrained(after)
        assert PalProcessor.from_pretrained(after).chat_template == TEMPLATE
        again = PalForConditionalGeneration.from_pretrained(before)
        want = dict(again.named_parameters())
        moved = {name for name, x in model.named_parameters() if not torch.equal(x, want[name])}
        parts = {name.partition(".")[0] for name in moved}
        assert parts == (
            {"multi_modal_projector"} if stage == "1-align" else {"multi_modal_projector", "language_model"}
        )
        assert all(".self_attn." in name for name in moved if name.startswith("language_model"))
        load_trained(again, after / "trained.safetensors")
        for name, x in again.state_dict().items():
            assert torch.equal(x, model.state_dict()[name]), name
        before = after


def test_killed_at_any_moment(folder, whole, tmp_path):
    """Killed again and again: before the first checkpoint, while one is written or removed, between stages."""
    output, _ = whole
    names = ((os, "fsync"), (Path, "rename"), (torch.optim.AdamW, "step"), (shutil, "rmtree"), (torch, "save"))
    total = runs.killed(folder, tmp_path / "counted", 0, names)
    draw = random.Random(2)
    for _ in range(4):
        moment = draw.randrange(1, total // 3)
        assert runs.killed(folder, tmp_path / "killed", moment, names) is None
    assert runs.killed(folder, tmp_path / "killed", 0, names) < total
    same(tmp_path / "counted", output)
    same(tmp_path / "killed", output)


def test_stopped_when_asked(folder, whole, tmp_path):
    """It writes a checkpoint first, from which it goes on in the middle of a stage."""
    output, _ = whole
    asked = iter([False, True])
    with pytest.raises(Stopped, match="stopped after step 2 of 3 of stage align: --resume goes on"):
        run(folder, f"output={tmp_path / 'out'}", stop=lambda: next(asked))
    asked = iter([False, False, False, False, True])
    with pytest.raises(Stopped, match="stopped after step 4 of 5 of stage adapt"):
        run(folder, f"output={tmp_path / 'out'}", resume=True, stop=lambda: next(asked))
    _, said = run(folder, f"output={tmp_path / 'out'}", resume=True)
    assert said[-4:-2] == ["stage align: done already", "stage adapt: goes on after step 4"]
    same(tmp_path / "out", output)


def test_other_samples_are_not_gone_on_with(folder, tmp_path):
    """A row less would give every step other samples."""
    own = shutil.copytree(folder, tmp_path / "own", ignore=shutil.ignore_patterns("out"))
    asked = iter([False, True])
    with pytest.raises(Stopped):
        run(own, stop=lambda: next(asked))
    rows = (own / "rows.jsonl").read_text()
    (own / "rows.jsonl").write_text(rows[rows.index("\n") + 1 :])
    with pytest.raises(RunError, match="a run must go on with the samples that it began with, got others"):
        run(own, resume=True)
    (own / "rows.jsonl").write_text(rows)
    run(own, resume=True)


def test_a_start_that_came_to_nothing_claims_nothing(folder, whole, tmp_path):
    """Neither what was wrong in the recipe, nor an end amid its first file."""
    output, _ = whole
    with pytest.raises(ValueError, match="must hold at least one"):
        run(folder, f"output={tmp_path / 'out'}", "data.max_tokens=1")
    (tmp_path / "out" / ".writing-recipe.json").write_text("{")
    run(folder, f"output={tmp_path / 'out'}")
    same(tmp_path / "out", output)


@pytest.fixture
def damaged(folder, tmp_path):
    """A clip that is damaged within, which its header does not tell, in rows and held-out rows."""
    own = shutil.copytree(folder, tmp_path / "own", ignore=shutil.ignore_patterns("out"))
    write_damaged(own / "clips" / "0.flac")
    for name in ("rows", "held_out"):
        file = own / f"{name}.jsonl"
        file.write_text(file.read_text().replace("clips/0.wav", "clips/0.flac"))
    return own


@pytest.mark.parametrize("cache", ["false", "true"])
def test_damaged_clips_are_dropped_before_the_first_step(damaged, cache):
    """And stay dropped when the run goes on, also where the clip has become whole meanwhile."""
    asked = iter([False, True])
    with pytest.raises(Stopped):
        run(damaged, f"data.cache={cache}", stop=lambda: next(asked))
    shutil.copy(damaged / "clips" / "1.wav", damaged / "clips" / "0.flac")
    last, said = run(damaged, f"data.cache={cache}", resume=True)
    assert f"{damaged}/rows.jsonl: 9 samples of 11; dropped: 1 audio missing, 1 audio unreadable" in said
    rows = [json.loads(line) for line in (last.parents[1] / "dropped.jsonl").read_text().splitlines()]
    lost = [(row["source"], row["path"]) for row in rows if row["reason"] == "audio unreadable"]
    assert lost == [(f"{name}.jsonl:1", f"{damaged}/{name}.jsonl") for name in ("rows", "held_out")]


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_that_was_not_looked_for(damaged, workers):
    """Ends the run at the step that hears it, in one line; with a whole clip in its place it goes on."""
    words = ["data.check=false", f"data.workers={workers}", "data.eval=[]"]
    with pytest.raises(AudioError) as caught:
        run(damaged, *words)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:1: audio file ")
    assert message.endswith("--resume goes on; a new run with data.check drops such rows")
    with pytest.raises(RunError, match=r"must go on with the recipe that it began with, got: data\.check was False"):
        run(damaged, *words, "data.check=true", resume=True)
    assert len(message.splitlines()) == 1
    write_clip(damaged / "clips" / "whole.wav", 0.1)
    (damaged / "clips" / "whole.wav").replace(damaged / "clips" / "0.flac")
    last, _ = run(damaged, *words, resume=True)
    assert last.name == "2-adapt"


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="saves a dataset: pip install datasets")
def test_a_dataset_whose_columns_the_recipe_names(folder, tmp_path):
    """Its clips are read from its files by workers, and one that is damaged there is dropped."""
    import datasets

    write_damaged(tmp_path / "broken.flac")
    clips = [*(folder / "clips" / f"{i}.wav" for i in range(4)), tmp_path / "broken.flac"]
    columns = {"speech": [{"bytes": x.read_bytes(), "path": None} for x in clips], "said": list("abcde")}
    dataset = datasets.Dataset.from_dict(columns).cast_column("speech", datasets.Audio())
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "spoken")
    named = "columns: {answer: said}, question: 'What?'"
    train = f"data.train=[{{path: {tmp_path}/spoken, split: train, {named}}}]"
    held_out = f"data.eval=[{{path: {tmp_path}/spoken, split: test, task: speech, {named}}}]"
    _, said = run(folder, train, held_out, "data.workers=1", "stages.1.epochs=1", f"output={tmp_path / 'out'}")
    assert f"{tmp_path}/spoken: 4 samples of 5; dropped: 1 audio unreadable" in said
    (dropped,) = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert dropped["source"] == "spoken/train:row 4"
    assert lines(tmp_path / "out")[-1]["by_task"].keys() == {"speech"}


def test_half_a_checkpoint_is_none(folder, whole, tmp_path):
    output, _ = whole
    asked = iter([False, True])
    with pytest.raises(Stopped):
        run(folder, f"output={tmp_path / 'out'}", stop=lambda: next(asked))
    (written,) = (tmp_path / "out" / "checkpoints" / "1-align").iterdir()
    shutil.copytree(written, written.with_name(".writing-step-3"))
    (written.with_name(".writing-step-3") / "trained.safetensors").write_bytes(b"half")
    run(folder, f"output={tmp_path / 'out'}", resume=True)
    same(tmp_path / "out", output)


def test_refused(folder, whole, tmp_path):
    with pytest.raises(RunError, match=r"output must be a new folder, got .*, which holds a run: --resume goes on"):
        run(folder)
    with pytest.raises(RunError, match=r"got: stages\.0\.lr\.connector was 0\.01, is 0\.02; stages\.1\.lr"):
        run(folder, "defaults.lr=2e-2", resume=True)
    last, said = run(folder, resume=True)
    assert said == [f"finished already: {last}"]
    (tmp_path / "other").write_text("")
    with pytest.raises(RunError, match=r"output must be a new or empty folder, got .* with something in it"):
        run(folder, f"output={tmp_path}")


def test_resumed_where_no_run_is(folder, tmp_path):
    """A new one begins, and a line says so; states are kept of what is learnt or held out alone."""
    words = f"output={tmp_path / 'out'}", "stages.align.steps=1", "stages.adapt.steps=1", "data.cache=true"
    _, said = run(folder, *words, resume=True)
    assert said[0] == f"no run to go on with in {tmp_path / 'out'}: a new one begins"
    assert any(
        line.startswith("stage align: states of ") and not line.startswith("stage align: states of 10") for line in said
    )


def test_plans_come_first(folder, tmp_path):
    """Before anything trains it is known how long it takes, and what the largest batch is."""
    plans = []

    def before(all_plans):
        plans.extend(all_plans)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, f"output={tmp_path / 'out'}", before=before)
    assert [(plan.steps, plan.samples, len(plan.longest)) for plan in plans] == [(3, 10, 4), (5, 15, 2)]
    batch = plans[1].collate(plans[1].longest)
    assert batch["labels"].shape[0] == 2
    assert int(batch["audio_lengths"].max()) == 8 * 2  # the longest clip's, 0.23 s
    assert weights(tmp_path / "out") == {}
