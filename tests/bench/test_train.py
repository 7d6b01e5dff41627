"""The command train: what it says of a recipe, what a stage will cost, and how it is interrupted."""

import signal
import subprocess
import sys

import pytest
import torch
from support import runs
from support.audio_llm import batch_of_two, build_pal, entry, labelled
from support.commands import running
from support.samples import row, write_clip, write_lines

from palkernels.bench import cli
from palkernels.bench.experiments.training_cost import simulate_stage
from palkernels.bench.train import described_on_cpu
from palkernels.model import PalForConditionalGeneration
from palkernels.model.training.recipe import LoraRecipe, StageRecipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.make(tmp_path_factory.mktemp("run"))


def command(*words):
    with pytest.raises(SystemExit) as end:
        cli.main(list(map(str, words)))
    return end.value.code


def test_faults_are_all_listed(folder, capsys):
    assert command("train", folder / "recipe.yaml", "stages.0.lr=fast", "stages.1.trian=llm") == 2
    *faults, last = capsys.readouterr().err.splitlines()
    assert faults == [
        "stages.0.lr=fast: stages.0.lr must be a number above 0, got 'fast'",
        "stages.1.trian=llm: stages.1.trian is not known: did you mean 'train'?",
    ]
    assert last == "error: the recipe must be without faults, got 2, all above"
    assert command("train", folder / "none.yaml") == 2
    assert "the recipe must be a file of text that can be read" in capsys.readouterr().err


def test_train(folder, capsys):
    assert command("train", folder / "recipe.yaml", "stages.1.epochs=0.4") == 0
    said = capsys.readouterr().out
    assert "rows.jsonl: 10 samples of 11; dropped: 1 audio missing" in said
    assert "stage align: 3 steps of 4 samples, trains connector: 5,248 of 138,448 parameters" in said
    assert "GiB a GPU" in said
    for line in ("GiB besides the program's own", "stage align: step 2 of 3, loss ", " left"):
        assert line in said
    assert f"Model: {folder}/out/stages/2-adapt" in said
    assert command("train", folder / "recipe.yaml", "stages.1.epochs=0.4", "--resume") == 0
    assert "finished already" in capsys.readouterr().out
    assert command("train", folder / "recipe.yaml", "--resume") == 2
    assert "stages.1.epochs was 0.4, is 1.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "what",
    ["packed", *(pytest.param(what, marks=pytest.mark.slow) for what in ("a clip of two windows", "float16"))],
)
def test_what_is_predicted_and_trained(tmp_path, what, capsys):
    """Packed rows, clips longer than the encoder's window, and weights that are kept in float16."""
    folder = runs.make(tmp_path)
    words = ["stages.0.steps=1", "stages.1.epochs=0.4"]
    if what == "packed":
        words.append("data.packing=true")
    elif what == "float16":
        PalForConditionalGeneration.from_pretrained(folder / "model").half().save_pretrained(folder / "model")
    else:
        long = row(str(write_clip(folder / "clips" / "long.wav", 12.0)), "b", "<audio>What?")
        write_lines(folder / "rows.jsonl", *([long] * 4))
    assert command("train", folder / "recipe.yaml", *words) == 0
    said = capsys.readouterr().out
    assert said.count("GiB a GPU") == 2
    assert "cannot be predicted" not in said
    saved = PalForConditionalGeneration.from_pretrained(folder / "out" / "stages" / "2-adapt")
    assert saved.dtype == (torch.float16 if what == "float16" else torch.float32)


