"""What long sound costs by LAL on a CPU: memory and processor seconds of a conversation against minutes of sound.

python scripts/long_sound.py bench/results/long-sound-cpu.json

Each length has a process of its own, on one thread: the first 8 layers of SmolLM2-135M and Whisper tiny with random
weights, of whose states four become one token.
"""

import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from palkernels.bench.machine import cpu_name, package_version
from palkernels.bench.presets import plan_llm
from palkernels.model import byte_tokenizer
from palkernels.model.building import assemble
from palkernels.model.pal.conversation import Conversation

MINUTES = (1, 10, 30, 60)
LAYERS, RATE, NEW, STACK = 8, 16_000, 8, 4
ENTRY = {"type": "whisper", "integration": "lal", "connector": {"type": "mlp", "config": {"stack": STACK}}}


def measure(minutes: int) -> dict[str, Any]:
    """Return the row of a clip: two questions about it, the first of which brings it."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    plan = plan_llm("smollm2-135m", LAYERS)
    plan.config.max_position_embeddings = 65_536
    model, processor = assemble(
        plan.build(torch.float32, torch.device("cpu"), 0).model, byte_tokenizer(), [ENTRY], seed=0
    )
    generator = np.random.default_rng(0)
    clip = np.concatenate([generator.standard_normal(60 * RATE, dtype=np.float32) for _ in range(minutes)])
    conversation = Conversation(model, processor, [clip], sampling_rate=RATE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for question in ("What is it?", "And at the end?"):
        start = time.process_time()
        conversation.ask(question, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        seconds.append(time.process_time() - start)
    tokens = minutes * 60 * 50 // STACK
    bytes_per_token = 4 * 2 * LAYERS * plan.config.num_key_value_heads * plan.config.head_dim
    return {
        "minutes": minutes,
        "audio_tokens": tokens,
        "first_answer_processor_seconds": seconds[0],
        "second_answer_processor_seconds": seconds[1],
        "peak_above_model_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "clip_bytes": clip.nbytes,
        "kv_bytes": tokens * bytes_per_token,
    }


def main() -> None:
    """Measure every length and write the file."""
    rows = []
    for minutes in MINUTES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (minutes,)))
        print(rows[-1], flush=True)
    versions = {name: package_version(name) for name in ("palkernels", "torch", "transformers")}
    meta = {"cpu": cpu_name(), "versions": versions, "layers": LAYERS, "new_tokens": NEW, "stack": STACK}
    Path(sys.argv[1]).write_text(json.dumps({"meta": meta, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
