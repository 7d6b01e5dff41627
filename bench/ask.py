"""The commands `init` and `ask`: a small audio LLM with random weights in a directory, and a question about a sound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TextStreamer
from transformers.utils import logging

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.options import parse_device
from palkernels.model import AUDIO_TOKEN, AudioError, PalForConditionalGeneration, PalProcessor, byte_tokenizer

__all__ = ["ask", "init"]

UNTRAINED_FILE = "untrained.json"  # in a directory that `init` wrote
UNTRAINED = "The weights of this model are random: its answer means nothing."
WHISPER = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}
# Every message ends with the tokenizer's end of text, so that a trained answer would end there.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def init(directory: Path, integration: str = "lal", seed: int = 0) -> None:
    """Write a small audio LLM with random weights: Llama of two layers, a Whisper encoder of one, an MLP between them.

    Raises:
        UserError: the directory holds something already, or the integration is unknown.
    """
    if integration not in ("lal", "plits"):
        raise UserError(f"--integration must be lal or plits, got {integration!r}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        got = "one with something in it" if directory.is_dir() else "a file"
        raise UserError(f"{str(directory)!r} must be a new or empty directory, got {got}")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    entry = {"type": "whisper", "config": WHISPER, "integration": integration, "connector": {"type": "mlp"}}
    model = PalForConditionalGeneration.from_parts(
        AutoModelForCausalLM.from_config(config), [entry], audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
    )
    model.save_pretrained(directory)
    PalProcessor.from_config(tokenizer, model.config, chat_template=TEMPLATE).save_pretrained(directory)
    (directory / UNTRAINED_FILE).write_text(json.dumps({"weights": "random", "seed": seed}) + "\n", encoding="utf-8")


def ask(directory: Path, audio: Sequence[Path], question: str, max_new_tokens: int = 64, device: str = "cpu") -> None:
    """Print the answer of a saved model to a question about sounds, token by token.

    Raises:
        UserError: the directory holds no audio LLM, the file is refused, or there is no such device.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"--model must be a directory with a saved model, got {str(directory)!r}")
    target = parse_device(device)
    logging.disable_progress_bar()
    try:
        model = PalForConditionalGeneration.from_pretrained(directory, local_files_only=True).to(target).eval()
        processor = PalProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"--model must be a saved audio LLM, got {one_line(error)}") from error
    sounds = [{"type": "audio", "path": path} for path in audio]
    messages = [{"role": "user", "content": [*sounds, {"type": "text", "text": question}]}]
    try:
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True).to(target)
    except (AudioError, ValueError) as error:
        raise UserError(one_line(error)) from error
    if (directory / UNTRAINED_FILE).is_file():
        print(UNTRAINED)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False)
