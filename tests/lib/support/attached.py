"""Attached models, batches of texts, and audio in every way in which it can be given."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from palkernels.model import AudioState, attach
from support.oracles import SIZES, build, oracle_logits, rows_of

LENGTHS = (7, 4, 9)  # of the texts in a batch
TOKENS = 6  # audio tokens of an audio row
WIDTH = 64


def texts(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 101, (n,), generator=generator) for n in LENGTHS]


def batch(ids, side):
    """Padded ids and mask; ``side`` is "left", "right", or "none" for equal lengths."""
    longest = max(map(len, ids))
    if side == "none":
        ids = [text.repeat(longest)[:longest] for text in ids]
    padded, masks = [], []
    for text in ids:
        gap = longest - len(text)
        pad = (gap, 0) if side == "left" else (0, gap)
        padded.append(torch.nn.functional.pad(text, pad, value=0))
        masks.append(torch.nn.functional.pad(torch.ones(len(text), dtype=torch.long), pad))
    return ids, torch.stack(padded), torch.stack(masks)


def audio_state(kind, dtype, layers="all", num_layers=3):
    """One state for each way audio can be given."""
    generator = torch.Generator().manual_seed(5)

    def states(rows):
        return torch.randn(rows, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)

    if kind == "prefix":
        return AudioState(states(3))
    if kind == "lengths":
        return AudioState(states(3), lengths=torch.tensor([6, 0, 3]))
    if kind == "inserted":
        return AudioState(states(3), lengths=torch.tensor([4, 6, 5]), insert_at=torch.tensor([3, 4, 0]))
    if kind == "two clips":
        insert_at = torch.tensor([[1, 1, 1, 5, 5, 5], [0, 0, 2, 2, 2, 2], [9, 9, 9, 9, 9, 9]])
        return AudioState(states(3), lengths=torch.tensor([6, 5, 6]), insert_at=insert_at)
    if kind == "shared":
        return AudioState(states(2), lengths=torch.tensor([6, 2]), index=torch.tensor([1, 0, 0]))
    if kind == "shared, inserted":
        return AudioState(states(2), index=torch.tensor([1, 0, 0]), insert_at=torch.tensor([2, 4, 1]))
    if kind == "per layer":
        chosen = range(num_layers) if layers == "all" else layers
        return AudioState(
            [states(3) if i in chosen else None for i in range(num_layers)], lengths=torch.tensor([6, 1, 3])
        )
    raise ValueError(kind)


KINDS = ("prefix", "lengths", "inserted", "two clips", "shared", "shared, inserted", "per layer")


def attached(family, kind, layers=3):
    """An attached model and a left-padded batch for it, by name."""
    model = build(family, layers=layers)
    attach(model)
    _, padded, mask = batch(texts(), "left")
    state = audio_state(kind, torch.float32, num_layers=layers)
    return model, {"input_ids": padded, "attention_mask": mask, "audio": state}


def oracle_rows(model, rope, ids, state, layers):
    chosen = range(3) if layers == "all" else layers
    stock = copy.deepcopy(model)
    return [oracle_logits(stock, row, chosen, rope) for row in rows_of(ids, LENGTHS, state, 3)]


def unpadded(logits, mask):
    return [row[keep.bool()] for row, keep in zip(logits, mask, strict=True)]


def largest_difference(got, want):
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


def tiny(model_type, **changes):
    """A family that looks like ours and computes something else."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | changes)))
