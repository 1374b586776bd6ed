"""A scripted stand-in for the service: the page under the service's own policy, and a chat API that plays replies.

A reply is a list of steps, played in order to whoever asks next: `Thoughts`, `Text`, `KeepAlive`, `Gate` (go on when
the test opens it), `Drop` (cut the connection), `Ruin` (send what is no event).
"""

import json
import mimetypes
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "fathom" / "serve" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Thoughts:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class KeepAlive:
    pass


@dataclass(frozen=True)
class Drop:
    pass


@dataclass(frozen=True)
class Ruin:
    pass


class Gate:
    """The reply waits here until `open`; `left` is set when the client has gone instead."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.left = threading.Event()

    def open(self) -> None:
        self.opened.set()

    def wait(self, connection: socket.socket) -> bool:
        """Whether the client is still there when the gate opens."""
        while not self.opened.wait(0.01):
            readable, _, _ = select.select([connection], [], [], 0)
            if readable and not connection.recv(1, socket.MSG_PEEK):
                self.left.set()
                return False
        return True


Step = Thoughts | Text | KeepAlive | Drop | Ruin | Gate


@dataclass
class Script:
    """What the server answers, and what it was asked."""

    reply: Sequence[Step] = (Text("ok"),)
    refusals: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    """Status, headers and message of the next answers, before any reply is played."""
    thinking: bool = True
    models: tuple[str, ...] = ("scripted",)
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the chat requests."""


@contextmanager
def serve_page() -> Iterator[tuple[str, Script]]:
    """The page's address and the script to change while it runs."""
    script = Script()

    class Handler(_Handler):
        pass

    Handler.script = script  # a class of its own for each server, since handlers are made per request
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    script: Script

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/v1/models":
            if self._refuse_wrong_key():
                return
            about = {"object": "model", "thinking": self.script.thinking, "context": 4096}
            models = [{"id": name, **about} for name in self.script.models]
            self._send(200, json.dumps({"object": "list", "data": models}).encode(), "application/json")
            return
        file = PAGE / (path.lstrip("/") or "index.html")
        if not file.resolve().is_relative_to(PAGE) or not file.is_file():
            self._send(404, b"", "text/plain")
            return
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        self._send(200, file.read_bytes(), kind)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refuse_wrong_key():
            return
        self.script.asked.append(body)
        if self.script.refusals:
            status, headers, message = self.script.refusals.pop(0)
            self._send(status, json.dumps({"error": {"message": message}}).encode(), "application/json", headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        # The browser may leave before the end, which is what some tests make it do.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._play(self.script.reply)

    def _play(self, reply: Sequence[Step]) -> None:
        counts = {"content": 0, "reasoning_content": 0}
        for step in reply:
            match step:
                case Thoughts(text) | Text(text):
                    name = "reasoning_content" if isinstance(step, Thoughts) else "content"
                    counts[name] += 1
                    self._event({"choices": [{"index": 0, "delta": {name: text}, "finish_reason": None}]})
                case KeepAlive():
                    self._write(": keep-alive\n\n")
                case Ruin():
                    self._write("data: {no json\n\n")
                case Drop():
                    return
                case Gate():
                    if not step.wait(self.connection):
                        return
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        completion = sum(counts.values())
        usage = {
            "prompt_tokens": 12,
            "completion_tokens": completion,
            "total_tokens": 12 + completion,
            "prompt_cache_hit_tokens": 8,
            "completion_tokens_details": {"reasoning_tokens": counts["reasoning_content"]},
        }
        self._event({"choices": [], "usage": usage})
        self._write("data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self._write(f"data: {json.dumps(event)}\n\n")

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def _refuse_wrong_key(self) -> bool:
        if self.script.key is None or self.headers.get("Authorization") == f"Bearer {self.script.key}":
            return False
        self._send(401, b'{"error": {"message": "missing key"}}', "application/json")
        return True

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
