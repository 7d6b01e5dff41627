"""Files of samples and the clips that they name."""

import json

import numpy as np
import soundfile

from palkernels.model import PalProcessor
from palkernels.model.data.sample import Sample
from palkernels.model.data.states import EncodedStates
from support.audio_llm import TOKENIZER, build_pal, entry, processor_of

# Marks what the assistant says, and ends it.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% endif %}"
)


def write_clip(path, seconds=0.1, hertz=440.0, rate=16_000):
    """A WAV file of a tone, of which every frequency and length gives another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * time), rate)
    return path


def write_damaged(path, seconds=0.1):
    """A FLAC file of a tone that is damaged within, which its header does not tell."""
    whole = write_clip(path.with_suffix(".wav"), seconds)
    soundfile.write(path, *soundfile.read(whole))
    whole.unlink()
    content = bytearray(path.read_bytes())
    content[-600:-500] = bytes(100)
    path.write_bytes(content)
    return path


def write_lines(path, *rows):
    """A file of JSON lines; rows that are bytes or text are written as they are."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def row(clip="a.wav", answer="red", question="<audio>Which word?", **more):
    """A row of ms-swift's form; without a clip of a text alone."""
    asked = {"role": "user", "content": question}
    audios = {} if clip is None else {"audios": clip if isinstance(clip, list) else [str(clip)]}
    return {"messages": [asked, {"role": "assistant", "content": answer}], **audios, **more}


def sample(clips=(), question="Which?", answer="red", source="a.jsonl:1"):
    """A sample that hears clips in front of its question."""
    parts = [{"type": "audio", "audio": str(clip)} for clip in clips]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return Sample((asked, {"role": "assistant", "content": answer}), source)


def said(samples):
    """Each sample's last answer; also a collate function that a spawned worker finds."""
    return [samples[i].messages[-1]["content"] for i in range(len(samples))]


def small_processor(*entries, **settings):
    """A processor with a template of its own."""
    return PalProcessor(TOKENIZER, list(entries) or [entry("whisper")], chat_template=TEMPLATE, **settings)


def model_and_processor(*entries, **settings):
    """A small model and its processor with that template."""
    model = build_pal(*entries, **settings)
    return model, processor_of(model, chat_template=TEMPLATE)


def encode_when_told(folder, connection):
    """Say "ready", wait for a word, encode the clips of a folder and say how many were."""
    model, processor = model_and_processor(entry("whisper"), entry("sslam"))
    samples = [sample([path]) for path in sorted((folder / "clips").iterdir())]
    states = EncodedStates(folder / "states", model.audio_tower, processor)
    connection.send("ready")
    connection.recv()
    connection.send(states.prepare(samples, batch_size=2).encoded)
