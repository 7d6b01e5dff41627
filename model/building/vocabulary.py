"""The audio token in a tokenizer and in the embeddings of its language model, and what else a conversation needs."""

import math
from typing import Any

import torch
from torch import Tensor

from palkernels.model.pal.tokenizer import knows_token

__all__ = ["PLAIN_TEMPLATE", "add_audio_token"]

# For a tokenizer without a chat template: each message is a line with its role, and an answer ends with the end of
# text. The marks say what labels are made of.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS = 64  # a vocabulary whose size is a multiple of 64, or of less, stays one: so matrices keep their alignment
SPREAD = 1e-9  # variance of new rows, as a share of the old rows': transformers' mean_resizing has the same
BLOCK = 8192  # rows of an embedding that are summed at a time, in float64


def add_audio_token(language_model: Any, tokenizer: Any, audio_token: str, generator: torch.Generator) -> int:
    """Give a tokenizer an audio token, a token for padding and a chat template, where it lacks them; return the audio
    token's id.

    The language model's embeddings grow where they have no row left for it. New rows are drawn closely around the mean
    of the others, so that what the language model says stays what it was: a token with a mean row is as likely as the
    average one.

    Raises:
        ValueError: the tokenizer has no end of text, or splits the audio token.
    """
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer must have an eos_token, with which an answer ends, got none")
    tokenizer.add_tokens([audio_token], special_tokens=True)  # an ordinary token becomes one that is never split
    if not knows_token(tokenizer, audio_token) or tokenizer.tokenize(f"a{audio_token}b").count(audio_token) != 1:
        raise ValueError(f"audio_token must be one token to the tokenizer, got {audio_token!r}")
    if tokenizer.pad_token is None:  # nothing attends to padding, and labels know an end of text by its place
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    grow_embeddings(language_model, max(tokenizer.get_vocab().values()) + 1, generator)
    for config in (language_model.config.get_text_config(), language_model.generation_config):
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    return int(tokenizer.convert_tokens_to_ids(audio_token))


def grow_embeddings(language_model: Any, rows: int, generator: torch.Generator) -> None:
    """Make room for ``rows`` tokens in the embeddings of a language model and in its head, tied or not."""
    before = language_model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    language_model.resize_token_embeddings(rows, pad_to_multiple_of=math.gcd(before, ROWS), mean_resizing=False)
    modules = [language_model.get_input_embeddings(), language_model.get_output_embeddings()]
    weights = {id(module.weight): module.weight.detach() for module in modules if module is not None}
    for weight in weights.values():
        weight[before:] = _around_the_mean(weight[:before], len(weight) - before, generator)
    bias = getattr(modules[1], "bias", None)
    if bias is not None:
        bias.detach()[before:] = bias.detach()[:before].mean()


def _around_the_mean(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` rows from a normal distribution around the mean of others.

    Its covariance is theirs but for what is beside the diagonal, times ``SPREAD``: all of it, as transformers takes,
    is a matrix product of the size of the vocabulary times the square of the width.
    """
    blocks = range(0, len(rows), BLOCK)
    mean = torch.stack([rows[i : i + BLOCK].double().sum(dim=0) for i in blocks]).sum(dim=0) / len(rows)
    squares = torch.stack([(rows[i : i + BLOCK].double() - mean).square().sum(dim=0) for i in blocks]).sum(dim=0)
    noise = torch.randn(count, rows.shape[1], generator=generator, dtype=torch.float64)
    return (mean + noise * (SPREAD * squares / len(rows)).sqrt()).to(rows.dtype)