def test_a_prediction_that_fails_stops_nothing(folder, tmp_path, monkeypatch, capsys):
    def simulate(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr("palkernels.bench.train.simulate_stage", simulate)
    assert command("train", folder / "recipe.yaml", f"output={tmp_path / 'out'}", "stages.1.epochs=0.4") == 0
    said = capsys.readouterr().out
    assert "stage align: memory and time cannot be predicted: RuntimeError: no such operator" in said
    assert f"Model: {tmp_path}/out/stages/2-adapt" in said


def test_interrupted(folder, tmp_path):
    """Ctrl-C amid a stage: a checkpoint, one line, and 130; the run goes on from there."""
    words = ["train", str(folder / "recipe.yaml"), f"output={tmp_path / 'out'}", "stages.0.steps=200"]
    with running([*words, "--no-estimate"], tmp_path) as process:
        log = tmp_path / "out" / "log.jsonl"
        while process.is_alive() and not (log.exists() and log.read_text().count("\n") >= 2):
            process.wait(0.05)
        process.send(signal.SIGINT)
        ended, said, complained = process.end()
    assert ended == 130, complained
    assert "stopping after this step; once more to stop at once" in complained
    assert "of 200 of stage align: --resume goes on" in said
    done = int(said.split("after step ")[1].split()[0])
    assert (tmp_path / "out" / "checkpoints" / "1-align" / f"step-{done}").is_dir()
    assert 2 <= done < 200


@pytest.mark.parametrize(
    "entries", [[entry("clap")], [entry(["sslam", "clap"], connector="lfst")]], ids=["clap", "lfst"]
)
def test_cost_of_encoders(entries):
    """CLAP's constructor reads rates from a tensor, which has no values here."""
    model = build_pal(*entries)
    batch = labelled(batch_of_two(model))
    memory = []
    for train in (("connector",), ("connector", "encoders")):
        stage = StageRecipe("one", train, (), dict.fromkeys(train, 1e-3))
        memory.append(simulate_stage(stage, model.config, batch, 10, torch.float32, False).memory())
    assert 0 < memory[0] < memory[1]


def test_memory_on_a_cpu():
    """By the implementation that runs there; what does not fit is said."""
    model = build_pal(entry("sslam"))
    stage = StageRecipe("one", ("connector",), (), {"connector": 1e-3})
    cost = simulate_stage(stage, model.config, labelled(batch_of_two(model)), 10, torch.float32, False, "sdpa")
    assert cost.simulation.impl == "sdpa"
    line = "  on this machine's CPU: memory about 0.00 GiB besides the program's own"
    assert described_on_cpu(cost, 2**31) == f"{line}, 2.0 GiB are free"
    assert described_on_cpu(cost, 1000) == f"{line}, 0.0 GiB are free: THAT IS NOT ENOUGH"
    assert described_on_cpu(cost, None) == line


@pytest.mark.parametrize("train", [("connector",), ("connector", "llm"), ("connector", "lora")])
def test_cost(train):
    """What trains has AdamW's two states, in float32; the rest has none, and 16 bits where they compute."""
    model = build_pal(entry("sslam"))
    batch = labelled(batch_of_two(model))
    stage = StageRecipe("one", train, (), dict.fromkeys(train, 1e-3), gradient_accumulation=2, lora=LoraRecipe(r=2))
    whole, half = (
        simulate_stage(stage, model.config, batch, 10, dtype, bf16)
        for dtype, bf16 in ((torch.float32, False), (torch.bfloat16, True))
    )
    count, trained = whole.parameters, whole.trained
    parts = whole.simulation.memory_breakdown
    assert parts["parameters"] >= 4 * count
    assert 8 * trained <= parts["optimizer"] <= 8 * trained + 4 * len(list(model.parameters())) * 4
    frozen, in_half = count - trained, half.simulation.memory_breakdown
    assert in_half["parameters"] == pytest.approx(4 * trained + 2 * frozen, rel=0.1)
    assert in_half["optimizer"] == parts["optimizer"]
    assert whole.pieces == 20
    assert whole.memory(8) < whole.memory(2) < whole.memory()
    assert 0 < whole.seconds("h200") < whole.seconds("a100-80gb") * 1.01


@pytest.mark.slow
def test_launched_in_several_processes(tmp_path):
    """By what `accelerate launch` starts them with: each runs the command, and knows how many there are."""
    runs.make(tmp_path)
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "palkernels.bench.cli", "train", str(tmp_path / "recipe.yaml"), "defaults.batch=2"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    message = "stages.1.batch must be a multiple of gradient_accumulation times processes, 2 times 2, got 2"
    assert message in done.stderr
