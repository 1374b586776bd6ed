"""Keys, and what each may do at once."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from fathom.serve.errors import ApiError
from fathom.serve.limits import Gate
from fathom.serve.settings import ServiceSettings
from tests.serve.fake_engine import FakeEngine

PATH = "/v1/chat/completions"
Serve = Callable[..., TestClient]


def test_only_known_keys_pass(serve: Serve, ask: dict) -> None:
    """Without a key, with a wrong one or another scheme: 401, for the list of models too; each right key passes."""
    client = serve(FakeEngine(), api_keys=("one", "two"))
    for header in (None, "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer \xe9"):
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        for answer in (client.post(PATH, json=ask, headers=headers), client.get("/v1/models", headers=headers)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    for header in ("Bearer one", "bearer two"):
        assert client.post(PATH, json=ask, headers={"authorization": header}).status_code == 200
    assert client.get("/health").status_code == 200


def test_keys_do_not_share_cached_prefixes(serve: Serve, ask: dict) -> None:
    """Each key has a salt of its own that does not show the key, and a request's salt adds to it."""
    engine = FakeEngine()
    client = serve(engine, api_keys=("one", "two"))
    for key, more in (("one", {}), ("one", {}), ("two", {}), ("one", {"cache_salt": "x"})):
        client.post(PATH, json=ask | more, headers={"authorization": f"Bearer {key}"})
    first, again, other, salted = (request.cache_salt for request in engine.requests)
    assert first == again != other
    assert salted == f"{first}:x"
    assert "one" not in first


def test_the_rate_is_kept_per_key() -> None:
    """A minute's worth may come at once, then one per interval; the refusal says how long to wait."""
    now = [0.0]
    gate = Gate(ServiceSettings(api_keys=("a", "b"), requests_per_minute=3), clock=lambda: now[0])
    a, b = gate.identify(["Bearer a"]), gate.identify(["Bearer b"])
    for _ in range(3):
        gate.enter(a)
    with pytest.raises(ApiError) as refusal:
        gate.enter(a)
    assert (refusal.value.status, refusal.value.headers["Retry-After"]) == (429, "20")
    gate.enter(b)
    now[0] = 20
    gate.enter(a)
    with pytest.raises(ApiError):
        gate.enter(a)
    now[0] = 10_000
    for _ in range(3):
        gate.enter(a)
    with pytest.raises(ApiError):
        gate.enter(a)


def test_concurrency_is_kept_per_key() -> None:
    """A place is free again when its request ends, and leaving twice frees one place only."""
    gate = Gate(ServiceSettings(concurrent_requests=2))
    client = gate.identify([])
    leave = gate.enter(client)
    gate.enter(client)
    with pytest.raises(ApiError, match="2 requests running"):
        gate.enter(client)
    leave()
    leave()
    gate.enter(client)
    with pytest.raises(ApiError):
        gate.enter(client)


def test_refused_requests_free_their_place(serve: Serve, ask: dict) -> None:
    """Neither a bad body nor a finished answer keeps a place."""
    client = serve(FakeEngine(), concurrent_requests=1)
    for _ in range(3):
        assert client.post(PATH, json={}).status_code == 422
        assert client.post(PATH, json=ask).status_code == 200
        assert client.post(PATH, json=ask | {"stream": True}).status_code == 200
