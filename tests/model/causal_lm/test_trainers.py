"""Other people's training loops: transformers' Trainer, accelerate's hooks, FSDP2."""

import pytest
import torch
from support.oracles import build
from support.processes import run_in_two
from support.training import gradients, inputs, same

from palkernels.model import AudioState, attach


def test_trainer(tmp_path):
    """transformers' Trainer as it is; its first loss is the model's own."""
    from transformers import Trainer, TrainingArguments

    model = build("llama")
    attach(model)
    ids, states, insert_at = inputs(torch.float32)
    rows = [{"input_ids": ids[i], "states": states[i], "insert_at": insert_at[i]} for i in range(4)]

    def collate(rows):
        ids, states, places = (torch.stack([row[name] for row in rows]) for name in rows[0])
        return {"input_ids": ids, "labels": ids, "audio": AudioState(states, insert_at=places)}

    with torch.no_grad():
        want = model(ids, labels=ids, audio=AudioState(states, insert_at=insert_at)).loss
    options = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, options, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert abs(losses[0] - float(want)) < 1e-3
    assert losses[2] < losses[0]


def test_trainer_keeps_the_audio_column(tmp_path):
    """By default the Trainer drops, before they are collated, all columns that ``forward`` does not name."""
    from transformers import Trainer, TrainingArguments

    model = build("llama")
    attach(model)
    ids, states, _ = inputs(torch.float32)
    rows = [{"input_ids": ids[i], "audio": AudioState(states[i : i + 1]), "file": "a.wav"} for i in range(4)]
    options = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    trainer = Trainer(model, options, train_dataset=rows, data_collator=lambda rows: [list(row) for row in rows])
    assert list(trainer.get_train_dataloader()) == [[["input_ids", "audio"]] * 4]


@pytest.mark.parametrize("attached", ["before", "after"])
@torch.no_grad()
def test_accelerate_moves_the_audio_once(attached, monkeypatch):
    """Its hooks call ``to`` on every keyword that has one, in every layer: what layers are given has none."""
    from accelerate import dispatch_model

    model = build("llama")
    ids, states, insert_at = inputs(torch.float32)
    keywords = {"audio": AudioState(states, insert_at=insert_at)}
    handle = attach(model)
    logits, options = model(ids, **keywords).logits, {"max_new_tokens": 3, "do_sample": False}
    tokens = model.generate(ids, **keywords, **options)
    if attached == "after":
        handle.detach()
    parts = ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb"]
    places = dict.fromkeys([*(f"model.{part}" for part in parts), "lm_head"], "cpu")
    dispatch_model(model, places, force_hooks=True)
    attach(model)
    moves, to = [], AudioState.to
    monkeypatch.setattr(AudioState, "to", lambda *args, **kwargs: moves.append(args) or to(*args, **kwargs))
    assert torch.equal(model(ids, **keywords).logits, logits)
    assert torch.equal(model.generate(ids, **keywords, **options), tokens)
    assert len(moves) <= 1


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    from support.sharded import run

    folder = tmp_path_factory.mktemp("processes")
    run_in_two(run, 2, str(folder))
    return folder


@pytest.mark.parametrize("name", ["with values", "without"])
def test_fsdp2_on_two_processes(two_processes, name):
    """fully_shard on two CPU processes, also of a model without values: loss and gradients of one process with the
    whole batch."""
    model = build("llama", torch.float64).train()
    attach(model)
    want = gradients(model)
    ids, states, insert_at = inputs()
    with torch.no_grad():
        loss = model(ids, labels=ids, audio=AudioState(states, insert_at=insert_at)).loss
    results = torch.load(two_processes / f"{name}.pt")
    torch.testing.assert_close(results.pop("loss"), loss)
    results["states"] = results["states"] / 2  # each process took the mean over its half of the rows
    same(results, want)
