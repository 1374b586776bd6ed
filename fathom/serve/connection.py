"""One client's connection: what uvicorn leaves open of it is bounded here, and refused in the service's own words.

Between requests, and while a client does not take what is written to it, a clock runs: headers that never end, bodies
that go on after their answer, answers that nobody reads. What makes no progress until it has run out is cut off. While
a request is read or answered, the service's own bounds hold (`ServiceSettings.body_seconds`, the engine's lengths).
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fathom.serve.errors import ApiError
from fathom.serve.settings import ServiceSettings


class Connection(H11Protocol):
    """A protocol for uvicorn, in front of an application that `create_app` made."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._settings: ServiceSettings = self.config.app.state.service.settings  # type: ignore[union-attr]
        self._clock: asyncio.TimerHandle | None = None
        self._unread = 0
        """Bytes that the client had not taken when the clock was last looked at."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio; more connections than may be are told so."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self._settings.max_connections:
            headers = {"Retry-After": str(self._settings.retry_after_seconds)}
            message = f"{self._settings.max_connections} connections are open already; try again later"
            self._refuse(ApiError(503, message, code="overloaded", headers=headers))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """See asyncio: the client takes less than is written."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """See asyncio."""
        super().resume_writing()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(ApiError(400, "this is no HTTP request that can be read", code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Tell the client, unless it is being told something already, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = {
                "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
                **error.headers,
            }  # fmt: skip
            lines = [f"HTTP/1.1 {error.status} ", *(f"{name}: {value}" for name, value in headers.items())]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def _watch(self) -> None:
        """Let the clock run if it is the client who has something to do."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not self.flow.write_paused:
            self._stop_clock()
        elif self._clock is None:
            self._start_clock()

    def _start_clock(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._clock = self.loop.call_later(self._settings.body_seconds, self._time_out)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _time_out(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread:  # it reads, if slowly
            self._start_clock()
        else:
            self.transport.abort()
