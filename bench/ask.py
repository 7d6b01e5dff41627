"""The command `ask`: questions about sounds to a saved audio LLM, or to one that a server has."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from palkernels.bench.errors import UserError
from palkernels.bench.served import ServedConversation

__all__ = ["ask"]

PROMPT = "> "


def ask(
    questions: Sequence[str],
    audio: Sequence[Path],
    *,
    directory: Path | None = None,
    url: str | None = None,
    max_new_tokens: int = 64,
    device: str | None = None,
) -> None:
    """Print the answers of a model to questions about sounds, as they come.

    Args:
        questions: What is asked, in turn; none: the lines of the standard input are.
        audio: Files that are heard before the first question, in their order.
        directory: Of a saved model; None: the demo's.
        url: Of a server, whose first model is asked instead.
        max_new_tokens: The longest answer.
        device: "auto", "cpu", "cuda" or "cuda:INDEX"; None: "auto".

    Raises:
        UserError: the directory holds no audio LLM, a package is missing, a file or a question is refused, there is no
            such device or server, or nothing is asked.
    """
    if url is not None:
        for name, value in (("--model", directory), ("--device", device)):
            if value is not None:
                raise UserError(f"--serve must be given without {name}, which is the server's to choose, got {value}")
        answer = _from_server(url, audio, max_new_tokens)
    else:
        from palkernels.bench.asked import conversation_with  # it imports torch, which a server's answers need not

        answer = conversation_with(directory, audio, max_new_tokens, device or "auto")
    asked = 0
    for question in questions or _lines():
        if len(questions) > 1:
            print(f"{PROMPT}{question}")
        answer(question)
        asked += 1
    if not asked:
        raise UserError("a question must be given, as an argument or as a line of the standard input, got none")


def _from_server(url: str, audio: Sequence[Path], max_new_tokens: int) -> Callable[[str], None]:
    conversation = ServedConversation(url, audio)

    def answer(question: str) -> None:
        for piece in conversation.ask(question, max_new_tokens):
            print(piece, end="", flush=True)
        print()

    return answer


def _lines() -> Iterator[str]:
    """Yield the questions that the standard input has, a line each; on a terminal each is asked for."""
    prompt = PROMPT if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        if line:
            yield line
