"""A small Hugging Face hub on loopback: one repository, with the answers real clients need.

Serves `/api/models/ID/...` listings and `/ID/resolve/...` files over HTTP, and refuses unknown and gated ids
the way the real hub does (status, `X-Error-Code`).
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Its address, and what was asked of it."""

    def __init__(self, repository: str, files: Mapping[str, bytes], gated: str) -> None:
        self.repository = repository
        self.files = dict(files)
        self.gated = gated
        self.downloaded: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, headers, body = hub.answer(self.path)
                if status == 200 and "/resolve/" in self.path:
                    hub.downloaded.append(self.path.rsplit("/", 1)[-1])
                self._send(status, headers, body)

            def do_HEAD(self) -> None:
                status, headers, body = hub.answer(self.path)
                self._send(status, headers, body, with_body=False)

            def _send(self, status: int, headers: Mapping[str, str], body: bytes, *, with_body: bool = True) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Tests are quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a GET."""
        path = path.partition("?")[0]
        if path.startswith(f"/api/models/{self.gated}") or path.startswith(f"/{self.gated}/"):
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b"{}"
        if path.startswith(f"/api/models/{self.repository}/tree/"):
            return 200, {"Content-Type": "application/json"}, json.dumps(self._tree()).encode()
        if path.startswith(f"/api/models/{self.repository}"):
            return 200, {"Content-Type": "application/json"}, json.dumps(self._info()).encode()
        if path.startswith(f"/{self.repository}/resolve/"):
            body = self.files.get(path.rsplit("/", 1)[-1])
            if body is not None:
                return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"

    def _info(self) -> dict[str, object]:
        siblings = [{"rfilename": name} for name in self.files]
        return {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": siblings}

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in self.files.items()
        ]

    @contextmanager
    def serving(self) -> Generator[FakeHub]:
        thread = threading.Thread(target=self._server.serve_forever, name="fake-hub", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
