"""Sending an answer: as one JSON object or as server-sent events, alive while it waits, stopped when nobody listens."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fathom.serve.envelope import TOKENS
from fathom.serve.errors import ApiError
from fathom.serve.job import Job
from fathom.serve.metrics import Metrics
from fathom.serve.replies import Reply

_LOG = logging.getLogger("fathom.serve")


class Delivery(Response):
    """The answer to a job that has been started. When it ends, in whatever way, the job is closed.

    While nothing comes, a stream sends the comment `: keep-alive` and a plain answer sends blank lines, which readers
    of JSON skip. A failure after that can no longer change the status: it comes as an error object in the body.
    """

    def __init__(
        self,
        job: Job,
        reply: Reply,
        *,
        metrics: Metrics,
        stream: bool,
        include_usage: bool,
        keep_alive_seconds: float,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__()
        self._job, self._reply, self._metrics = job, reply, metrics
        self._stream, self._include_usage = stream, include_usage
        self._keep_alive_seconds = keep_alive_seconds
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves first."""
        answer = asyncio.create_task((self._answer_stream if self._stream else self._answer_whole)(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._job.close()
            self._on_end()
            usage = self._reply.usage_event()["usage"]
            scope[TOKENS] = (usage["prompt_tokens"], usage["completion_tokens"])
            finished = answer.done()
            answer.cancel()
            gone.cancel()
            results = await asyncio.gather(answer, gone, return_exceptions=True)
        if finished and isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _answer_whole(self, send: Send) -> None:
        started = False
        try:
            async for arrived in self._job.chunks(idle_seconds=self._keep_alive_seconds):
                if arrived is not None:
                    self._metrics.arrived(self._job, *arrived)
                    self._reply.feed(*arrived)
                    continue
                if not started:
                    await send(_start(200, "application/json"))
                    started = True
                await send(_part(b"\n"))
            # A vote reads every answer, which can be long, and other clients should not wait for it.
            status, body = 200, await asyncio.to_thread(self._reply.result)
        except Exception as error:
            status, body = _failure(error)
        data = _dump(body).encode()
        if not started:
            await send(_start(status, "application/json", length=len(data)))
        await send(_part(data, more=False))

    async def _answer_stream(self, send: Send) -> None:
        await send(_start(200, "text/event-stream; charset=utf-8"))
        try:
            async for arrived in self._job.chunks(idle_seconds=self._keep_alive_seconds):
                if arrived is None:
                    await send(_part(b": keep-alive\n\n"))
                    continue
                self._metrics.arrived(self._job, *arrived)
                if events := self._reply.feed(*arrived):
                    await send(_part(b"".join(map(_event, events))))
            if self._include_usage:
                await send(_part(_event(self._reply.usage_event())))
        except OSError:  # the client has left, which the caller sees too
            return
        except Exception as error:
            await send(_part(_event(_failure(error)[1])))
        await send(_part(b"data: [DONE]\n\n", more=False))


def _failure(error: Exception) -> tuple[int, dict[str, Any]]:
    if not isinstance(error, ApiError):
        _LOG.error("an answer failed", exc_info=error)
        error = ApiError(500, "the server made a mistake; its log has the details")
    return error.status, error.body()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(status: int, kind: str, *, length: int | None = None) -> dict[str, Any]:
    headers = [(b"content-type", kind.encode()), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}


def _part(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {_dump(value)}\n\n".encode()


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
