"""Serve an audio LLM with vLLM, ask it over HTTP with OpenAI's client, two questions about one sound, and stop it.
Needs palkernels[vllm,audio,bench,client]. The weights are random: take a trained model's directory instead."""

import base64
import io
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

RATE = 16_000  # Hz


@contextmanager
def served(directory: str) -> Iterator[str]:
    """The address of a server for a saved model, while it runs. `vllm serve DIRECTORY` starts the same one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory, "--served-model-name"]
    command += ["sounds", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--max-model-len", "1024"]
    server = subprocess.Popen([*command, "--enforce-eager", "--dtype", "float32"], stdout=sys.stderr)
    try:
        while not is_ready(address):
            if server.poll() is not None:
                raise RuntimeError("the server must start, got an error: see above")
            time.sleep(1)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:  # it waits for whoever asks
            server.kill()
            server.wait()
        print("stopped")


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def tone(hertz: float, seconds: float = 1.0) -> dict[str, Any]:
    """A tone as a request holds it: a WAV file in base64. Any file of a sound will do in its place."""
    samples = [round(8_000 * math.sin(2 * math.pi * hertz * i / RATE)) for i in range(int(seconds * RATE))]
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, RATE, 0, "NONE", ""))
        wav.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB of keys and values, where there is no GPU
    with tempfile.TemporaryDirectory() as directory:
        # `palkernels init` makes a small one; `palkernels train` writes trained ones.
        subprocess.run([sys.executable, "-m", "palkernels.bench.cli", "init", directory], check=True, stdout=sys.stderr)
        with served(directory) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
            sound = tone(440)
            for question in ("What do you hear?", "How high is it?"):  # the second finds the sound's keys and values
                content = [sound, {"type": "text", "text": question}]
                answer = client.chat.completions.create(
                    model="sounds", messages=[{"role": "user", "content": content}], max_tokens=16, temperature=0
                )
                assert answer.usage is not None
                said = json.dumps(answer.choices[0].message.content)
                print(f"{question} {said}: {answer.usage.prompt_tokens} tokens of text and sound in the prompt")


if __name__ == "__main__":
    main()
