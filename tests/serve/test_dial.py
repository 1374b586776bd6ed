"""Thinking as a dial: every dialect, as bounds for the engine."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from fathom.data import Tokenizer
from fathom.engine.protocol import Thinking
from tests.serve.fake_engine import FakeEngine
from tests.serve.templates import HERMES, LLAMA, with_template

PATH = "/v1/chat/completions"
Serve = Callable[..., TestClient]


@pytest.mark.parametrize(
    ("given", "bounds", "opened"),
    [
        ({}, None, False),
        ({"thinking": {"type": "enabled"}}, None, True),
        ({"thinking": {"type": "disabled"}}, Thinking(budget=0), False),
        ({"enable_thinking": True}, None, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, Thinking(budget=0), False),
        ({"chat_template_kwargs": {"thinking": True}}, None, True),
        ({"thinking_budget": 12}, Thinking(budget=12), True),
        ({"thinking_token_budget": 12}, Thinking(budget=12), True),
        ({"thinking_budget": 0}, Thinking(budget=0), False),
        ({"min_thinking_budget": 5}, Thinking(minimum=5), True),
        ({"thinking_budget": 9, "min_thinking_budget": 9}, Thinking(budget=9, minimum=9), True),
        ({"reasoning_effort": "none"}, Thinking(budget=0), False),
        ({"reasoning_effort": "minimal"}, Thinking(budget=10), True),
        ({"reasoning_effort": "low"}, Thinking(budget=20), True),
        ({"reasoning_effort": "medium"}, Thinking(budget=50), True),
        ({"reasoning_effort": "high"}, Thinking(budget=80), True),
        ({"reasoning_effort": "xhigh"}, Thinking(budget=95), True),
        ({"reasoning_effort": "max"}, None, True),
        ({"reasoning_effort": "low", "thinking_budget": 60}, Thinking(budget=60), True),
    ],
)
def test_every_dialect(serve: Serve, ask: dict, given: dict, bounds: Thinking | None, opened: bool) -> None:
    """Switches, budgets and efforts reach the engine as bounds, and the template opens the tag when thinking is on."""
    engine = FakeEngine()
    answer = serve(engine).post(PATH, json=ask | {"max_tokens": 100} | given)
    assert answer.status_code == 200, answer.text
    assert (engine.requests[0].thinking, engine.requests[0].starts_thinking) == (bounds, opened)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "reasoning_effort"),
        ({"thinking": {"type": "disabled"}, "thinking_budget": 5}, "thinking"),
        ({"thinking_budget": 4, "thinking_token_budget": 5}, "thinking_budget"),
        ({"thinking_budget": 4, "min_thinking_budget": 5}, "min_thinking_budget"),
        ({"max_tokens": 5, "min_thinking_budget": 5}, "min_thinking_budget"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"reasoning_effort": "lots"}, "reasoning_effort"),
        ({"thinking": True}, "thinking"),
    ],
)
def test_contradictions_are_refused(serve: Serve, ask: dict, given: dict, param: str) -> None:
    """What cannot hold together is a 422 that names the parameter."""
    answer = serve(FakeEngine()).post(PATH, json=ask | given)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


@pytest.mark.parametrize("given", [{"enable_thinking": True}, {"thinking_budget": 5}, {"reasoning_effort": "low"}])
def test_without_think_tags_there_is_no_thinking(serve: Serve, tokenizer: Tokenizer, ask: dict, given: dict) -> None:
    """Asking it for thoughts is a 422 with a sentence; asking it not to think is fine, and bounds nothing."""
    engine = FakeEngine()
    client = serve(engine, of=with_template(tokenizer, LLAMA))
    answer = client.post(PATH, json=ask | given)
    assert (answer.status_code, "no think tags" in answer.json()["error"]["message"]) == (422, True)
    for off in ({"thinking": {"type": "disabled"}}, {"thinking_budget": 0}, {"reasoning_effort": "none"}):
        assert client.post(PATH, json=ask | off).status_code == 200
        assert engine.requests[-1].thinking is None


def test_a_template_with_its_own_way_of_off(serve: Serve, tokenizer: Tokenizer, ask: dict) -> None:
    """A template that writes an empty pair of tags for off leaves no open tag behind."""
    engine = FakeEngine()
    chatty = with_template(tokenizer, HERMES)
    assert serve(engine, of=chatty).post(PATH, json=ask | {"enable_thinking": False}).status_code == 200
    assert chatty.decode(engine.requests[0].prompt_ids).endswith("<think>\n\n</think>\n\n")
    assert not engine.requests[0].starts_thinking
