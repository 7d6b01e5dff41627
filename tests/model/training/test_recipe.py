"""Recipes: every fault at once, each with its line and what to do; numbers, names, paths and overrides."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import save

from palkernels.model.training import located
from palkernels.model.training.recipe import RecipeError, load_recipe

GOOD = """\
model:
  llm: ./llm
  encoders: [{type: whisper, integration: lal, connector: {type: mlp}}]
  layers: all
data:
  train: [{path: calls.jsonl, name: closed}, {path: qa.json, format: openaqa, weight: .5}]
  eval: [calls.jsonl]
  max_seconds: 30
defaults: {batch: 16, epochs: 1}
stages:
  - {name: align, train: [connector], data: closed, lr: 1e-3}
  - {name: open, train: [connector, lora], lr: {connector: 1e-4, lora: 5E-5}, steps: 1e2, lora: {r: 4}}
output: runs/first
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "calls.jsonl").write_text("")
    (tmp_path / "qa.json").write_text("[]")
    return tmp_path


def recipe(folder, text, overrides=()):
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml", overrides)


def faults(folder, text, overrides=()):
    with pytest.raises(RecipeError) as error:
        recipe(folder, text, overrides)
    return [fault.replace(f"{folder}/", "") for fault in error.value.faults]


def test_read(folder):
    read = recipe(folder, GOOD)
    assert (read.model.llm, read.output) == (str(folder / "llm"), str(folder / "runs/first"))
    assert [source.name for source in read.data.train] == ["closed", "qa"]  # a file's name is its own name
    align, both = read.stages
    assert (align.lr, align.data, align.epochs, align.batch) == ({"connector": 1e-3}, ("closed",), 1, 16)
    assert (both.lr, both.data) == ({"connector": 1e-4, "lora": 5e-5}, ("closed", "qa"))
    assert (both.steps, both.epochs, both.lora.r) == (100, None, 4)  # a length of its own instead of the default


def test_a_length_takes_the_place_of_another(folder):
    read = recipe(folder, GOOD, ["stages.open.epochs=2", "stages.align.samples=8"])
    assert [(stage.epochs, stage.steps, stage.samples) for stage in read.stages] == [(None, None, 8), (2, None, None)]
    read = recipe(folder, GOOD, ["defaults.steps=3"])
    assert read.stages[0].steps == 3
    (fault,) = faults(folder, GOOD, ["stages.open.epochs=2", "stages.open.samples=3"])
    assert "must not be given with epochs" in fault


def test_a_gguf_file_needs_its_reader(folder, monkeypatch):
    (folder / "llm.gguf").write_bytes(b"")
    text = GOOD.replace("./llm", "./llm.gguf")
    monkeypatch.setattr("palkernels.model.training.model_recipe.is_gguf_available", lambda: False)
    (fault,) = faults(folder, text)
    assert fault.startswith("recipe.yaml:2: model.llm must be a file that can be read")
    assert "palkernels[demo]" in fault


