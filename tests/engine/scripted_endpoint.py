"""An endpoint that answers as a test tells it to: byte by byte, or not at all."""

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socketserver import StreamRequestHandler, ThreadingTCPServer

HANG = object()
"""Say nothing more until the client leaves."""
RESET = object()
"""Break the connection off as a process that dies does."""
VLLM = {"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 512}
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"
CHUNKS_END = b"0\r\n\r\n"
"""Ends a chunked answer; as a script's last step it leaves the connection open for another request."""

Step = bytes | object | Callable[[], None]


def event(*ids: int, finish: str | None = None, **more: object) -> bytes:
    """An event that brings these tokens."""
    choice = {"index": 0, "text": "", "logprobs": None, "token_ids": list(ids), "finish_reason": finish, **more}
    return b"data: " + json.dumps({"id": "cmpl-1", "choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


def usage(cached: int = 0) -> bytes:
    """The event that ends a stream with its cost."""
    return (
        b"data: "
        + json.dumps({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": cached}}}).encode()
        + b"\n\n"
    )


def plain(status: int, body: str = "", *headers: str, kind: str = "application/json") -> bytes:
    """A whole answer that is no stream."""
    head = [
        f"HTTP/1.1 {status} Some Reason",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body.encode())}",
        "Connection: close",
        *headers,
    ]
    return ("\r\n".join(head) + "\r\n\r\n" + body).encode()


@dataclass
class ScriptedEndpoint:
    """Answers the n-th completion that is asked for with the n-th script, and those after the last with the last."""

    scripts: Sequence[Sequence[Step]] = ((STREAM, event(65), event(66, finish="stop"), usage(), DONE),)
    models: bytes = plain(200, json.dumps({"object": "list", "data": [VLLM]}))
    bodies: list[dict] = field(default_factory=list)
    """What was asked for, in turn."""
    authorizations: list[str | None] = field(default_factory=list)
    connections: int = 0
    """How many there have been."""
    url: str = ""

    def answer(self, handler: StreamRequestHandler) -> bool:
        """One request of a connection; whether it stays open."""
        if not (line := handler.rfile.readline()):
            return False
        headers = {}
        while header := handler.rfile.readline().strip():
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        self.authorizations.append(headers.get("authorization"))
        if b"/models" in line:
            handler.wfile.write(self.models)
            return False
        self.bodies.append(json.loads(handler.rfile.read(int(headers["content-length"]))))
        script = self.scripts[min(len(self.bodies), len(self.scripts)) - 1]
        for step in script:
            if step is HANG:
                handler.rfile.read(1)
            elif step is RESET:
                handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif callable(step):
                step()
            else:
                handler.wfile.write(step)
                handler.wfile.flush()
        return bool(script) and script[-1] == CHUNKS_END


@contextmanager
def serving(endpoint: ScriptedEndpoint) -> Iterator[ScriptedEndpoint]:
    """`endpoint` on a port of loopback, one thread a connection."""

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            endpoint.connections += 1
            with suppress(OSError):  # the client has left
                while endpoint.answer(self):
                    pass

    class Server(ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            server.shutdown()
            server.block_on_close = False
            thread.join()
