"""What every answer carries, what other origins may do, and what is written down of a request."""

import logging
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from fathom.serve.envelope import REQUEST_LOG
from tests.serve.fake_engine import FakeEngine

PATH = "/v1/chat/completions"
Serve = Callable[..., TestClient]
ORIGIN = "https://app.example"


def preflight(client: TestClient, origin: str):
    """What a browser asks before it sends a key and JSON."""
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return client.options(PATH, headers={"origin": origin, **wanted})


@pytest.mark.parametrize("allowed", [ORIGIN, "*"])
def test_allowed_origins_may_ask(serve: Serve, ask: dict, allowed: str) -> None:
    """Without a key the preflight passes, and answers, streams and refusals with one can be read."""
    client = serve(FakeEngine(), allow_origins=(allowed,), api_keys=("k",))
    asked = preflight(client, ORIGIN)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == allowed
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    key = {"origin": ORIGIN, "authorization": "Bearer k"}
    for body, headers, status in (
        (ask, key, 200),
        (ask | {"stream": True}, key, 200),
        (ask | {"foo": 1}, key, 422),
        (ask, {"origin": ORIGIN}, 401),
    ):
        answer = client.post(PATH, json=body, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, allowed)
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
        assert "access-control-allow-credentials" not in answer.headers


def test_other_origins_may_not(serve: Serve, ask: dict) -> None:
    """An origin that is not named, and any where none is, gets no permission from preflight or answer."""
    for settings in ({}, {"allow_origins": (ORIGIN,)}):
        client = serve(FakeEngine(), **settings)
        other = "https://evil.example"
        assert preflight(client, other).status_code >= 400
        for answer in (preflight(client, other), client.post(PATH, json=ask, headers={"origin": other})):
            assert "access-control-allow-origin" not in answer.headers
    reach = "cross-origin-resource-policy"
    assert serve(FakeEngine()).get("/health").headers[reach] == "same-origin"


@pytest.mark.parametrize("given", ["trace-1", "x" * 128])
def test_request_identifier_is_the_client_s(serve: Serve, given: str) -> None:
    """A word of at most 128 characters comes back as it is."""
    assert serve(FakeEngine()).get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, b"caf\xe9"])
def test_request_identifier_is_made(serve: Serve, given: str | bytes | None) -> None:
    """Without a sane one every answer, refusals among them, gets one of its own."""
    client = serve(FakeEngine())
    headers = {} if given is None else {"x-request-id": given}
    made = [client.request(method, path, headers=headers).headers["x-request-id"] for method, path in (
        ("GET", "/health"), ("GET", "/nothing"), ("POST", PATH), ("GET", "/"),
    )]  # fmt: skip
    assert len(set(made)) == 4
    assert all(len(word) == 32 for word in made)


def test_request_log(serve: Serve, ask: dict, caplog: pytest.LogCaptureFixture) -> None:
    """A line has method, path, status, time, tokens and identifier; no text, no key, no query, no second line."""
    caplog.set_level(logging.INFO, REQUEST_LOG)
    client = serve(FakeEngine(), api_keys=("secret",))
    key = {"authorization": "Bearer secret", "x-request-id": "mine"}
    for body in (ask, ask | {"stream": True}):
        client.post(PATH, json=body, headers=key)
    client.post(PATH, json=ask)
    client.get("/v1/a%0AGET%20/b?q=secret")
    said = [record.getMessage() for record in caplog.records if record.name == REQUEST_LOG]
    assert [line.split(" ms")[0].rsplit(" ", 1)[0] for line in said] == [
        f"POST {PATH} 200",
        f"POST {PATH} 200",
        f"POST {PATH} 401",
        "GET /v1/a%0AGET%20/b 404",
    ]
    assert all(" completion 2 id mine" in line for line in said[:2])
    assert "prompt" not in said[2]
    assert not any(word in line for line in said for word in ("secret", "hi", "Hello", "\n"))


def test_request_log_is_off_unless_asked_for(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is written for a request by default."""
    serve(FakeEngine()).get("/health")
    assert capfd.readouterr() == ("", "")