def test_every_fault_at_once_with_its_line(folder):
    text = """\
modl: x
model:
  llm: ./nothing
  encoders:
    - {type: wisper, connector: {type: mlp, stak: 2}}
data:
  train: [no.jsonl, calls.jsonl]
  max_seconds: long
stages:
  - name: align
    train: [conector, projectors, llm, lora]
    data: cals
    lr: 1e-3x
    epochs: 1
    steps: 4
    gradient_acumulation: 2
  - {name: align, train: [connector], lr: {conector: 1}, batch: 9, gradient_accumulation: 2}
"""
    found = faults(folder, text)
    for fault in (
        "recipe.yaml:1: modl is not known: did you mean 'model'?",
        "recipe.yaml:1: output must be given, got nothing",
        "recipe.yaml:3: model.llm must be a file or a directory that is there, got './nothing'",
        "recipe.yaml:5: model.encoders.0.type must be an encoder, got 'wisper': did you mean 'whisper'?",
        "recipe.yaml:5: model.encoders.0.connector.stak is not known",
        "recipe.yaml:7: data.train.0.path must be a file or a folder that is there, got 'no.jsonl'",
        "recipe.yaml:8: data.max_seconds must be a number above 0, got 'long'",
        "recipe.yaml:11: stages.0.train must name parts of the model, got 'conector': did you mean 'connector'?",
        "recipe.yaml:11: stages.0.train must name parts that the model has, got 'projectors': projectors are",
        "recipe.yaml:11: stages.0.train must name one of llm, attention, lora, all at most, got llm and lora",
        "recipe.yaml:12: stages.0.data must name data to train on, got 'cals': did you mean 'calls'?",
        "recipe.yaml:13: stages.0.lr must be a number above 0, got '1e-3x'",
        "recipe.yaml:15: stages.0.steps must not be given with epochs",
        "recipe.yaml:16: stages.0.gradient_acumulation is not known: did you mean 'gradient_accumulation'?",
        "recipe.yaml:17: stages.1.lr.conector is not known: did you mean 'connector'?",
        "recipe.yaml:17: stages.1.lr.connector must be given",
        "recipe.yaml:17: stages.1.batch must be a multiple of gradient_accumulation, 2, got 9",
        "recipe.yaml:17: stages.1.name must be a stage's own, got 'align' again",
    ):
        assert sum(line.startswith(fault) for line in found) == 1, (fault, found)
    assert len(found) == 18
    assert [int(line.split(":")[1]) for line in found] == sorted(int(line.split(":")[1]) for line in found)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("model: [1\n", "recipe.yaml:2: the file must be YAML"),
        ("seed: 1\nseed: 2\n", "recipe.yaml:2: 'seed' must be given once, got it again"),
        ("model: &x {llm: *x}\n", "recipe.yaml:1: a value must not hold itself"),
        ("- 1\n", "recipe.yaml:1: the recipe must be a mapping, got a list"),
        (
            GOOD.replace("model:\n  llm: ./llm", "model:\n  path: ./llm\n  llm: ./llm"),
            "recipe.yaml:3: model.llm must not",
        ),
        (GOOD.replace("  llm: ./llm\n", "").split("data:")[0], "recipe.yaml:1: data must be given"),
    ],
)
def test_what_is_no_recipe(folder, text, fault):
    assert any(line.startswith(fault) for line in faults(folder, text)), faults(folder, text)


def test_a_saved_model_says_what_it_has(folder):
    text = GOOD[GOOD.index("data:") :]
    (folder / "llm" / "config.json").write_text('{"model_type": "llama"}')
    assert "a model of type 'llama': give it as llm" in faults(folder, f"model: ./llm\n{text}")[0]
    (folder / "llm" / "config.json").write_text('{"model_type": "pal", "encoders": [{"integration": "lal"}]}')
    assert recipe(folder, f"model: ./llm\n{text}").model.path == str(folder / "llm")
    found = faults(folder, f"model: ./llm\n{text}", ["stages.align.train=[flamingo]"])
    place = "stages.align.train=[flamingo]: stages.0.train"
    assert found == [
        f"{place} must name parts that the model has, got 'flamingo': no encoder has integration: flamingo"
    ]


