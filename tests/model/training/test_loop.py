"""The loop is what one would write by hand; two processes come to what one does."""

import pytest
import torch
from support import runs
from support.runs import lines, run

from palkernels.model import PalForConditionalGeneration, PalProcessor
from palkernels.model.training.loop import schedule
from palkernels.model.training.material import read_material
from palkernels.model.training.order import only_foretold
from palkernels.model.training.recipe import LoraRecipe, StageRecipe, load_recipe
from palkernels.model.training.stages import choose, parameter_groups

RECIPE = """\
model: ./model
data: {train: [rows.jsonl]}
defaults: {batch: 4}
stages:
  - {name: both, train: [connector, llm], lr: {connector: 1e-2, llm: 1e-3}, steps: 20, weight_decay: 0.1, clip: 0.5}
output: out
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.make(tmp_path_factory.mktemp("run"), RECIPE)


@pytest.fixture(scope="module")
def losses(folder):
    run(folder)
    return [entry["loss"] for entry in lines(folder / "out")]


def test_a_loop_by_hand(folder, losses):
    """20 steps, with a batch of ever other lengths, a clipped norm, two rates, weight decay and a falling rate."""
    recipe = load_recipe(folder / "recipe.yaml")
    (stage,) = recipe.stages
    model = PalForConditionalGeneration.from_pretrained(folder / "model").train()
    material = read_material(recipe, PalProcessor.from_pretrained(folder / "model"), print)
    chosen = choose(model, stage.train, LoraRecipe())
    groups = parameter_groups(model, chosen, stage)
    optimizer = torch.optim.AdamW(groups)
    rates, factor = [group["lr"] for group in groups], schedule(stage, 20)
    want = []
    for step, samples in enumerate(material.order(stage, 0)):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor(step)
        loss = model(**material.collator(samples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        want.append(float(loss.detach()))
    assert len(want) == 20
    assert want[-1] < want[0] / 2
    torch.testing.assert_close(losses, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulation_changes_nothing(folder, losses, pieces, tmp_path):
    """Answers differ in length, so a mean of means would be another loss."""
    run(folder, f"output={tmp_path}", f"defaults.gradient_accumulation={pieces}")
    got = [entry["loss"] for entry in lines(tmp_path)]
    torch.testing.assert_close(got, losses, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 2])
def test_packing_changes_nothing(folder, losses, pieces, tmp_path):
    """The same samples in every step, and the same losses but for rounding; so on held-out samples."""
    words = ["data.packing=true", f"defaults.gradient_accumulation={pieces}"]
    run(folder, f"output={tmp_path / 'out'}", *words)
    got = lines(tmp_path / "out")
    torch.testing.assert_close([entry["loss"] for entry in got], losses, rtol=2e-4, atol=2e-5)
    unpacked = lines(folder / "out")
    for name in ("samples", "audio_tokens"):
        assert [entry[name] for entry in got] == [entry[name] for entry in unpacked]
    scores = []
    for packing in ("true", "false"):
        held_out = [f"data.eval=[{folder / 'held_out.jsonl'}]", "stages.0.steps=2", f"data.packing={packing}"]
        run(folder, f"output={tmp_path / packing}", words[1], *held_out)
        scores.append(lines(tmp_path / packing)[-1])
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    assert scores[0]["eval_loss"] == pytest.approx(scores[1]["eval_loss"], rel=2e-4)


def test_kept_states_change_nothing(folder, losses, tmp_path):
    """Each clip passes the encoder once, in the first run that uses the folder."""
    for output in ("first", "second"):
        _, said = run(folder, f"output={tmp_path / output}", f"data.cache={tmp_path / 'states'}")
        new = 10 if output == "first" else 0
        assert f"stage both: states of 10 clips, {new} of them new" in said
        torch.testing.assert_close([x["loss"] for x in lines(tmp_path / output)], losses, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_are_one(folder, losses, how, tmp_path):
    """Also over a checkpoint, where the last step of an epoch has too few samples to give each process one. Processes
    are copies of this one, as imports take longer than the run."""
    settings = ["defaults.gradient_accumulation=2", f"output={tmp_path / 'out'}", "checkpoint.steps=7"]
    for stop in (8, None):  # by a checkpoint to another pair of processes
        torch.multiprocessing.start_processes(
            one_of_two, (str(folder), settings, how, stop, str(tmp_path / f"port{stop}")), 2, start_method="fork"
        )
    torch.testing.assert_close([entry["loss"] for entry in lines(tmp_path / "out")], losses, rtol=2e-4, atol=2e-5)


def one_of_two(rank, *arguments):
    from support.two import join_and_train

    join_and_train(rank, *arguments)


def test_schedules():
    def factors(**settings):
        stage = StageRecipe("one", ("connector",), (), {"connector": 1.0}, **settings)
        return [round(schedule(stage, 4)(step), 3) for step in range(5)]

    assert factors(warmup=0, schedule="constant") == [1, 1, 1, 1, 1]
    assert factors(warmup=0, schedule="linear") == [1, 0.75, 0.5, 0.25, 0]
    assert factors(warmup=0, schedule="cosine") == [1, 0.854, 0.5, 0.146, 0]
    assert factors(warmup=0.5, schedule="linear") == [0.333, 0.667, 1, 0.5, 0]
    assert factors(warmup=1, schedule="constant") == [0.5, 1, 1, 1, 1]


def test_logits_only_where_something_is_foretold(folder):
    """The head sees the positions before the answers' tokens alone; the loss and its gradients stay."""
    recipe = load_recipe(folder / "recipe.yaml")
    material = read_material(recipe, PalProcessor.from_pretrained(folder / "model"), print)
    batch = material.collator([material.train[0][i] for i in (0, 3, 4)])
    model = PalForConditionalGeneration.from_pretrained(folder / "model").train()
    seen = []
    model.language_model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))

    def gradients(given):
        model.zero_grad()
        loss = model(**given).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    want, got = gradients(batch), gradients(only_foretold(batch))
    labelled = int((batch["labels"][:, 1:] != -100).any(dim=0).sum())
    assert seen == [batch["labels"].shape, (3, labelled)]
    assert labelled < batch["labels"].shape[1] / 2
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_without_labels_has_a_loss_of_nothing(folder):
    """As a process has one that must only do its part."""
    recipe = load_recipe(folder / "recipe.yaml")
    material = read_material(recipe, PalProcessor.from_pretrained(folder / "model"), print)
    batch = material.collator([material.train[0][0]])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model = PalForConditionalGeneration.from_pretrained(folder / "model").train()
    model(**only_foretold(batch), num_items_in_batch=torch.tensor(3)).loss.backward()
    for name, x in model.named_parameters():
        assert x.grad is None or not x.grad.any(), name
    assert any(x.grad is not None for x in model.multi_modal_projector.parameters())
