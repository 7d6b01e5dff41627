"""Print the table of docs/training.md: what the stages of examples/recipes/llama-whisper-sslam.yaml cost on GPUs.

    .venv/bin/python scripts/training_costs.py

Nothing is downloaded: files and checkpoints that the recipe names are stood in for, and tensors have no values.
"""

import shutil
import tempfile
from pathlib import Path

import torch

from palkernels.bench.experiments.training_cost import simulate_stage
from palkernels.bench.presets import plan_llm
from palkernels.model import AUDIO_TOKEN, PalConfig, PalProcessor, byte_tokenizer
from palkernels.model.encoders.whisper import WHISPER_SIZES
from palkernels.model.training.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "examples" / "recipes" / "llama-whisper-sslam.yaml"
NAMED = ("whisper-small", "SSLAM", "closed.jsonl", "openaqa_closed.json", "open.jsonl", "held_out.jsonl")
SECONDS, TEXT, ANSWER, SAMPLES = 10, 128, 64, 1_000_000
COUNTS = (1, 2, 4, 8)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(RECIPE, folder)
        for name in NAMED:
            (Path(folder) / name).touch()
        recipe = load_recipe(Path(folder) / RECIPE.name, ["log.report_to=[]"])  # whose packages need not be here
    shapes = {"whisper": dict(WHISPER_SIZES["small"]), "sslam": {}}
    entries = []
    for encoder in recipe.model.encoders:
        kind = encoder["connector"]["type"]
        settings = {name: value for name, value in encoder["connector"].items() if name != "type"}
        connector = {"type": kind, "config": settings}
        entry = {"type": encoder["type"], "config": shapes[encoder["type"]], "connector": connector}
        entries.append({**entry, "integration": encoder["integration"]})
    config = PalConfig(text_config=plan_llm("llama-3.2-1b", None).config, encoders=entries)
    processor = PalProcessor(byte_tokenizer(), config.encoders)
    print("| stage | trains | GPUs | GiB a GPU, DDP | FSDP2 | hours on A100 | H200 |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for stage in recipe.stages:
        piece = stage.batch // stage.gradient_accumulation
        clips = [[torch.zeros(SECONDS * 16_000)] for _ in range(piece)]
        texts = [AUDIO_TOKEN + "x" * (TEXT - 1)] * piece
        begins = len(texts[0]) - ANSWER
        batch = dict(processor(texts, audio=clips, sampling_rate=16_000, labels_from=begins))
        cost = simulate_stage(stage, config, batch, SAMPLES // stage.batch, torch.bfloat16, bf16=True)
        for count in COUNTS:
            named = f"{stage.name} | {', '.join(stage.train)}: {cost.trained / 1e6:.0f} M" if count == 1 else " | "
            sharded = f"{cost.memory(count) / 2**30:.1f}" if count > 1 else ""
            hours = [f"{cost.seconds(gpu) / 3600 / count:.1f}" for gpu in ("a100-80gb", "h200")]
            print(f"| {named} | {count} | {cost.memory() / 2**30:.1f} | {sharded} | {' | '.join(hours)} |")


if __name__ == "__main__":
    main()