def test_overrides(folder, monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    monkeypatch.setattr(
        "palkernels.model.training.recipe.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    words = ["stages.0.lr=1e-4", "stages.open.steps=7", "log.report_to=[tensorboard]", "output=x", "seed=3"]
    read = recipe(folder, GOOD, words)
    assert (read.stages[0].lr["connector"], read.stages[1].steps, read.seed) == (1e-4, 7, 3)
    assert read.report_to == ("tensorboard",)
    assert read.output == "/x"  # of the command line, so relative to where it is given
    wrong = "stages.2.lr=1 stages.algin.lr=1 seed stages.0.lr=fast model.llm.x=1 seed=[ sed=1"
    found = faults(folder, GOOD, wrong.split())
    for fault in (
        "stages.2.lr=1: stages must have an item '2': it may be 0, 1, align, open",
        "stages.algin.lr=1: stages must have an item 'algin': did you mean 'align'?",
        "seed: an override must be KEY=VALUE",
        "stages.0.lr=fast: stages.0.lr must be a number above 0, got 'fast'",
        "model.llm.x=1: model.llm must be a mapping or a list to have 'x', got './llm'",
        "seed=[: the value must be YAML, got '['",
        "sed=1: sed is not known: did you mean 'seed'?",
    ):
        assert sum(line.startswith(fault) for line in found) == 1, (fault, found)


def test_what_decides_the_weights(folder):
    """Where a run stands and how it is watched decide nothing; a rate does."""
    same = recipe(folder, GOOD, ["output=y", "log.steps=5", "checkpoint.steps=7", "data.workers=2"]).meaning()
    other = recipe(folder, GOOD, ["stages.0.lr=2e-3"]).meaning()
    want = recipe(folder, GOOD).meaning()
    assert same == want
    assert {name for name in want if other[name] != want[name]} == {"stages.0.lr.connector"}


@pytest.mark.parametrize("name", ["e1", "E5", "1_", ".e3", "1e"])
def test_a_text_that_looks_like_a_number(tmp_path, name):
    tree = located.compose(f"name: {name}", "recipe.yaml", tmp_path)
    assert tree.value["name"].value == name


SPEECH = """\
    - path: speech
      split: test
      folder: clips
      columns: {answer: said}
      question: What is said?
"""


@pytest.fixture
def speech(folder):
    """A saved dataset of two splits without a question, as its files say of themselves."""
    (folder / "clips").mkdir()
    for split in ("train", "test"):
        (folder / "speech" / split).mkdir(parents=True)
        (folder / "speech" / split / "state.json").write_text("{}")
        features = {"sound": {"_type": "Audio"}, "said": {"dtype": "string", "_type": "Value"}}
        (folder / "speech" / split / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "speech" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return GOOD.replace("eval: [calls.jsonl]", f"eval:\n{SPEECH.rstrip()}")


needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None,
    reason="a dataset's columns are refused without it: pip install datasets",
)


@needs_datasets
def test_columns_of_a_dataset(folder, speech):
    (source,) = [one.source() for one in recipe(folder, speech).data.eval]
    assert (source.path, source.folder) == (str(folder / "speech"), str(folder / "clips"))
    assert (source.columns, source.question, source.split) == ({"answer": "said"}, "What is said?", "test")
    assert hash(recipe(folder, speech).data.eval[0])  # each is read once
    assert recipe(folder, speech).meaning()["data.eval.0.columns.answer"] == "said"


@needs_datasets
def test_every_fault_of_a_dataset(folder, speech):
    """Told by what lies there, before anything loads."""
    text = speech.replace("train: [{path: calls.jsonl,", "train: [{path: calls.jsonl, split: train,")
    found = faults(folder, text.replace("      question:", "      weight: 2\n      question:"))
    for fault in (
        "recipe.yaml:6: data.train.0.split must be given for a dataset alone, as rows of JSON name their parts",
        "recipe.yaml:12: data.eval.0.weight is not known",
    ):
        assert sum(line.startswith(fault) for line in found) == 1, (fault, found)
    for wrong, fault in (
        (("split: test", "split: dev"), "9: data.eval.0.split must be one of test, train, got 'dev'"),
        (("      split: test\n", ""), "8: data.eval.0.split must be one of test, train, got nothing"),
        (("folder: clips", "folder: none"), "10: data.eval.0.folder must be a folder that is there, got"),
        (("answer: said", "answr: said"), "11: data.eval.0.columns.answr is not known: did you mean 'answer'?"),
        (("answer: said", "answer: text"), "11: data.eval.0.columns must be among sound, said, got text"),
        (("      question: What is said?\n", ""), "8: data.eval.0.path must have a column for question, which columns"),
        (("question: What is said?", "question: ''"), "12: data.eval.0.question must say something"),
        (("path: speech", "path: speech\n      format: messages"), "9: data.eval.0.format must be auto or columns for"),
    ):
        (found, *_) = faults(folder, speech.replace(*wrong))
        assert found.startswith(f"recipe.yaml:{fault}"), found


MODEL = """\
model:
  llm: ./llm
  encoders:
    - {type: whisper, connector: {type: mlp}}
    - {type: sslam, connector: mlp}
  layers: all
"""


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (("type: mlp}}", "type: mlp, stack: no}}"), "4: model.encoders.0.connector.stack must be a positive integer"),
        (
            ("type: mlp}}", "type: qformer, dropout: no}}"),
            "4: model.encoders.0.connector.dropout must be one that can be",
        ),
        (
            ("type: mlp}}", "type: qformer, num_heads: 5}}"),
            "4: model.encoders.0.connector.num_heads must divide the width",
        ),
        (
            ("{type: mlp}", "lfst"),
            "4: model.encoders.0.connector must be of settings that go together, got: the type must",
        ),
        (
            ("type: sslam,", "type: sslam, config: {num_heads: 7},"),
            "5: model.encoders.1.config.num_heads must be one that",
        ),
        (
            ("type: sslam,", "type: sslam, config: {heads: 7},"),
            "5: model.encoders.1.config.heads must be one that can be",
        ),
        (
            ("type: whisper,", "type: whisper, config: {window_seconds: -1},"),
            "4: model.encoders.0.config.window_seconds ",
        ),
        (
            ("type: whisper,", "type: whisper, checkpoint: ./llm, config: {d_model: 8},"),
            "4: model.encoders.0.config.d_model is said by the checkpoint; beside one it may be window_seconds",
        ),
        (("layers: all", "projection: both"), '6: model.projection must be "shared" or "per_layer", got \'both\''),
        (("layers: all", "rope: no"), '6: model.rope must be "sequence" or "none"'),
        (("layers: all", "impl: fast"), "6: model.impl must be"),
        (("layers: all", "layers: 4-9"), "6: model.layers must be from 0 to 5"),
        (("layers: all", "summary_tokens: x"), "6: model.summary_tokens must be an integer, at least 0, got 'x'"),
        (("layers: all", "recompute_audio_kv: 1"), "6: model.recompute_audio_kv must be a bool, got 1"),
        (("layers: all", "encoder_batch: 0"), "6: model.encoder_batch must be an integer, at least 1, got 0"),
        (("layers: all", "flamingo: {every: 2}"), "6: model.flamingo must be a dict where audio enters by it"),
    ],
)
def test_settings_of_the_model_are_refused_before_anything_loads(folder, wrong, fault):
    (folder / "llm" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 6}')
    text = MODEL + GOOD[GOOD.index("data:") :]
    assert recipe(folder, text).model.llm
    (found,) = faults(folder, text.replace(*wrong))
    assert found.startswith(f"recipe.yaml:{fault}"), found


