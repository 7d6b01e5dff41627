"""Loss and accuracy on samples that are held out.

An answer is right where each of its tokens is the most probable one after those before it, up to the one that ends it:
then and only then greedy decoding gives it whole. One forward tells it, without generating. Of a conversation with
several answers all must be right.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from palkernels.model.training.order import IGNORED, Pieces

__all__ = ["Scores", "score"]

LABELS = ("labels", "shift_labels")


@dataclass(frozen=True)
class Scores:
    """``eval_loss`` is the mean over the answers' tokens, ``accuracy`` the share of answers that greedy decoding gives;
    ``by_task`` the same of each task."""

    eval_loss: float
    accuracy: float
    by_task: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as a log has them."""
        return asdict(self)


@torch.no_grad()
def score(trainer: Any, model: nn.Module, pieces: Pieces) -> Scores:
    """Return the scores of a model, which all processes ask for together.

    Args:
        trainer: Has the ``loader`` of pieces, and devices.
        model: As it trains, wrapped.
        pieces: This process's samples.
    """
    tasks = sorted({sample.task for samples in pieces.order for sample in samples})
    numbers = {task: i for i, task in enumerate(tasks)}
    sums = torch.zeros(2 + 2 * len(tasks), dtype=torch.float64)  # loss, tokens; right and answers of each task
    training = model.training
    model.eval()
    ends = _ends(trainer.accelerator.unwrap_model(model), trainer.args.device)
    for batch, own in zip(trainer.loader(pieces), pieces, strict=True):
        inputs = trainer._prepare_inputs(batch)
        wanted, columns = inputs["shift_labels"], inputs["logits_to_keep"]
        with trainer.compute_loss_context_manager():
            logits = model(**{name: x for name, x in inputs.items() if name not in LABELS}).logits
        counts, loss, right = _answers(logits, wanted, torch.isin(inputs["input_ids"][:, columns], ends))
        sums[0] += float(loss)
        sums[1] += float(counts.sum())
        rows = _by_text(inputs, right, counts)
        for piece, (is_right, has_answer) in zip(own, rows, strict=True):
            if piece.heard and has_answer:
                place = 2 + 2 * numbers[piece.sample.task]
                sums[place] += is_right
                sums[place + 1] += 1
    model.train(training)
    if trainer.args.world_size > 1:
        on_device = sums.to(trainer.args.device)
        torch.distributed.all_reduce(on_device)
        sums = on_device.cpu()
    right_of, all_of = sums[2::2], sums[3::2].clamp(min=1)
    by_task = {task: float(right_of[i] / all_of[i]) for task, i in numbers.items() if task}
    return Scores(float(sums[0] / sums[1]), float(right_of.sum() / all_of.sum()), by_task)


def _ends(model: Any, device: torch.device) -> Tensor:
    """Return the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.long, device=device).reshape(-1)


def _answers(logits: Tensor, wanted: Tensor, is_end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return at which positions (B, N) an answer's token is wanted, the sum of their losses, and where it is foretold.

    What stands behind an answer's end, as a template's line break, counts as foretold: generating does not come to it.

    Args:
        logits: (B, N, V).
        wanted: (B, N) the tokens that come next; -100 where they are not of an answer.
        is_end: (B, N) which positions have a token that ends an answer.
    """
    counts = wanted != IGNORED
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return counts, loss, (logits.argmax(dim=-1) == wanted) | ~counts | (is_end & counts)


def _by_text(inputs: dict[str, Any], right: Tensor, counts: Tensor) -> list[tuple[bool, bool]]:
    """Return of each text of a batch whether its answer is right, and whether it has one."""
    if "attention_mask" in inputs or right.shape[0] > 1:
        return list(zip(right.all(dim=1).tolist(), counts.any(dim=1).tolist(), strict=True))
    all_texts = (inputs["position_ids"][0] == 0).cumsum(dim=0) - 1
    number = int(all_texts.max()) + 1
    wrong, answers = torch.zeros(number), torch.zeros(number)
    text = all_texts[inputs["logits_to_keep"]].cpu()
    wrong.index_add_(0, text, (~right[0]).float().cpu())
    answers.index_add_(0, text, counts[0].float().cpu())
    return [(not bad, has > 0) for bad, has in zip(wrong.tolist(), answers.tolist(), strict=True)]
