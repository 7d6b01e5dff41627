"""The command `ask`: a question about sounds to a saved audio LLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import TextStreamer

from palkernels.bench.demo import demo_model
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.options import parse_device
from palkernels.bench.saved import load_saved
from palkernels.bench.untrained import untrained_warning
from palkernels.model import AudioError

__all__ = ["ask"]


def ask(
    directory: Path | None, audio: Sequence[Path], question: str, max_new_tokens: int = 64, device: str = "cpu"
) -> None:
    """Print the answer of a model to a question about sounds, token by token.

    Args:
        directory: Of a saved model; None: the demo's.
        audio: Files, in their order.
        question: What is asked after them.
        max_new_tokens: The longest answer.
        device: "auto", "cpu", "cuda" or "cuda:INDEX".

    Raises:
        UserError: the directory holds no audio LLM, a package of the demo is missing, the file is refused, or there is
            no such device.
    """
    target = parse_device(device)
    model, processor = demo_model(target) if directory is None else load_saved(directory, target)
    sounds = [{"type": "audio", "path": path} for path in audio]
    messages = [{"role": "user", "content": [*sounds, {"type": "text", "text": question}]}]
    try:
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True).to(target)
    except (AudioError, ValueError) as error:
        raise UserError(one_line(error)) from error
    if directory is not None and (warning := untrained_warning(directory)) is not None:
        print(warning)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False)
