"""Over a real socket: what is no HTTP, what never ends, who never reads, who has no place, whose name is foreign."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from fathom.data import Tokenizer
from fathom.serve.server import listen, served_hosts
from tests.serve.fake_engine import STALL, FakeEngine
from tests.serve.test_server import running

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PATIENCE = 20.0


@contextmanager
def dialled(url: str) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(PATIENCE)
        client.connect((host, int(port)))
        yield client


def everything(client: socket.socket) -> bytes:
    """What comes until the other side closes (a `TimeoutError` if it does not)."""
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def refusal(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_what_is_no_http_gets_the_error_object(tokenizer: Tokenizer) -> None:
    """Noise where a request should be is a 400 in the documented form; the server lives on."""
    with running(FakeEngine(), tokenizer) as (url, _):
        with dialled(url) as client:
            client.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
            assert refusal(everything(client)) == (400, "invalid_http")
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nX-",
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{",
    ],
    ids=["silence", "headers", "second headers", "body behind its answer"],
)
def test_requests_that_never_end_are_cut_off(tokenizer: Tokenizer, sent: bytes) -> None:
    """A client that drips is gone after the time that a body has, although it never falls silent for long."""
    with running(FakeEngine(), tokenizer, body_seconds=0.5) as (url, _), dialled(url) as client:
        client.sendall(sent)
        client.settimeout(0.1)
        end = time.monotonic() + PATIENCE
        gone = False
        while not gone and time.monotonic() < end:
            try:
                gone = client.recv(65536) == b""
                client.sendall(b"a" if sent else b"")
            except TimeoutError:
                client.sendall(b"a" if sent else b"")
            except (ConnectionResetError, BrokenPipeError):
                gone = True
        assert gone


def test_a_client_that_reads_nothing_is_cut_off(tokenizer: Tokenizer) -> None:
    """An answer that is not taken ends, and with it its request in the engine."""
    engine = FakeEngine([["x" * 10_000] * 2000 + [STALL]])
    with running(engine, tokenizer, body_seconds=0.5) as (url, server), dialled(url) as client:
        body = json.dumps({"prompt": "a", "stream": True}).encode()
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert engine.ended.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while server.server_state.connections and time.monotonic() < end:
            time.sleep(0.01)
        assert not server.server_state.connections


def test_a_client_that_waits_for_its_answer_is_not(tokenizer: Tokenizer) -> None:
    """The time is for what the client has to do; the engine may take longer."""
    engine = FakeEngine([["a", STALL, "b"]])
    body = {"prompt": "a", "stream": True}
    with (
        running(engine, tokenizer, body_seconds=0.2) as (url, _),
        httpx.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        assert engine.stalled.wait(PATIENCE)
        time.sleep(0.6)
        engine.go_on.set()
        assert "".join(answer.iter_text()).endswith("data: [DONE]\n\n")


def test_connections_are_counted(tokenizer: Tokenizer) -> None:
    """One more than may be open is told so and closed; when another has gone there is room."""
    with running(FakeEngine(), tokenizer, max_connections=2) as (url, server):
        with dialled(url), dialled(url), dialled(url) as third:
            assert refusal(everything(third)) == (503, "overloaded")
        end = time.monotonic() + PATIENCE
        while server.server_state.connections and time.monotonic() < end:
            time.sleep(0.01)
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_body_that_is_too_large_closes_its_connection(tokenizer: Tokenizer) -> None:
    """The rest of it is not read."""
    with running(FakeEngine(), tokenizer, max_body_bytes=10) as (url, _), dialled(url) as client:
        client.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n")
        assert refusal(everything(client)) == (413, "body_too_large")


def test_only_its_own_names_are_answered_on_loopback(tokenizer: Tokenizer) -> None:
    """A page whose name was given the address of this machine gets nothing, whatever it asks for."""
    with listen("localhost", 0) as listener:
        hosts = served_hosts(listener, "localhost", ["https://chat.example:8443"])
    with running(FakeEngine(), tokenizer, hosts=hosts) as (url, _):
        for good in ("localhost", "LOCALHOST:1", "localhost.", "127.0.0.1:80", "[::1]:80", "chat.example"):
            assert httpx.get(f"{url}/health", headers={"host": good}).status_code == 200, good
        for bad in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", "", "@localhost"):
            for path in ("/", "/v1/models", "/nowhere"):
                answer = httpx.get(f"{url}{path}", headers={"host": bad})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_host"), bad


def test_names_are_checked_on_loopback_only() -> None:
    """The name given as --host is one; where others can reach the service, or any page may ask, all are."""
    with listen("127.0.0.2", 0) as listener:
        assert "127.0.0.2" in served_hosts(listener, "127.0.0.2", [])
        assert served_hosts(listener, "127.0.0.2", ["*"]) == ()
    with listen("0.0.0.0", 0) as listener:
        assert served_hosts(listener, "0.0.0.0", []) == ()
