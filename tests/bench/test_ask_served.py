"""`palkernels ask --serve`: what it asks of a server that speaks OpenAI's protocol, here one that stands in for it."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.sounds import sine, write

from palkernels.bench.cli import main

pytest.importorskip("openai", reason="needs palkernels[client]")


class Stand(BaseHTTPRequestHandler):
    """Lists a model and answers with the number of messages, in two pieces; "bad" is refused."""

    def do_GET(self):
        if self.server.odd is not None:
            self.send_json(200, self.server.odd)
            return
        self.send_json(200, {"object": "list", "data": [{"id": "the-model", "object": "model"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        if "bad" in str(request["messages"][-1]["content"]):
            self.send_json(400, {"error": {"message": "clips must be shorter,\ngot more", "type": "BadRequestError"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in ("heard ", str(len(request["messages"]))):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def send_json(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Stand) as stand:
        stand.requests, stand.odd = [], None
        stand.url = f"http://127.0.0.1:{stand.server_address[1]}"
        threading.Thread(target=stand.serve_forever, daemon=True).start()
        yield stand
        stand.shutdown()


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_a_conversation(server, tmp_path, capsys):
    """Each request brings all of it, the clip as the file is."""
    clip = write(tmp_path / "a.flac", sine(), format="FLAC")
    for url in (server.url, f"{server.url}/v1/"):
        del server.requests[:]
        asked = "ask", "--serve", url, "--audio", clip, "--max-new-tokens", 8, "What?", "Why?"
        assert run(*asked) == 0
        assert capsys.readouterr().out == "> What?\nheard 1\n> Why?\nheard 3\n"
        first, second = server.requests
        assert (first["model"], first["stream"], first["temperature"]) == ("the-model", True, 0)
        assert first["max_completion_tokens"] == 8
        ((sound, text),) = [message["content"] for message in first["messages"]]
        assert sound["type"] == "input_audio"
        assert sound["input_audio"]["format"] == "flac"
        assert base64.b64decode(sound["input_audio"]["data"]) == clip.read_bytes()
        assert text == {"type": "text", "text": "What?"}
        assert second["messages"][:2] == [first["messages"][0], {"role": "assistant", "content": "heard 1"}]
        assert second["messages"][2]["content"] == [{"type": "text", "text": "Why?"}]


def test_refused(server, tmp_path, capsys):
    clip = write(tmp_path / "a.wav", sine())
    for arguments, message in (
        (["--serve", server.url, "--audio", clip, "bad"], "the server refused: clips must be shorter, got more"),
        (["--serve", "http://127.0.0.1:9", "--audio", clip, "What?"], "--serve must be a server that lists a model"),
        (["--serve", "nonsense", "--audio", clip, "What?"], "--serve must begin with http://"),
        (["--serve", server.url, "--audio", Path("none.wav"), "What?"], "must be readable"),
        (["--serve", server.url, "--model", tmp_path, "What?"], "--serve must be given without --model"),
        (["--serve", server.url, "--device", "cpu", "What?"], "--serve must be given without --device"),
    ):
        assert run("ask", *arguments) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert said.startswith("error: ")
        assert message in said


@pytest.mark.parametrize("odd", [[], {"data": []}, {"data": None}, "a page", {}], ids=str)
def test_what_is_no_such_server(server, tmp_path, capsys, odd):
    server.odd = odd
    assert run("ask", "--serve", server.url, "--audio", write(tmp_path / "a.wav", sine()), "What?") == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"error: --serve must be a server that lists a model, got {server.url}/v1: ")


def test_no_url(tmp_path, capsys):
    assert run("ask", "--serve", "http://[::1", "--audio", write(tmp_path / "a.wav", sine()), "What?") == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "--serve must be a server that lists a model" in said
