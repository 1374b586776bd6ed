"""Endpoints that give text: what they are asked, how their answers are read, and what is said when they fail."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fathom.config.evaluation import EvaluationSettings
from fathom.engine.remote import RemoteSettings
from fathom.errors import UserError
from fathom.evaluate.answers import Answer, EngineAnswers
from fathom.evaluate.endpoint import EndpointAnswers
from fathom.evaluate.evaluate import evaluate
from fathom.tasks.task import Problem
from tests.engine.running import MLA, TAGGED, engine_of
from tests.engine.scripted_endpoint import HANG, RESET, VLLM, ScriptedEndpoint, plain, serving
from tests.engine.vocabularies import byte_vocabulary
from tests.evaluate.scripted import MODULAR
from tests.model.configs import build
from tests.serve.test_server import running

CHAT = MODULAR.replace(prompt={"style": "chat", "instruction": "Say it."}, samples=1)
QUESTION = Problem("3+4=", "7")


def chat(content: str | None, *, finish: str = "stop", usage: dict | None = None, **message: object) -> bytes:
    """A whole answer of `/chat/completions`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return plain(200, json.dumps({"choices": [choice], "usage": usage}))


@contextmanager
def connected(*answers: object, models: bytes | None = None, **settings: object) -> Iterator[tuple]:
    """An endpoint that gives `answers` in turn, asked by one connection."""
    endpoint = ScriptedEndpoint(scripts=[[answer] for answer in answers], **({"models": models} if models else {}))
    quick = {"connections": 1, "backoff_seconds": 0.01, "retries": 2, **settings}
    with serving(endpoint), EndpointAnswers(RemoteSettings(url=endpoint.url, **quick)) as asked:
        yield endpoint, asked


def ask(answers: EndpointAnswers, settings: EvaluationSettings = CHAT) -> list[Answer]:
    """All that comes of one question."""
    [reply] = answers.replies([QUESTION], settings, budget=None)
    return list(reply.answers)


def test_what_is_asked() -> None:
    """The question with the instruction as a user's message, the sampling, and a seed for each sample."""
    with connected(chat("7")) as (endpoint, answers):
        ask(answers, CHAT.replace(samples=2))
    first, second = endpoint.bodies
    assert first.pop("seed") != second.pop("seed")
    assert first == second == {
        "model": "m", "max_tokens": 24, "temperature": 0.6, "top_p": 0.95,
        "messages": [{"role": "user", "content": "3+4=\nSay it."}],
    }  # fmt: skip


def test_a_server_that_may_not_know_seeds_gets_none() -> None:
    """Only `fathom serve` and vLLM do."""
    models = plain(200, json.dumps({"data": [{"id": "m", "owned_by": "somebody"}]}))
    with connected(chat("7"), models=models) as (endpoint, answers):
        ask(answers)
    assert "seed" not in endpoint.bodies[0]


ANSWERS = {
    "plain": (chat("7"), "7", True),
    "thought": (chat("7", reasoning_content="3 and 4"), "<think>3 and 4</think>7", True),
    "thought by vLLM's newer name": (chat("7", reasoning="3 and 4"), "<think>3 and 4</think>7", True),
    "thought in the text": (chat("<think>3 and 4</think>7"), "<think>3 and 4</think>7", True),
    "thought that the template opens": (chat("3 and 4</think>7"), "<think>3 and 4</think>7", True),
    "cut off in the thought": (chat(None, reasoning_content="3 an", finish="length"), "<think>3 an", False),
    "cut off": (chat("it is", finish="length"), "it is", False),
    "nothing": (chat(None), "", True),
    "half a character": (chat("7 \ud83d"), "7 \ufffd", True),
    "a whole one in halves": (chat("7 \U0001f600"), "7 \U0001f600", True),
    "nothing but its text": (plain(200, '{"choices": [{"message": {"content": "7"}}]}'), "7", True),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_how_an_answer_reads(name: str) -> None:
    """Thoughts stand between tags wherever the server has put them; what was cut off in one has not closed it."""
    sent, text, finished = ANSWERS[name]
    with connected(sent) as (_, answers):
        [answer] = ask(answers)
    assert (answer.text, answer.finished) == (text, finished)


def test_tokens_are_those_that_the_server_counts() -> None:
    """`usage`, with its thoughts; without it nobody knows, and no cost is made up."""
    usage = {"prompt_tokens": 5, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 6}}
    with connected(chat("7", usage=usage), chat("7")) as (_, answers):
        [told] = ask(answers)
        [silent] = ask(answers)
        found = evaluate(answers, CHAT, model="m").measurements[0]
    assert (told.prompt_tokens, told.completion_tokens, told.thought_tokens) == (5, 9, 6)
    assert (silent.prompt_tokens, silent.completion_tokens, silent.thought_tokens) == (None, None, None)
    assert found.completion_tokens is found.cost.completion_tokens is found.cost.joules is None


def test_a_server_in_trouble_is_asked_again() -> None:
    """503, 429, a proxy's trouble, an error behind a status of 200 and a broken connection cost time and no sample."""
    told = plain(200, '{"error": {"message": "upstream", "code": 502}}')
    for trouble in (plain(503, "{}"), plain(524, ""), plain(529, ""), plain(429, "{}", "Retry-After: 0"), RESET, told):
        with connected(trouble, chat("7")) as (endpoint, answers):
            assert ask(answers)[0].text == "7"
        assert len(endpoint.bodies) == 2


