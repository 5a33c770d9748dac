"""A small OpenAI-compatible server that has nothing but the API: no /tokenize, no /metrics, no HTTP keep-alive, and 400
for every field that is not OpenAI's. Threads of the standard library, so that nothing is shared with the scripted one.
It remembers what it was sent.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Generator

MODEL = "plain"
#: Of OpenAI's API; a server that is strict refuses the rest.
_FIELDS = frozenset(
    {
        "frequency_penalty", "logprobs", "max_completion_tokens", "max_tokens", "messages", "model", "n",
        "presence_penalty", "prompt", "seed", "stop", "stream", "stream_options", "temperature", "top_p", "user",
    }
)  # fmt: skip
_WORDS = ("blue", "green", "amber", "violet", "grey")
_TOKEN_S = 0.004


@dataclass(frozen=True, slots=True)
class Asked:
    """A generation request that was answered. Times are `time.perf_counter()`."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    arrival_s: float
    end_s: float
    answer: str
    #: The client stayed to the end.
    is_whole: bool


@dataclass
class PlainServer:
    takes_ids: bool
    base_url: str = ""
    asked: list[Asked] = field(default_factory=list[Asked])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, asked: Asked) -> None:
        with self._lock:
            self.asked.append(asked)


@contextmanager
def plain_server(*, takes_ids: bool = False) -> Generator[PlainServer]:
    """In threads of this process. `takes_ids`: prompts of /v1/completions may be token ids."""
    server = PlainServer(takes_ids)

    class Handler(_Handler):
        plain = server

    class Listener(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Clients that go away are no news."""

    listener = Listener(("127.0.0.1", 0), Handler)
    server.base_url = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


class _Handler(BaseHTTPRequestHandler):
    plain: PlainServer
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "nobody"}]})
        else:
            self._json(404, {"error": {"message": "not found"}})

    def do_POST(self) -> None:
        arrival_s = time.perf_counter()
        body = cast("dict[str, Any]", json.loads(self.rfile.read(int(self.headers["content-length"]))))
        problem = self._problem(body)
        if problem is not None:
            self._json(*problem)
            return
        count = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        words = [f" {_WORDS[index % len(_WORDS)]}" for index in range(count)]
        is_whole = self._stream(body, words) if body.get("stream") else self._whole(body, words)
        headers = {name.lower(): value for name, value in self.headers.items()}
        end_s = time.perf_counter()
        self.plain.add(Asked(self.path, body, headers, arrival_s, end_s, "".join(words), is_whole))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class has it
        """Silent."""

    def _problem(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            return 404, {"error": {"message": "not found"}}
        prompt_ids = isinstance(body.get("prompt"), list) and self.plain.takes_ids
        unknown = sorted(set(body) - _FIELDS)
        if unknown:
            return 400, {"error": {"message": f"Unrecognized request argument supplied: {unknown[0]}"}}
        if "chat" not in self.path and not isinstance(body.get("prompt"), str) and not prompt_ids:
            return 400, {"error": {"message": "prompt must be a string"}}
        if body.get("model") != MODEL:
            return 404, {"error": {"message": f"no model {body.get('model')}"}}
        return None

    def _whole(self, body: dict[str, Any], words: list[str]) -> bool:
        time.sleep(_TOKEN_S * len(words))
        choice = {"index": 0, "finish_reason": "length", **self._content("".join(words), "message")}
        self._json(200, {"id": "x", "choices": [choice], "usage": self._usage(body, len(words))})
        return True

    def _stream(self, body: dict[str, Any], words: list[str]) -> bool:
        """False: the client went away."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for index, word in enumerate(words):
                time.sleep(_TOKEN_S)
                reason = "length" if index == len(words) - 1 else None
                choice = {"index": 0, "finish_reason": reason, **self._content(word, "delta")}
                self._event({"id": "x", "choices": [choice], "usage": None})
            if body.get("stream_options") == {"include_usage": True}:
                self._event({"id": "x", "choices": [], "usage": self._usage(body, len(words))})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            return False
        return True

    def _content(self, text: str, name: str) -> dict[str, Any]:
        return {name: {"content": text}} if "chat" in self.path else {"text": text}

    def _usage(self, body: dict[str, Any], num_words: int) -> dict[str, int]:
        if "chat" in self.path:
            prompt_tokens = sum(len(message["content"].split()) for message in body["messages"])
        else:
            prompt_tokens = len(body["prompt"].split() if isinstance(body["prompt"], str) else body["prompt"])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": num_words,
            "total_tokens": prompt_tokens + num_words,
        }

    def _event(self, document: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")

    def _json(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
