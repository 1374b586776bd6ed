"""Endpoints that go on for ever without an answer: bytes one by one, signs of life alone, and no connection at all."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from socketserver import StreamRequestHandler

import pytest

import fathom.engine.endpoint as module
from fathom.engine.protocol import Request
from fathom.engine.remote import RemoteEngine, RemoteSettings
from fathom.errors import UserError
from fathom.evaluate.endpoint import EndpointAnswers
from tests.engine.running import PLAIN, run
from tests.engine.scripted_endpoint import (
    DONE,
    STREAM,
    ScriptedEndpoint,
    event,
    plain,
    serving,
    usage,
)

HELLO = list(b"hello")
WHOLE = [STREAM, event(65), event(66, finish="stop"), usage(), DONE]
STALL = 0.2
PAUSE = threading.Event()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a connection may take beside is nothing on loopback."""
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.3)


def dripping(whole: bytes, begin: int = 0) -> list[bytes | Callable[[], None]]:
    """`whole`, from `begin` on byte by byte, each long before the client would call it silence."""
    pairs = ((bytes([byte]), lambda: PAUSE.wait(STALL / 10) and None) for byte in whole[begin:])
    return [whole[:begin], *(step for pair in pairs for step in pair)]


@dataclass
class Dripping(ScriptedEndpoint):
    """One that lists its models byte by byte."""

    begin: int = 0

    def answer(self, handler: StreamRequestHandler) -> bool:
        """As `ScriptedEndpoint.answer`."""
        while handler.rfile.readline().strip():
            pass
        for step in dripping(self.models, self.begin):
            if callable(step):
                step()
            else:
                handler.wfile.write(step)
        return False


@pytest.mark.parametrize(
    "slow",
    [
        [*dripping(STREAM), *WHOLE[1:]],
        [STREAM, *dripping(event(65) * 3), *WHOLE[1:]],
        dripping(plain(400, "{}" * 99), 120),
    ],
    ids=["head", "event", "error"],
)
def test_a_stream_that_drips_is_dropped(slow: list) -> None:
    """Bytes that come one by one are no news: the request is asked again, and answered by a server that works."""
    endpoint = ScriptedEndpoint([slow, WHOLE])
    with serving(endpoint), RemoteEngine(settings(endpoint), PLAIN) as engine:
        outcome = run(engine, [Request(HELLO, 9)])[0]
    assert (outcome.ids, len(endpoint.bodies)) == ([65, 66], 2)


def test_signs_of_life_alone_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an hour of comments, a stream is dropped, and says what it was that came."""
    monkeypatch.setattr(module, "_NO_NEWS_SECONDS", STALL)
    alive = [step for _ in range(99) for step in (b": alive\n\n", lambda: PAUSE.wait(STALL / 10) and None)]
    endpoint = ScriptedEndpoint([[STREAM, *alive]])
    with serving(endpoint), RemoteEngine(settings(endpoint, retries=0), PLAIN) as engine:
        last = run(engine, [Request(HELLO, 9)])[0].last
    assert last.finish_reason == "error"
    assert "says that it is alive, and for 0.2 s nothing else; look what" in last.message


@pytest.mark.parametrize("begin", [0, 60], ids=["head", "body"])
def test_a_server_that_drips_what_it_serves(begin: int) -> None:
    """Setting up ends as well, with what to do."""
    said = r"/models: silent for 0\.2 s, or not done by then; look whether"
    with serving(Dripping(begin=begin)) as endpoint, pytest.raises(UserError, match=said):
        EndpointAnswers(settings(endpoint, retries=0))


def test_a_server_without_encryption_is_told_from_none() -> None:
    """https:// where http:// was meant is said at once: asking again is vain, and nobody needs to start the server."""
    endpoint = ScriptedEndpoint()
    with serving(endpoint), pytest.raises(UserError, match=r"no secure connection \(.*\); put the address right"):
        EndpointAnswers(RemoteSettings(url=endpoint.url.replace("http:", "https:")))
    assert endpoint.connections == 1


def settings(endpoint: ScriptedEndpoint, **others: object) -> RemoteSettings:
    return RemoteSettings(url=endpoint.url, **{"stall_seconds": STALL, "backoff_seconds": 0.01, "retries": 1, **others})
