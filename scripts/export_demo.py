"""Write the demo's assets from a study of one method: weights, clips and questions, and what the model card says.

palkernels study --methods lal --tasks words,languages,direction,timbre --seeds 0 --train 400 --test 50 \\
    --align 3200 --joint 0 --every 800 --out demo-study
python scripts/export_demo.py demo-study

The questions are the first of the test split of each task, whatever the model answers.
"""

import hashlib
import json
import sys
from pathlib import Path

import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from palkernels.bench.demo import METHOD, WINDOW_SECONDS

CARD = """# The demo's weights

`connector.safetensors`: a two-layer MLP in bfloat16, {parameters:,} parameters, {size:.1f} MB, SHA-256
`{digest}`.
It lets the states of Whisper tiny.en into SmolLM2-135M-Instruct by LAL: as keys and values of all 30 layers, of which
no weight was changed. `palkernels demo` builds the three together.

- **Data**: generated sound alone. Speech by espeak-ng through espeakng-loader, tones by arithmetic, amid noise; no
  recording of anyone. {train} questions of each task ({tasks}).
- **Training**: {samples:,} samples in batches of {batch}, on one thread of a CPU ({cpu}): {seconds:,.0f} s.
- **Made by** `palkernels study` and `scripts/export_demo.py`, whose first lines are the commands; `about.json` has all
  settings and versions.
- **Accuracy** on {test} test questions of each task, whose voices training has not heard, half of them of combinations
  that it has not either (an answer counts if it is said whole, and nothing else):

| task | accuracy | chance |
|---|---:|---:|
{rows}

- **What it is not**: it knows these questions and no others, and no other kinds of sound.
- **Licence**: the connector, clips and questions are Apache-2.0, as this repository. SmolLM2-135M-Instruct is
  Apache-2.0, Whisper tiny.en MIT; both are taken from packages and are no part of this one.

The clips are the first of the test split of three tasks, whatever the model answers.
"""

ASSETS = Path(__file__).parents[1] / "bench" / "assets" / "demo"
SHOWN = 3


def main(out: Path) -> None:
    study = json.loads((out / "study.json").read_text(encoding="utf-8"))
    settings = study["meta"]["settings"]
    assert settings["window_seconds"] == WINDOW_SECONDS
    assert settings["methods"] == [METHOD]
    ASSETS.mkdir(parents=True, exist_ok=True)
    stage = out / "runs" / f"{METHOD}-{settings['seeds'][0]}" / "stages" / "1-align" / "trained.safetensors"
    with safe_open(stage, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(torch.bfloat16) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, ASSETS / "connector.safetensors", metadata=file.metadata())
    questions = []
    for task in settings["tasks"][:SHOWN]:
        folder = out / "sounds" / task
        line = json.loads((folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
        names = []
        for number, clip in enumerate(line["audios"]):
            samples, rate = soundfile.read(folder / clip, dtype="int16")
            name = f"{task}.flac" if len(line["audios"]) == 1 else f"{task}-{number}.flac"
            soundfile.write(ASSETS / name, samples, rate, subtype="PCM_16")
            names.append(name)
        questions.append({**line, "audios": names})
    text = "".join(json.dumps(line) + "\n" for line in questions)
    (ASSETS / "questions.jsonl").write_text(text, encoding="utf-8")
    end = study["runs"][0]["points"][-1]
    about = {
        "samples": end["samples"],
        "cpu_seconds": end["cpu_seconds"],
        "test": settings["test"],
        "accuracy": end["by_task"],
        "settings": settings,
        "versions": study["meta"]["versions"],
        "cpu": study["meta"]["cpu"],
    }
    (ASSETS / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    digest = hashlib.sha256((ASSETS / "connector.safetensors").read_bytes()).hexdigest()
    chances = study["meta"]["sounds"]["choices"]
    rows = [f"| {task} | {100 * share:.0f} % | {100 / chances[task]:.0f} % |" for task, share in end["by_task"].items()]
    card = CARD.format(
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        size=(ASSETS / "connector.safetensors").stat().st_size / 1e6,
        digest=digest,
        train=settings["train"],
        batch=settings["batch"],
        tasks=", ".join(settings["tasks"]),
        samples=end["samples"],
        cpu=study["meta"]["cpu"],
        seconds=end["cpu_seconds"],
        test=settings["test"],
        rows="\n".join(rows),
    )
    (ASSETS / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
