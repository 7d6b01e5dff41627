"""Samples to ask small audio LLMs, and a processor whose answers end."""

from palkernels.model.data import Sample
from support.audio_llm import processor_of, tone

# As `palkernels init` writes it: a message ends with the tokenizer's end of text.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = ("red", "blue", "a dark green", "re")  # of several lengths, one the beginning of another


def clip(hertz=440.0, seconds=0.1):
    return {"array": tone(hertz, seconds), "sampling_rate": 16_000}


def processor_with_ends(model):
    return processor_of(model, chat_template=TEMPLATE)


def sample(question="Which word?", answer="red", clips=None, number=0, **settings):
    """A sample of one turn, about clips that stand before the question; by default about one."""
    parts = [{"type": "audio", "audio": clip} for clip in ([clip()] if clips is None else clips)]
    messages = (
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    )
    return Sample(messages, f"made:{number}", **settings)


def several():
    """Samples of several lengths, with one clip, two, or none, and with choices or without."""
    return [
        sample("Which word?", "red", number=0, task="words", choices=WORDS),
        sample("Say it.", "a b c d e f", [clip(300, 0.04)], number=1, task="transcribe"),
        sample("Which of them is the first?", "blue", [clip(), clip(700, 0.07)], number=2, task="words", choices=WORDS),
        sample("What is this?", "a bell", [clip(200, 0.09)], number=3, task="names"),
        sample("No sound, which word?", "re", [], number=4, task="words", choices=WORDS),
        sample("What?", "a car", number=5, task="names"),
        sample("Which?", "a dark green", [clip(500, 0.2)], number=6, task="words", choices=WORDS),
    ]
