"""Questions in batches, asked of a model: what it answers, and which of its choices it finds most probable."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palkernels.errors import one_line
from palkernels.model.audio.limits import AudioError
from palkernels.model.data import Dropped
from palkernels.model.data.reasons import UNREADABLE
from palkernels.model.evaluation.choosing import choice_tokens, likelihoods
from palkernels.model.evaluation.normalisation import normalised
from palkernels.model.evaluation.questions import Question
from palkernels.model.evaluation.scores import Answer

__all__ = ["Asker"]

REFUSED = "refused by the processor"  # what samples are counted under whose clips or messages it does not take


@dataclass(frozen=True)
class Asker:
    """A model that is asked, always in the same way.

    Attributes:
        max_new_tokens: where an answer is cut.
        choices: whether the probabilities of choices are asked for.
        with_states: whether the processor gives encoders' states in place of features.
    """

    model: Any
    processor: Any
    max_new_tokens: int
    choices: bool
    with_states: bool = False

    @torch.no_grad()
    def ask(self, questions: Sequence[Question]) -> tuple[dict[int, Answer], dict[int, Dropped]]:
        """Return the answers to a batch of questions, and what could not be asked, each by the question's number.

        All of them have choices, or none.
        """
        inputs, asked, dropped = self._inputs(questions)
        if inputs is None:
            return {}, dropped
        inputs = self._encoded(dict(inputs.to(self.model.device)))
        chances: list[list[float]] = [[] for _ in asked]
        if self.choices and asked[0].sample.choices:
            pairs = [choice_tokens(self.processor, question, self._ends) for question in asked]
            chances = likelihoods(self.model, inputs, [tokens for tokens, _ in pairs], [left for _, left in pairs])
        answers = {}
        for question, (said, complete), chance in zip(asked, self._generated(inputs), chances, strict=True):
            sample = question.sample
            likely = dict(zip(sample.choices, chance, strict=True)) if chance else {}
            answers[question.number] = Answer(
                source=sample.source,
                task=sample.task,
                question=question.text,
                reference=question.reference,
                answer=said,
                correct=normalised(said) == normalised(question.reference),
                complete=complete,
                likelihoods=likely,
                chosen=max(likely, key=likely.__getitem__, default=None),
            )
        return answers, dropped

    def _inputs(self, questions: Sequence[Question]) -> tuple[Any, list[Question], dict[int, Dropped]]:
        """Return the processor's batch of the questions that it takes, None where there is none, and the others."""
        try:
            return self._processed(questions), list(questions), {}
        except (OSError, ValueError) as error:
            if len(questions) == 1:
                reason = UNREADABLE if isinstance(error, AudioError) else REFUSED
                return None, [], {questions[0].number: Dropped(questions[0].sample.source, reason, one_line(error))}
        taken: list[Question] = []
        dropped: dict[int, Dropped] = {}
        for question in questions:  # one of them or more; which, each says by itself
            _, asked, refused = self._inputs([question])
            taken += asked
            dropped |= refused
        return (self._processed(taken) if taken else None), taken, dropped

    def _processed(self, questions: Sequence[Question]) -> Any:
        conversations = [list(question.messages) for question in questions]
        options = {"padding": True, "padding_side": "left"}
        return self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, processor_kwargs=options
        )

    def _encoded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs with audio that is encoded once, for generation and choices both."""
        if "input_features" not in inputs:
            return inputs
        if self.with_states:
            inputs["encoder_states"] = inputs.pop("input_features")
        names = [name for name in inspect.signature(self.model.get_audio_features).parameters if name in inputs]
        features = self.model.get_audio_features(**{name: inputs.pop(name) for name in names})
        return inputs | {"audio_features": features}

    def _generated(self, inputs: dict[str, Any]) -> list[tuple[str, bool]]:
        """Return each answer, and whether it ended."""
        tokenizer = self.processor.tokenizer
        tokens: Tensor = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = []
        for new in tokens[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(new) if token in self._ends), None)
            answers.append((tokenizer.decode(new[:end], skip_special_tokens=True).strip(), end is not None))
        return answers

    @property
    def _ends(self) -> frozenset[int]:
        """The tokens that end an answer: those that the model generates until, or else the tokenizer's."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.processor.tokenizer.eos_token_id
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
