"""A conversation of `ask` with a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import TextStreamer

from palkernels.bench.demo import demo_model
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.options import parse_device
from palkernels.bench.saved import load_saved
from palkernels.bench.untrained import untrained_warning
from palkernels.model import AudioError, Conversation

__all__ = ["conversation_with"]


def conversation_with(
    directory: Path | None, audio: Sequence[Path], max_new_tokens: int, device: str
) -> Callable[[str], None]:
    """Return what prints the answer to a question, and remembers both.

    Args:
        directory: Of a saved model; None: the demo's.
        audio: Files that are heard before the first question, in their order.
        max_new_tokens: The longest answer.
        device: "auto", "cpu", "cuda" or "cuda:INDEX".

    Raises:
        UserError: there is no such model or device; and, when asked, a file or a question is refused.
    """
    target = parse_device(device)
    model, processor = demo_model(target) if directory is None else load_saved(directory, target)
    conversation = Conversation(model, processor, [str(path) for path in audio])
    warning = None if directory is None else untrained_warning(directory)

    def answer(question: str) -> None:
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        if not conversation.messages and warning is not None:
            print(warning)
        try:
            conversation.ask(question, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False)
        except (AudioError, ValueError) as error:
            raise UserError(one_line(error)) from error

    return answer
