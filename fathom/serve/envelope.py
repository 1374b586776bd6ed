"""Around every answer: security headers, an identifier, a count by code, and a line of the request log."""

import logging
import re
import secrets
import time
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fathom.serve.metrics import Metrics
from fathom.serve.settings import ServiceSettings

REQUEST_LOG = "fathom.serve.requests"
"""Name of the logger of requests; it speaks at level INFO, and never of texts, queries or keys."""
TOKENS = "fathom.tokens"
"""Key of an ASGI scope under which whoever answers leaves (prompt tokens, completion tokens)."""

_LOG = logging.getLogger(REQUEST_LOG)
_IDENTIFIER = re.compile(rb"[!-~]{1,128}")
_CLIENT_LEFT = 499  # nginx's code for a client that did not wait for its answer
_METHODS = ("GET", "POST", "HEAD", "OPTIONS")
# Model output is shown on the page: whatever slipped through its sanitiser finds nothing that it may do.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Envelope:
    """Middleware that sees every request, refused ones and preflights too."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        reach = b"cross-origin" if settings.allow_origins else b"same-origin"
        self._headers = [
            (b"content-security-policy", _POLICY.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cross-origin-resource-policy", reach),
            (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, code = time.monotonic(), _CLIENT_LEFT
        identifier = _identifier(scope)

        async def send_on(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                headers = [*message.get("headers", []), *self._headers, (b"x-request-id", identifier)]
                if all(name.lower() != b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-cache"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.answered(method, getattr(scope.get("route"), "path", "other"), code)
            _LOG.info("%s", _line(scope, method, code, time.monotonic() - began, identifier))


def _identifier(scope: Scope) -> bytes:
    """The client's own, if it is one word of at most 128 ASCII characters; else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given if _IDENTIFIER.fullmatch(given) else secrets.token_hex(16).encode()


def _line(scope: Scope, method: str, code: int, seconds: float, identifier: bytes) -> str:
    # Quoted, for a path can hold line ends, and with them lines that look like ours.
    words = [method, quote(scope["path"])[:200], str(code), f"{seconds * 1000:.0f} ms"]
    if TOKENS in scope:
        prompt, completion = scope[TOKENS]
        words.append(f"prompt {prompt} completion {completion}")
    return " ".join([*words, f"id {identifier.decode()}"])