def test_all_wrong_settings_of_a_model_at_once(folder):
    (folder / "llm" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 6}')
    text = MODEL.replace("type: mlp}", "type: mlp}, integration: flamingo").replace("  layers: all\n", "")
    text += "  flamingo: {every: 9, heds: 4, ffn_multiplier: 0.5}\n  encoder_batch: no\n"
    text = text.replace("connector: mlp", "connector: mlp, integration: flamingo")
    found = faults(folder, text + GOOD[GOOD.index("data:") :])
    assert sorted(line.partition(" must")[0].partition(" is")[0] for line in found) == [
        "recipe.yaml:6: model.flamingo.every",
        "recipe.yaml:6: model.flamingo.ffn_multiplier",
        "recipe.yaml:6: model.flamingo.heds",
        "recipe.yaml:7: model.encoder_batch",
    ]


def test_damaged_weights_are_refused(folder):
    whole = save({"x": torch.ones(8)})
    (folder / "llm" / "model.safetensors").write_bytes(whole)
    assert recipe(folder, GOOD).model.llm
    (folder / "llm" / "model.safetensors").write_bytes(whole[:-8])
    found = faults(folder, GOOD.replace("type: whisper,", "type: whisper, checkpoint: ./llm,"))
    assert [line.partition(" must hold whole files of weights, got")[0] for line in found] == [
        "recipe.yaml:2: model.llm", "recipe.yaml:3: model.encoders.0.checkpoint",
    ]  # fmt: skip
    assert "with model.safetensors: SafetensorError" in found[0]


def test_reports(folder, monkeypatch):
    monkeypatch.setattr("palkernels.model.training.recipe.get_available_reporting_integrations", lambda: ["wandb"])
    assert recipe(folder, GOOD, ["log.report_to=[wandb, none]"]).report_to == ("wandb", "none")
    (found,) = faults(folder, GOOD, ["log.report_to=tensorbord"])
    assert found.endswith(
        "log.report_to must name what Trainer reports to, got 'tensorbord': did you mean 'tensorboard'?"
    )
    (found,) = faults(folder, GOOD, ["log.report_to=mlflow"])
    assert found.endswith("log.report_to must name packages that are installed, got 'mlflow': pip install mlflow")
