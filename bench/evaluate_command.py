"""The command `palkernels evaluate`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palkernels.bench.process import clean_up_when_ended, console

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[Path, typer.Option(help="Directory of a saved model.", show_default=False)],
    data: Annotated[
        list[Path], typer.Option(help="File of samples, such as a JSONL; may be repeated.", show_default=False)
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]METRIC",
            help="choice, exact, wer, cer, bleu or chrf, or several with commas, for a task or for all; may be "
            "repeated.  [default: by the task's samples]",
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures as JSON.")] = None,
    answers: Annotated[Path | None, typer.Option(help="File for every answer, as JSONL.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    batch: Annotated[int, typer.Option(help="Samples that are asked at once.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 64,
    limit: Annotated[
        int | None, typer.Option(help="The most samples of a file, evenly from all of it.  [default: all]", min=1)
    ] = None,
) -> None:
    """Ask a saved audio LLM questions from files, and compare its answers with those of the files, task by task."""
    from palkernels.bench.evaluate import Options, run

    clean_up_when_ended()
    run(
        Options(model, tuple(data), tuple(metric or ()), json, answers, device, batch, max_new_tokens, limit), console()
    )
