"""Running the service: a socket, a process that drains before it ends, and the command's settings."""

import asyncio
import ipaddress
import logging
import os
import re
import resource
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from fathom.engine.protocol import Sampling
from fathom.errors import UserError
from fathom.serve.connection import Connection
from fathom.serve.envelope import REQUEST_LOG
from fathom.serve.handlers import host_of
from fathom.serve.settings import ServiceSettings

if TYPE_CHECKING:  # the address is taken before torch, which the service needs, is waited for
    from fathom.serve.service import Service

KEYS_VARIABLE = "FATHOM_API_KEYS"
"""Environment variable with API keys, separated by white space: unlike arguments, `ps` does not show it."""
_AFTER_CANCEL_SECONDS = 5
_OWN_FILES = 256
_KEY = re.compile(r"[!-~]+")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]+)?")


class Server(uvicorn.Server):
    """A uvicorn server that, told to end, refuses new requests and lets running ones finish first."""

    def __init__(self, app: FastAPI) -> None:
        # What is still open after the drain are idle connections, which need no further patience.
        config = uvicorn.Config(
            app, http=Connection, log_level="warning", timeout_graceful_shutdown=1, server_header=False, ws="none"
        )
        super().__init__(config)
        self._service: Service = app.state.service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; returns when the drain is over."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends at once."""
        if self._service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._drain_then_exit())

    async def _drain_then_exit(self) -> None:
        if answers := self._service.running:
            print(f"fathom: finishing {answers} answers; a second signal ends at once", file=sys.stderr)
        if not await self._idle(self._service.settings.drain_seconds):
            self._service.cut_short()
            await self._idle(_AFTER_CANCEL_SECONDS)
        self.should_exit = True

    async def _idle(self, seconds: float) -> bool:
        """Whether no answer is left, waiting for that so long at most."""
        end = asyncio.get_running_loop().time() + seconds
        while self._service.running and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        return not self._service.running


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve `app` on `listener` until SIGINT or SIGTERM, then drain."""
    logging.getLogger("fathom.serve").addHandler(logging.StreamHandler())
    if app.state.service.settings.log_requests:
        logging.getLogger(REQUEST_LOG).setLevel(logging.INFO)
    _allow_connections(app.state.service.settings.max_connections)
    Server(app).run(sockets=[listener])


def _allow_connections(most: int) -> None:
    """Let the process hold so many beside its own files, as far as the machine permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + _OWN_FILES if hard == resource.RLIM_INFINITY else min(most + _OWN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `UserError` when the address is not ours to take."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None
    return listener


def announcement(listener: socket.socket, settings: ServiceSettings) -> list[str]:
    """What to say on starting: where the service is, what it calls its model, and who can reach it."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    lines = [f"model name for requests: {', '.join(settings.names)}"]
    if settings.sampling != Sampling():
        drawn = settings.sampling
        lines.append(f"requests that do not say: temperature {drawn.temperature:g}, top_p {drawn.top_p:g}")
    lines.append(f"serving at http://{shown}:{port} (page), http://{shown}:{port}/v1 (API)")
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        lines.append(f"listening on {host}: other machines can reach this service")
        if not settings.api_keys:
            lines.append("warning: there is no API key, so everyone who reaches it may use it; give --api-key-file")
    return lines


def served_hosts(listener: socket.socket, host: str, origins: Sequence[str]) -> tuple[str, ...]:
    """What requests to `listener` may name as their host; none is anything.

    A web page anywhere can give its own name the address 127.0.0.1, and is then, to its visitor's browser, of the same
    origin as a service on loopback (DNS rebinding). Its name is what tells it apart. Other addresses have names that
    nobody here knows. Behind a proxy, the hosts of `origins` are names of the service too.
    """
    if not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback or "*" in origins:
        return ()
    own = f"[{host}]" if ":" in host else host
    return (*_LOOPBACK, own.lower(), *(host_of(origin.partition("://")[2]) for origin in origins))


def read_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """API keys of arguments, a file (one a line; lines that begin with `#` are comments) and the environment.

    Raises `UserError`.
    """
    keys = [*given, *os.environ.get(KEYS_VARIABLE, "").split()]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            lines = [line for line in lines if line and not line.startswith("#")]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UserError(f"--api-key-file {file}: cannot be read ({reason})") from None
        if not lines:
            raise UserError(f"--api-key-file {file}: holds no key; write one a line")
        keys += lines
    if any(not _KEY.fullmatch(key) for key in keys):
        raise UserError("--api-key: a key is empty, has white space in it or is not ASCII; use letters and digits")
    return tuple(dict.fromkeys(keys))


def check_origins(given: Sequence[str]) -> tuple[str, ...]:
    """Origins as browsers send them. Raises `UserError` for one that no browser would ever send."""
    for origin in given:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise UserError(f"--allow-origin {origin}: is no origin; give https://host or http://host:port, or '*'")
    return tuple(given)
