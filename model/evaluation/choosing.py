"""How probable each of a question's choices is as the whole answer.

It is the logarithm of the probability that the model, asked the question, says this choice and ends: a sum over the
tokens of the choice and the first token that ends an answer. It is not divided by the choice's length: with the end in
it, it is the probability of one answer among all there are, so that "one" has no advantage over "one hundred", while a
mean over tokens would favour choices of many tokens that follow from each other.

A question is computed once. Its choices go on from the cache, which remembers what the question has heard.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from palkernels.model.causal_lm.caches import CACHE_KEYWORDS
from palkernels.model.causal_lm.memory import cache_after
from palkernels.model.evaluation.questions import Question

__all__ = ["choice_tokens", "likelihoods"]

AUDIO_NAMES = ("audio_features", "audio_index", "insert_at")


def choice_tokens(processor: Any, question: Question, ends: frozenset[int]) -> tuple[list[list[int]], int]:
    """Return the tokens of each choice as an answer, up to the first of ``ends``, and how many tokens at the end of the
    question are not among those before them: where a tokenizer joins the last of the question with the first of an
    answer.

    Raises:
        ValueError: the chat template renders a question otherwise once it is answered.
    """
    tokenizer = processor.tokenizer
    asked = processor.apply_chat_template(question.messages, add_generation_prompt=True)
    question_ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    answered = []
    for choice in question.sample.choices:
        conversation = [*question.messages, {"role": "assistant", "content": choice}]
        answered.append(tokenizer(processor.apply_chat_template(conversation), add_special_tokens=False)["input_ids"])
    shared = min(_shared(question_ids, ids) for ids in answered)
    audio = processor.audio_token_id
    if audio in question_ids[shared:]:
        raise ValueError("chat_template must render a question's clips alike before and after its answer, got others")
    tokens = []
    for ids in answered:
        said = ids[shared:]
        end = next((place for place, token in enumerate(said) if token in ends), len(said) - 1)
        tokens.append(said[: end + 1])
    if not all(tokens):
        raise ValueError("chat_template must render what the assistant says, got a choice without a token")
    return tokens, len(question_ids) - shared


@torch.no_grad()
def likelihoods(
    model: Any, inputs: Mapping[str, Any], tokens: Sequence[Sequence[Sequence[int]]], surplus: Sequence[int]
) -> list[list[float]]:
    """Return the logarithm of the probability of each question's choices.

    Args:
        model: the audio LLM.
        inputs: B questions, padded on the left, and their audio, encoded.
        tokens: of each question, the tokens of its choices.
        surplus: how many tokens each question is shorter than in ``inputs``.
    """
    ids, mask = _shortened(inputs["input_ids"], inputs["attention_mask"], surplus)
    audio = {name: inputs[name] for name in AUDIO_NAMES if name in inputs}
    outputs = model(
        input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=True, logits_to_keep=1, **audio
    )
    first, cache = _log_probabilities(outputs.logits[:, -1]), cache_after(None, outputs)
    rows = [(question, number) for question, choices in enumerate(tokens) for number in range(len(choices))]
    rows.sort(key=lambda row: len(tokens[row[0]][row[1]]))  # alike in length, for little padding
    found = [[0.0] * len(choices) for choices in tokens]
    for begin in range(0, len(rows), len(ids)):  # as many at once as there are questions, which have had room
        part = rows[begin : begin + len(ids)]
        of_rows = [list(tokens[question][number]) for question, number in part]
        questions = torch.tensor([question for question, _ in part], device=ids.device)
        sums = first[questions, torch.tensor([said[0] for said in of_rows], device=ids.device)]
        if max(map(len, of_rows)) > 1:
            sums = sums + _continued(model, cache, mask, questions, of_rows)
        for (question, number), total in zip(part, sums.tolist(), strict=True):
            found[question][number] = total
    return found


def _continued(model: Any, cache: Any, mask: Tensor, questions: Tensor, of_rows: list[list[int]]) -> Tensor:
    """Return the sum (R,) over each row's tokens but the first, where row r goes on with question ``questions[r]``."""
    longest = max(map(len, of_rows)) - 1
    given = torch.zeros(len(of_rows), longest, dtype=torch.long)
    wanted, counts = given.clone(), torch.tensor([len(said) - 1 for said in of_rows])
    for row, said in enumerate(of_rows):
        given[row, : len(said) - 1] = torch.tensor(said[:-1])
        wanted[row, : len(said) - 1] = torch.tensor(said[1:])
    is_token = (torch.arange(longest) < counts.unsqueeze(1)).to(mask.device)
    given, wanted, before = given.to(mask.device), wanted.to(mask.device), mask[questions]
    going_on = copy.deepcopy(cache)  # which other rows need as it is
    going_on.batch_select_indices(questions)
    whole = torch.cat([before, is_token.to(before.dtype)], dim=1)
    outputs = model(
        input_ids=given,
        attention_mask=whole,
        position_ids=_positions(whole)[:, -longest:],
        use_cache=True,
        **{CACHE_KEYWORDS[0]: going_on},
    )
    found = _log_probabilities(outputs.logits).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(~is_token, 0).sum(dim=1)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Return log-probabilities, in float32 at least: a bfloat16 has three digits."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _shortened(ids: Tensor, mask: Tensor, surplus: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return texts, padded on the left, without the last ``surplus`` tokens of each."""
    if not any(surplus):
        return ids, mask
    ids, mask = ids.clone(), mask.clone()
    for row, count in enumerate(surplus):
        ids[row], mask[row] = ids[row].roll(count), mask[row].roll(count)
        mask[row, :count] = 0
    return ids, mask


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
