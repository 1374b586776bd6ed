"""How tokens are drawn, and of which model, where a request does not say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from fathom.engine.protocol import Sampling
from fathom.errors import UserError
from fathom.serve.defaults import default_sampling
from tests.serve.fake_engine import FakeEngine

Serve = Callable[..., TestClient]


def test_requests_that_do_not_say(serve: Serve, ask: dict) -> None:
    """The service's defaults hold for each parameter that chats and completions leave out, and for no other."""
    engine = FakeEngine()
    client = serve(engine, sampling=Sampling(temperature=0.5, top_p=0.9))
    client.post("/v1/chat/completions", json=ask)
    client.post("/v1/completions", json={"model": "m", "prompt": "a", "temperature": 0})
    drawn = [(request.sampling.temperature, request.sampling.top_p) for request in engine.requests]
    assert drawn == [(0.5, 0.9), (0.0, 0.9)]


def test_option_before_folder_before_openai(tmp_path: Path) -> None:
    """Of each parameter the option counts, else what the folder publishes, else 1.0."""
    assert default_sampling(tmp_path) == Sampling()
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": None, "eos_token_id": 1}))
    assert default_sampling(tmp_path) == Sampling(temperature=0.6)
    assert default_sampling(tmp_path, temperature=0.0, top_p=0.8) == Sampling(temperature=0.0, top_p=0.8)
    assert default_sampling(tmp_path / "model.gguf") == Sampling()


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": -1}'])
def test_unreadable_folder_is_named(tmp_path: Path, text: str) -> None:
    """A file that says nothing sensible is a sentence with its name, not a silent 1.0."""
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        default_sampling(tmp_path)


def test_request_without_a_model(serve: Serve, ask: dict) -> None:
    """It gets the one that is served, and the answer says which."""
    client = serve(FakeEngine(), names=("first", "alias"))
    for path, body in (("chat/completions", {"messages": ask["messages"]}), ("completions", {"prompt": "a"})):
        answer = client.post(f"/v1/{path}", json=body)
        assert (answer.status_code, answer.json()["model"]) == (200, "first")
