"""The model that comes with the package: a trained connector between two pretrained parts, and questions to ask it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.new_directory import check_new, staged
from palkernels.bench.study.contestants import CONTESTANTS
from palkernels.bench.study.packages import encoder_folder, llm_file
from palkernels.model import build
from palkernels.model.data import read
from palkernels.model.training import load_trained

__all__ = ["ASSETS", "METHOD", "QUESTIONS", "WEIGHTS", "WINDOW_SECONDS", "demo_model", "run", "save"]

METHOD, WINDOW_SECONDS = "lal", 4.0  # of the study's run that trained the weights
ASSETS = Path(str(files("palkernels.bench").joinpath("assets", "demo")))
WEIGHTS, QUESTIONS = ASSETS / "connector.safetensors", ASSETS / "questions.jsonl"


def demo_model(device: torch.device) -> tuple[Any, Any]:
    """Return the demo's model, for inference, and its processor.

    Raises:
        UserError: A package that it is made of is missing or of another release.
    """
    recipe = CONTESTANTS[METHOD].model(str(llm_file()), str(encoder_folder()), WINDOW_SECONDS)
    logging.disable_progress_bar()
    try:
        model, processor = build(recipe.pop("llm"), recipe.pop("encoders"), **recipe)
        load_trained(model, WEIGHTS)
    except (ValueError, ImportError) as error:
        raise UserError(f"the demo's parts must be those of demo-packages.txt, got {one_line(error)}") from error
    return model.to(device).eval(), processor


def save(directory: Path, console: Console) -> None:
    """Write the demo's model and its processor to a directory, whole or not at all: to serve it, or to train it on.

    Raises:
        UserError: the directory holds something already or cannot be written, or a package that the model is made of is
            missing or of another release.
    """
    check_new(directory)
    try:
        with staged(directory) as folder, console.status("building and saving the demo's model"):
            for part in demo_model(torch.device("cpu")):
                part.save_pretrained(folder)
    except OSError as error:
        raise UserError(one_line(error)) from error
    console.print(f"Model: {directory}", highlight=False, markup=False)


def run(console: Console) -> None:
    """Ask the demo's model its questions, and print what it should have said beside what it says.

    Raises:
        UserError: A package that it is made of is missing or of another release.
    """
    with console.status("building SmolLM2-135M-Instruct that hears through Whisper tiny.en by LAL"):
        model, processor = demo_model(torch.device("cpu"))
    for sample in read(QUESTIONS):
        *question, answer = sample.messages
        inputs = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        said = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        text = " ".join(part["text"].strip() for part in question[-1]["content"] if part["type"] == "text")
        clips = ", ".join(Path(str(clip)).name for clip in sample.clips())
        for name, value in (
            ("clip", clips),
            ("question", text),
            ("should be", answer["content"]),
            ("model says", said),
        ):
            console.print(f"{name:>10}  {value}", highlight=False, markup=False)
        console.print()
    card = json.loads((ASSETS / "about.json").read_text(encoding="utf-8"))
    found = ", ".join(f"{task} {100 * share:.0f} %" for task, share in card["accuracy"].items())
    console.print(f"On {card['test']} unheard clips of each task it is right for: {found}.", highlight=False)
