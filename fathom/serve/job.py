"""The bridge from the engine's thread to the event loop: requests in, their chunks as one asynchronous stream."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from fathom.engine.protocol import Chunk, Engine, QueueFull, Request, Ticket
from fathom.errors import UserError
from fathom.serve.errors import ApiError, refused


class Job:
    """Requests that are answered together. Whoever starts one must close it, however it ends."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.created_at = time.monotonic()
        self.last_token_at: list[float | None] = [None] * len(requests)
        """When each request's last token came."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._arrived: list[tuple[int, Chunk]] = []
        self._awaited: asyncio.Future[None] | None = None
        self._tickets: list[Ticket] = []
        self._closed = False

    async def start(self, *, retry_after: int) -> None:
        """Hand the requests to the engine. Raises `ApiError`: 503 when its queue is full, 422 for what it refuses.

        Compiling a client's grammar can take long, so constrained requests are handed over in a thread.
        """
        try:
            if any(request.constraint for request in self.requests):
                await asyncio.to_thread(self._submit)
            else:
                self._submit()
        except QueueFull as error:
            self.close()
            headers = {"Retry-After": str(retry_after)}
            raise ApiError(503, str(error), code="overloaded", headers=headers) from None
        except UserError as error:
            self.close()
            raise refused(error) from None
        except BaseException:
            self.close()
            raise

    async def chunks(self, *, idle_seconds: float) -> AsyncIterator[tuple[int, Chunk] | None]:
        """(request's place, chunk) until every request has ended; None whenever nothing came for a while.

        Raises `ApiError` when the engine fails one: 422 where that is the request's fault, else 500.
        """
        running = len(self.requests)
        while running:
            await self._something(idle_seconds)
            if not self._arrived:
                yield None
            arrived, self._arrived = self._arrived, []
            for place, chunk in arrived:
                if chunk.finish_reason == "error" and chunk.fault == "request":
                    raise refused(UserError(chunk.message))
                if chunk.finish_reason == "error":
                    raise ApiError(500, f"the engine failed: {chunk.message or 'its log has the details'}")
                running -= chunk.finish_reason is not None
                yield place, chunk

    def close(self) -> None:
        """Cancel what still runs."""
        self._closed = True
        for ticket in self._tickets:
            ticket.cancel()

    def _submit(self) -> None:
        for place, request in enumerate(self.requests):
            if self._closed:
                break
            self._tickets.append(self._engine.submit(request, self._receiver(place)))
        if self._closed:  # by a client that left while this thread was at work
            self.close()

    async def _something(self, seconds: float) -> None:
        """Return when chunks are there, or after so long."""
        if self._arrived:
            return
        # Not a queue, whose `get` with a timeout would cost a task for each token.
        self._awaited = self._loop.create_future()
        timer = self._loop.call_later(seconds, self._wake)
        try:
            await self._awaited
        finally:
            timer.cancel()

    def _take(self, place: int, chunk: Chunk) -> None:
        self._arrived.append((place, chunk))
        self._wake()

    def _wake(self) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    def _receiver(self, place: int) -> Callable[[Chunk], None]:
        def deliver(chunk: Chunk) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everyone who could listen
                self._loop.call_soon_threadsafe(self._take, place, chunk)

        return deliver