FAILURES = {
    "401": (plain(401, '{"error": {"message": "bad key"}}'), "HTTP 401.*bad key; give the server's key .*--key-env"),
    "404": (plain(404, ""), "/chat/completions: HTTP 404"),
    "no JSON": (plain(200, "<html>"), "sent what cannot be read .*'<html>'"),
    "no choices": (plain(200, '{"choices": []}'), "gives no answer to this request .no choices"),
    "null choices": (plain(200, '{"choices": null}'), "sent what cannot be read .*choices"),
    "moved": (plain(308, "", "Location: /v2"), "redirects to /v2, which is not followed; give the address itself"),
    "400": (plain(400, '{"error": "too long"}'), "HTTP 400 .*: too long"),
    "down": (plain(500, "{}"), r"HTTP 500 .* \(tried 3 times\)"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_server_that_cannot_be_used(name: str) -> None:
    """One line names the address, what is wrong and what to do, without asking all the rest in vain."""
    sent, said = FAILURES[name]
    with connected(sent) as (endpoint, answers), pytest.raises(UserError, match=said) as refusal:
        evaluate(answers, CHAT, model="m")
    assert "\n" not in str(refusal.value)
    assert len(endpoint.bodies) < CHAT.problems


@pytest.mark.parametrize(
    ("answer", "said"),
    [(plain(400, '{"error": "unwanted"}'), "unwanted"), (plain(200, '{"choices": []}'), "no choices")],
)
def test_a_question_that_the_server_refuses_is_left_out(answer: bytes, said: str) -> None:
    """One 400, or an answer without any, after a good one costs that problem alone, and is told."""
    with connected(chat("7"), answer, chat("7")) as (_, answers):
        found = evaluate(answers, CHAT, model="m").measurements[0]
    assert (found.problems, found.left_out) == (7, 1)
    assert said in found.left_out_for


def test_a_server_that_breaks_later_costs_nothing_measured() -> None:
    """What was answered before a page in the place of an answer is returned, with the reason why there is no more."""
    with connected(chat("7"), chat("7"), plain(200, "<html>")) as (_, answers):
        found = evaluate(answers, CHAT, model="m")
    assert found.measurements[0].problems == 2
    assert "sent what cannot be read" in found.stopped


def test_leaving_early_closes_connections() -> None:
    """After the first reply, closing the iterator gives up a request that would never end."""
    begun, left = threading.Event(), threading.Event()
    with connected(chat("7"), HANG) as (endpoint, answers):
        endpoint.scripts[1][:] = [begun.set, HANG, left.set]
        replies = answers.replies([QUESTION, Problem("1+1=", "2")], CHAT, budget=None)
        next(replies)
        assert begun.wait(10)
        replies.close()
        assert left.wait(10)


def test_nobody_there() -> None:
    """An address where nothing listens is said in setting up, and no thread is left behind."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UserError, match="nobody answers there"):
        EndpointAnswers(RemoteSettings(url=f"http://127.0.0.1:{port}", backoff_seconds=0.01, retries=1))
    assert not [thread for thread in threading.enumerate() if thread.name == "fathom-endpoint"]


def test_what_other_servers_cannot_be_asked() -> None:
    """Thoughts are cut, and begun at a word, by `fathom serve` alone."""
    with connected(models=plain(200, json.dumps({"data": [VLLM]}))) as (_, answers):
        with pytest.raises(UserError, match=r"budgets: .* 'fathom serve' alone"):
            answers.require(CHAT.replace(budgets=(3,)))
        with pytest.raises(UserError, match="opens_thought"):
            answers.require(CHAT.replace(prompt={"style": "chat", "opens_thought": True}))


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' }}{# </think> #}"


IF_ASKED = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' if enable_thinking }}{# </think> #}"


@pytest.mark.parametrize(
    ("prompt", "template", "budgets"),
    [
        ({"style": "chat"}, TEMPLATE, (0, 5)),
        ({"style": "chat", "opens_thought": True}, IF_ASKED, (5, 9)),
        ({"style": "template"}, None, (0, 5)),
    ],
    ids=["chat", "thinking", "template"],
)
def test_our_own_service_answers_as_its_engine(prompt: dict, template: str | None, budgets: tuple[int, ...]) -> None:
    """The same seeds give the same scores, lengths and ends through `fathom serve` as without it, at every
    budget, and a chat thinks where it is asked to; a budget of 0 takes that back."""
    vocabulary = byte_vocabulary(tags=True, template=template) if template else TAGGED
    settings = MODULAR.replace(prompt=prompt, problems=4, budgets=budgets)
    with engine_of(build(MLA)) as engine, running(engine, vocabulary) as (url, _):
        here = _lengths(EngineAnswers(engine, vocabulary), settings)
        with EndpointAnswers(RemoteSettings(url=url)) as answers:
            there = _lengths(answers, settings)
            unthinking = evaluate(answers, settings.replace(budgets=(0,)), model="m")
    assert there == here
    assert not unthinking.stopped


def _lengths(answers: EngineAnswers | EndpointAnswers, settings: EvaluationSettings) -> list:
    return [
        (one.score, one.completion_tokens, one.cost.prompt_tokens, one.truncated, one.unread)
        for one in evaluate(answers, settings, model="m").measurements
    ]
