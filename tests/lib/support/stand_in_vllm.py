"""A package that poses as vLLM: a server with the paths that the client asks, which answers at once."""

from pathlib import Path

SERVER = """
import argparse, json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("--model", "--served-model-name", "--host", "--dtype", "--behave", "--max-model-len"):
    parser.add_argument(name, default="")
parser.add_argument("--port", type=int)
options = parser.parse_args()
folder = Path(options.model)
(folder / "pid").write_text(str(os.getpid()))
(folder / "arguments").write_text(json.dumps(sys.argv[1:]))
if options.behave == "not-start":
    sys.exit("ValueError: weights must be there, got none")
asked, lock = [], threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        counts = f'vllm:prefix_cache_hits_total{{engine="0"}} {25 * len(asked)}.0\\n'
        counts += f'vllm:prefix_cache_queries_total{{engine="0"}} {100 * len(asked)}.0\\n'
        pages = {"/metrics": counts, "/version": '{"version": "0.32.9"}'}
        pages["/v1/models"] = '{"data": [{"id": "the model"}]}' if self.has_key() else "{}"
        self.answer(200, pages.get(self.path, ""))

    def has_key(self):
        return options.behave != "ask-for-key" or self.headers["Authorization"] == "Bearer the key"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            asked.append(request)
            (folder / "asked").write_text(json.dumps(asked))
        if options.behave == "refuse" or not self.has_key():
            return self.answer(400, json.dumps({"error": {"message": "clips must be shorter", "code": 400}}))
        if options.behave == "die" and len(asked) > 5:
            print("MemoryError: no more", flush=True)
            os._exit(9)
        tokens = request["max_completion_tokens"] - (options.behave == "stop-early")
        pieces = [[0], list(range(1, tokens))]  # the first token, then all others at once
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for ids in pieces:
            self.send([{"index": 0, "delta": {"content": ""}, "finish_reason": None, "token_ids": ids}])
        self.send([], {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens})
        self.wfile.write(b"data: [DONE]\\n\\n")

    def send(self, choices, usage=None):
        piece = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "model", "choices": choices}
        self.wfile.write(f"data: {json.dumps({**piece, 'usage': usage})}\\n\\n".encode())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
"""


def install(folder: Path) -> Path:
    """Write the package to a folder, which is to stand on the path, and return the folder."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for each in (package, package.parent, package.parent.parent):
        (each / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER)
    return folder
