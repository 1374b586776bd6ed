"""Answers that take their time: signs of life, clients that leave, a server that ends."""

import asyncio
import json
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from fathom.data import Tokenizer
from fathom.serve.app import create_app
from fathom.serve.settings import ServiceSettings
from tests.serve.fake_engine import STALL, FakeEngine

PATH = "/v1/chat/completions"
Serve = Callable[..., TestClient]


class Visit:
    """One request, message by message, so that a test decides when the client leaves."""

    def __init__(self, app, body: dict) -> None:
        self.sent: list[dict] = []
        self.more = asyncio.Event()
        self._left = asyncio.Event()
        self._body = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers, "query_string": b""}
        scope |= {"http_version": "1.1", "scheme": "http"}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    def leave(self) -> None:
        """Close the connection."""
        self._left.set()

    async def text(self, wanted: str) -> str:
        """What has been sent, once it holds `wanted`."""
        async with asyncio.timeout(10):
            while wanted not in (sent := b"".join(part.get("body", b"") for part in self.sent).decode()):
                await self.more.wait()
                self.more.clear()
        return sent

    async def _receive(self) -> dict:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        self.sent.append(message)
        self.more.set()


def app_of(engine: FakeEngine, tokenizer: Tokenizer, **settings):
    return create_app(engine, tokenizer, ServiceSettings(names=("m",), **settings))


@pytest.mark.parametrize("stream", [True, False])
def test_waiting_clients_hear_from_us(tokenizer: Tokenizer, ask: dict, stream: bool) -> None:
    """Streams get comments and plain answers blank lines, which a JSON parser skips."""
    engine = FakeEngine([[STALL, "done"]])

    async def visit() -> str:
        client = Visit(app_of(engine, tokenizer, keep_alive_seconds=0.01), ask | {"stream": stream})
        await client.text(": keep-alive\n\n: keep-alive\n\n" if stream else "\n\n")
        engine.go_on.set()
        await client.task
        return await client.text("")

    text = asyncio.run(visit())
    if stream:
        assert text.startswith(": keep-alive\n\n")
        assert text.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(text)["choices"][0]["message"]["content"] == "done"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_computed_for(tokenizer: Tokenizer, ask: dict, stream: bool) -> None:
    """A closed connection cancels every request of the job at once, and gives its place back."""
    engine = FakeEngine([["first", STALL]])

    async def visit() -> int:
        app = app_of(engine, tokenizer, concurrent_requests=1)
        client = Visit(app, ask | {"stream": stream, "n": 3})
        await asyncio.to_thread(engine.stalled.wait, 10)
        assert app.state.service.running == 1
        client.leave()
        await client.task
        assert app.state.service.running == 0
        again = Visit(app, ask)  # its key may ask again
        await asyncio.to_thread(engine.stalled.wait, 10)
        again.leave()
        await again.task
        return len(engine.tickets)

    assert asyncio.run(visit()) == 4
    assert all(ticket.cancelled.is_set() for ticket in engine.tickets)


def test_who_leaves_is_no_failure_of_ours(tokenizer: Tokenizer, ask: dict) -> None:
    """A request whose client did not wait for the status is counted as such, not among the 500s."""
    engine = FakeEngine([[STALL]])

    async def visit() -> str:
        app = app_of(engine, tokenizer)
        client = Visit(app, ask)
        await asyncio.to_thread(engine.stalled.wait, 10)
        client.leave()
        await client.task
        return app.state.service.metrics.text().decode()

    assert 'code="499"' in (counted := asyncio.run(visit()))
    assert 'code="500"' not in counted


def test_a_failure_after_the_first_sign_of_life(tokenizer: Tokenizer, ask: dict) -> None:
    """The status has gone out by then; the error object comes in the body, which is still JSON."""
    engine = FakeEngine([[STALL, RuntimeError("x")]])

    async def visit() -> str:
        client = Visit(app_of(engine, tokenizer, keep_alive_seconds=0.01), ask)
        await client.text("\n")
        engine.go_on.set()
        await client.task
        return await client.text("")

    assert json.loads(asyncio.run(visit()))["error"]["type"] == "server_error"


def test_answers_cut_short_say_so(tokenizer: Tokenizer, ask: dict) -> None:
    """When the server ends them, what there is comes with DeepSeek's finish reason."""
    engine = FakeEngine([["half", STALL]])

    async def visit() -> dict:
        app = app_of(engine, tokenizer)
        client = Visit(app, ask)
        await asyncio.to_thread(engine.stalled.wait, 10)
        app.state.service.cut_short()
        await client.task
        return json.loads(await client.text("}"))

    choice = asyncio.run(visit())["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("insufficient_system_resource", "half")


def test_a_draining_service_takes_nothing_new(serve: Serve, ask: dict) -> None:
    """Health says so, and new requests are a 503 that says when to come back."""
    client = serve(FakeEngine())
    client.app.state.service.draining = True
    health = client.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "draining"})
    answer = client.post(PATH, json=ask)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in answer.headers


def test_the_engine_is_closed_with_the_application(tokenizer: Tokenizer) -> None:
    """No thread of the engine outlives the service."""
    engine = FakeEngine()
    with TestClient(app_of(engine, tokenizer)):
        assert not engine.closed
    assert engine.closed


def test_every_answer_carries_the_headers(serve: Serve, ask: dict) -> None:
    """Page, API and errors alike forbid inline script, framing, guessing of types and referrers."""
    client = serve(FakeEngine())
    for answer in (client.get("/"), client.get("/nope"), client.post(PATH, json=ask), client.get("/js/app.js")):
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_metrics_count(serve: Serve, ask: dict) -> None:
    """Requests by code, the engine's levels, and both histograms; a made-up path is no label."""
    client = serve(FakeEngine())
    client.post(PATH, json=ask)
    client.post(PATH, json=ask | {"n": 0})
    client.get("/made-up")
    text = client.get("/metrics").text
    for line in (
        f'fathom_requests_total{{code="200",method="POST",path="{PATH}"}} 1.0',
        f'fathom_requests_total{{code="422",method="POST",path="{PATH}"}} 1.0',
        'fathom_requests_total{code="404",method="GET",path="other"} 1.0',
        "fathom_running_requests 2.0",
        "fathom_waiting_requests 3.0",
        "fathom_cache_blocks_used 4.0",
        "fathom_drafted_tokens_total 8.0",
        "fathom_accepted_tokens_total 6.0",
        "fathom_time_to_first_token_seconds_count 1.0",
        "fathom_inter_token_seconds_count 1.0",
    ):
        assert line in text.splitlines()
    assert "made-up" not in text
