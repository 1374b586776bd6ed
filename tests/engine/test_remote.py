"""Requests that an endpoint answers: as the built-in engine would, and whatever happens to the connection."""

import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from fathom.engine.complete import complete
from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.protocol import Constraint, QueueFull, Request, Sampling, Thinking
from fathom.engine.remote import RemoteEngine, RemoteSettings
from fathom.errors import UserError
from tests.engine.running import GREEDY, MLA, OPEN, PLAIN, TAGGED, Outcome, ask, assert_idle, run, submit
from tests.engine.scripted_endpoint import (
    CHUNKS_END,
    DONE,
    HANG,
    RESET,
    STREAM,
    VLLM,
    ScriptedEndpoint,
    event,
    plain,
    serving,
    usage,
)
from tests.engine.vocabularies import EOS, byte_vocabulary
from tests.model.configs import build
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_server import running

HELLO = list(b"hello")
QUICK = {"backoff_seconds": 0.01, "retries": 3}
Connect = Callable[..., RemoteEngine]


@pytest.fixture(scope="module")
def builtin() -> Iterator[Engine]:
    with Engine(build(MLA), TAGGED, EngineSettings(cache_memory=2**22, max_running=64)) as engine:
        yield engine


@pytest.fixture(scope="module")
def service(builtin: Engine) -> Iterator[str]:
    """The address of `fathom serve` over `builtin`."""
    with running(builtin, TAGGED) as (url, _):
        yield url


@pytest.fixture(scope="module")
def remote(service: str) -> Iterator[RemoteEngine]:
    with RemoteEngine(RemoteSettings(url=service), TAGGED) as engine:
        yield engine


@pytest.fixture
def connect() -> Iterator[Connect]:
    """`connect(endpoint, tokenizer, **settings)` gives an engine of a scripted endpoint that is served from now on."""
    with ExitStack() as stack:

        def start(endpoint: ScriptedEndpoint, tokenizer=PLAIN, **settings: object) -> RemoteEngine:
            url = stack.enter_context(serving(endpoint)).url
            return stack.enter_context(RemoteEngine(RemoteSettings(**{"url": url, **QUICK, **settings}), tokenizer))

        yield start


# ------------------------------------------------------------------------------------------------ our own service

SAME = {
    "greedy": ask(HELLO, 40),
    "seeded": ask(HELLO, 40, Sampling(seed=7, temperature=0.9, top_p=0.95, top_k=50, min_p=0.001), logprobs=3),
    "penalties": ask(HELLO, 30, Sampling(seed=1, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.1)),
    "biased": ask(HELLO, 5, GREEDY.replace(logit_bias={88: 100.0}), logprobs=0),
    "end of text": Request(HELLO, 40, GREEDY.replace(logit_bias={EOS: 100.0}), logprobs=1),
    "stop string": ask(HELLO, 40, GREEDY.replace(logit_bias={120: 50.0, 121: 50.0}), stop=("xxx", "yy")),
    "thoughts": ask(
        [*HELLO, OPEN], 40, Sampling(seed=3), starts_thinking=True, thinking=Thinking(budget=9), logprobs=2
    ),
    "least thoughts": ask([*HELLO, OPEN], 40, GREEDY, starts_thinking=True, thinking=Thinking(minimum=7, budget=30)),
    "opens thoughts": ask(HELLO, 20, GREEDY.replace(logit_bias={OPEN: 100.0})),
    "constrained": Request(HELLO, 20, Sampling(seed=5), constraint=Constraint(kind="regex", text="[a-c]{4}")),
    "whole context": ask(HELLO * 100, 100_000),
}


@pytest.mark.parametrize("name", SAME)
def test_all_is_as_from_the_built_in_engine(name: str, builtin: Engine, remote: RemoteEngine) -> None:
    """Tokens, text, parts, log-probabilities with alternatives, usage and the reason of the end are equal."""
    request = SAME[name]
    [here] = complete(builtin, [replace(request, cache_salt=f"here {name}")])
    [there] = complete(remote, [replace(request, cache_salt=f"there {name}")])
    assert there == here
    assert there.token_ids


def test_many_at_once(builtin: Engine, remote: RemoteEngine) -> None:
    """64 requests together give what each gives alone, and their chunks come in order, the last one last."""
    requests = [ask(list(f"{n} apples".encode()), 12, Sampling(seed=n), logprobs=0) for n in range(64)]
    drawn = remote.statistics().completion_tokens
    together = run(remote, requests)
    for outcome, alone in zip(together, complete(builtin, requests), strict=True):
        assert outcome.ids == alone.token_ids
        assert outcome.logprobs == alone.logprobs
        assert [chunk.finish_reason for chunk in outcome.chunks[:-1]] == [None] * (len(outcome.chunks) - 1)
        counts = [chunk.usage.completion for chunk in outcome.chunks]
        assert counts == sorted(counts)
    levels = remote.statistics()
    assert (levels.running, levels.waiting, levels.completion_tokens - drawn) == (0, 0, 64 * 12)


def test_cancelling_frees_the_server_s_sequence(builtin: Engine, remote: RemoteEngine) -> None:
    """A cancelled request ends so, once, and the service computes it no further; also before it has begun."""
    outcome, begun = Outcome(), threading.Event()
    ticket = remote.submit(ask(HELLO, 500), lambda chunk: (outcome.take(chunk), begun.set()))
    assert begun.wait(30)
    ticket.cancel()
    ticket.cancel()
    assert outcome.wait().last.finish_reason == "cancelled"
    assert len(outcome.ids) < 500
    at_once = submit(remote, ask(HELLO, 500))
    at_once.ticket.cancel()
    assert at_once.wait().last.finish_reason == "cancelled"
    assert_idle(builtin)
    ticket.cancel()
    assert [chunk.finish_reason for chunk in outcome.chunks].count("cancelled") == 1


def test_cached_tokens_are_told_at_the_end(remote: RemoteEngine) -> None:
    """The last chunk's usage says what the server found in its cache."""
    prompt = list(b"a prompt that is long enough to fill some blocks of the cache " * 4)
    first, second = (run(remote, [ask(prompt, 2, cache_salt="told")])[0].last.usage for _ in range(2))
    assert (first.cached, second.cached > 100) == (0, True)


def test_what_the_service_refuses_is_the_request_s_fault(remote: RemoteEngine) -> None:
    """Its own sentence comes through, in one line."""
    for request, word in ((ask([300]), "300"), (ask(HELLO, logprobs=50), "logprobs")):
        last = submit(remote, request).wait().last
        assert (last.finish_reason, last.fault) == ("error", "request")
        assert "HTTP 422" in last.message
        assert word in last.message
        assert "\n" not in last.message


def test_a_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The right key is let in; a wrong one is refused in words that do not hold it, nor does any log."""
    caplog.set_level(logging.DEBUG)
    with running(FakeEngine(), TAGGED, api_keys=("sk-right",)) as (url, _):
        settings = RemoteSettings(url=url, api_key_env="THE_KEY", **QUICK)
        monkeypatch.setenv("THE_KEY", "sk-right")
        with RemoteEngine(settings, TAGGED) as engine:
            assert run(engine, [ask(HELLO, 3)])[0].ids == [20, 20]
        monkeypatch.setenv("THE_KEY", "sk-wrong")
        with pytest.raises(UserError, match="HTTP 401"):
            RemoteEngine(settings, TAGGED)
    echo = plain(401, json.dumps({"error": {"message": "we do not know sk-wrong"}}))
    with serving(ScriptedEndpoint(models=echo)) as endpoint, pytest.raises(UserError, match=r"do not know \*\*\*"):
        RemoteEngine(RemoteSettings(url=endpoint.url, api_key_env="THE_KEY"), TAGGED)
    assert endpoint.authorizations == ["Bearer sk-wrong"]
    assert "sk-" not in caplog.text
    for value in ("", "with space", "ünï"):
        monkeypatch.setenv("THE_KEY", value)
        with pytest.raises(UserError, match="api_key_env") as refusal:
            RemoteEngine(settings, TAGGED)
        assert not value or value not in str(refusal.value)


def test_closing_lets_requests_finish_or_cancels_them(service: str) -> None:
    """With time to drain the answers are whole, without it they are cancelled; nobody is left without an end."""
    engine = RemoteEngine(RemoteSettings(url=service, connections=2), TAGGED)
    outcomes = [submit(engine, ask(HELLO, 8)) for _ in range(6)]
    engine.close(drain_seconds=60)
    assert [outcome.last.finish_reason for outcome in outcomes] == ["length"] * 6
    with pytest.raises(QueueFull):
        submit(engine, ask(HELLO))
    outcomes[0].ticket.cancel()
    engine.close()
    engine = RemoteEngine(RemoteSettings(url=service, connections=2), TAGGED)
    outcomes = [submit(engine, ask(HELLO, 500)) for _ in range(6)]
    engine.close()
    assert [outcome.last.finish_reason for outcome in outcomes] == ["cancelled"] * 6


def test_a_listener_that_fails_ends_its_own_request_alone(builtin: Engine, remote: RemoteEngine) -> None:
    """Its request is cancelled at the server, and others go on."""

    def fail(_: object) -> None:
        raise RuntimeError("gone")

    remote.submit(ask(HELLO, 500), fail)
    assert run(remote, [ask(HELLO, 5)])[0].last.finish_reason == "length"
    assert_idle(builtin)


# -------------------------------------------------------------------------------------------- connections that break

AB = [65, 66]
FIRST = [STREAM, event(65)]
REST = [STREAM, event(66, finish="stop"), usage(), DONE]
WHOLE = [STREAM, event(65), event(66, finish="stop"), usage(), DONE]
CHUNKED_STREAM = STREAM.replace(b"Connection: close", b"Transfer-Encoding: chunked")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize(
    ("broken", "known"),
    [
        ([], 0),
        ([RESET], 0),
        ([STREAM[:40]], 0),
        ([STREAM], 0),
        ([STREAM, event(65)[:-20]], 0),
        (FIRST, 1),
        ([*FIRST, RESET], 1),
        ([CHUNKED_STREAM, chunk(event(65))], 1),
        ([*FIRST, event(66)[:-3]], 1),
        ([*FIRST, DONE], 1),
        ([*FIRST, event(finish="abort"), DONE], 1),
        ([*FIRST, b'data: {"error": {"message": "defect", "code": 500}}\n\n', DONE], 1),
    ],
)
def test_a_broken_connection_is_resumed(broken: list, known: int, connect: Connect) -> None:
    """Wherever it breaks, each token is delivered once, and what is drawn already is not drawn again."""
    endpoint = ScriptedEndpoint([broken, REST if known else WHOLE])
    outcome = run(connect(endpoint), [Request(HELLO, 9)])[0]
    assert (outcome.ids, outcome.text(), outcome.last.finish_reason) == (AB, "AB", "stop")
    assert outcome.last.usage.completion == 2
    assert [body["prompt"] for body in endpoint.bodies] == [HELLO, HELLO + AB[:known]]
    assert [body["max_tokens"] for body in endpoint.bodies] == [9, 9 - known]


@pytest.mark.parametrize("end", [[], [RESET], [b"data: {oh\n\n"], [HANG]])
def test_what_breaks_after_the_end_changes_nothing(end: list, connect: Connect) -> None:
    """Once the reason of the end is there, the completion is whole; a token that waits for a character is shown."""
    endpoint = ScriptedEndpoint([[STREAM, event(65), event(0xE2, finish="length"), *end]])
    outcome = run(connect(endpoint, stall_seconds=0.1), [Request(HELLO, 2)])[0]
    assert (outcome.ids, outcome.text(), outcome.last.finish_reason) == ([65, 0xE2], "A\ufffd", "length")
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "request_",
    [
        Request(HELLO, 9, Sampling(seed=4)),
        Request(HELLO, 9, Sampling(presence_penalty=0.5)),
        Request(HELLO, 9, constraint=Constraint(kind="json_object")),
    ],
)
def test_what_cannot_be_resumed_is_replayed(request_: Request, connect: Connect) -> None:
    """It is asked again as it was, with the same seed (its own, if it had none), and nothing is delivered twice."""
    endpoint = ScriptedEndpoint([FIRST, FIRST, WHOLE])
    outcome = run(connect(endpoint), [request_])[0]
    assert (outcome.ids, outcome.text()) == (AB, "AB")
    first, *others = endpoint.bodies
    assert others == [first, first]
    assert isinstance(first["seed"], int)


def test_connections_are_used_again(connect: Connect) -> None:
    """One request after another goes over the connection of the first, although the end of an answer comes late."""
    pause = threading.Event()
    end = [chunk(DONE), lambda: pause.wait(0.02) or None, CHUNKS_END]
    endpoint = ScriptedEndpoint([[CHUNKED_STREAM, chunk(event(65, finish="stop") + usage()), *end]])
    engine = connect(endpoint)
    before = endpoint.connections
    for _ in range(3):
        assert run(engine, [Request(HELLO, 9)])[0].ids == [65]
    assert endpoint.connections - before == 1


def test_a_replay_that_draws_other_tokens_is_an_error(connect: Connect) -> None:
    """Text of two different samples is never put together."""
    endpoint = ScriptedEndpoint([FIRST, [STREAM, event(67, 66, finish="stop"), usage(), DONE]])
    outcome = run(connect(endpoint), [Request(HELLO, 9, Sampling(seed=4))])[0]
    assert (outcome.ids, outcome.last.finish_reason, outcome.last.fault) == ([65], "error", "engine")
    assert "drawn anew (in a recipe retries" in outcome.last.message


SEEDED = Request(HELLO, 9, Sampling(seed=4))
NO_SEEDS = [plain(400, json.dumps({"error": {"message": "there is no per-request seed here", "code": 400}}))]


def test_an_endpoint_without_seeds_is_asked_without(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """A refused seed is left out, in later requests from the start; that nothing can be drawn again is said once."""
    endpoint = ScriptedEndpoint([NO_SEEDS, WHOLE, WHOLE])
    engine = connect(endpoint)
    for _ in range(2):
        assert run(engine, [SEEDED])[0].ids == AB
    assert ["seed" in body for body in endpoint.bodies] == [True, False, False]
    (said,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "no per-request seed here; asked without a seed, so samples cannot be drawn again" in said


def test_a_sample_without_its_seed_is_resumed(connect: Connect) -> None:
    """Where the endpoint takes no seed, a connection that breaks off costs no token that is there."""
    endpoint = ScriptedEndpoint([NO_SEEDS, FIRST, REST])
    assert run(connect(endpoint), [SEEDED])[0].ids == AB
    assert [body["prompt"] for body in endpoint.bodies] == [HELLO, HELLO, [*HELLO, 65]]


def test_a_refusal_that_only_mentions_seeds_stands(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """Where the request is refused without its seed as well, the seed was not at fault: seeds are still sent."""
    refused = [plain(400, json.dumps({"error": {"message": "Seed-36B: too long", "code": 400}}))]
    endpoint = ScriptedEndpoint([refused, refused, WHOLE])
    engine = connect(endpoint)
    last = run(engine, [SEEDED])[0].last
    assert (last.finish_reason, last.fault) == ("error", "request")
    assert "Seed-36B: too long" in last.message
    assert run(engine, [SEEDED])[0].ids == AB
    assert endpoint.bodies[-1]["seed"] == 4
    assert not caplog.records


def test_tries_are_counted_while_they_bring_nothing(connect: Connect) -> None:
    """One that brings a token begins a new count; then so many more than `retries`, and an error with the address."""
    endpoint = ScriptedEndpoint([FIRST, [STREAM], [STREAM, event(66)], [STREAM]])
    outcome = run(connect(endpoint, retries=2), [Request(HELLO, 9)])[0]
    assert outcome.ids == AB
    assert (outcome.last.finish_reason, outcome.last.fault) == ("error", "engine")
    assert endpoint.url in outcome.last.message
    assert "tried 3 times" in outcome.last.message
    assert len(endpoint.bodies) == 3 + 2


def test_silence_is_a_break_and_comments_are_life(connect: Connect) -> None:
    """A stream that stalls is asked for again; one that says it is alive for longer than that is waited for."""
    pause = threading.Event()
    waiting = [step for _ in range(8) for step in (b": keep-alive\n\n", lambda: pause.wait(0.05) or None)]
    endpoint = ScriptedEndpoint([[*FIRST, HANG], [STREAM, *waiting, event(66, finish="stop"), usage(), DONE]])
    outcome = run(connect(endpoint, stall_seconds=0.25), [Request(HELLO, 9)])[0]
    assert (outcome.ids, len(endpoint.bodies)) == (AB, 2)
    silent = ScriptedEndpoint([[STREAM, HANG]])
    last = run(connect(silent, stall_seconds=0.05, retries=1), [Request(HELLO, 9)])[0].last
    assert (last.finish_reason, "silent for 0.05 s" in last.message) == ("error", True)


def test_a_server_that_goes_for_good_leaves_nobody_waiting() -> None:
    """Each of many requests ends with an error that says who does not answer."""
    begun = threading.Semaphore(0)
    with serving(ScriptedEndpoint([[*FIRST, begun.release, HANG]])) as endpoint:
        engine = RemoteEngine(RemoteSettings(url=endpoint.url, stall_seconds=0.2, **QUICK), PLAIN)
        outcomes = [submit(engine, Request(HELLO, 9)) for _ in range(20)]
        for _ in outcomes:
            assert begun.acquire(timeout=30)
    for outcome in outcomes:
        last = outcome.wait().last
        assert (last.finish_reason, last.fault) == ("error", "engine")
        assert f"{endpoint.url}/completions: nobody answers there" in last.message
    engine.close()


# -------------------------------------------------------------------------------------------------- wrong answers

DRAWN = {"tokens": ["token_id:65"], "token_logprobs": [-1.0], "top_logprobs": [{"token_id:65": -1.0}]}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([STREAM, b"data: {oh\n\n"], "cannot be read"),
        ([STREAM, b"data: [1]\n\n"], "cannot be read"),
        ([STREAM, b'data: {"choices": 5}\n\n'], "cannot be read (choices:"),
        ([STREAM, b"<html>\n<p>hello"], "no stream of events: '<html>'"),
        ([STREAM, b"\xff\xfe\x00garbage\n"], "no stream of events"),
        ([STREAM, event(-1)], "token_ids"),
        ([STREAM, event(2**40)], "token_ids"),
        ([STREAM, event(2**30)], "has drawn token 1073741824, but this model's vocabulary has"),
        ([plain(200, "<html>" * 100, kind="text/html")], "answered with 'text/html'"),
        ([plain(200, "{}")], "answered with 'application/json'"),
        ([STREAM, b'data: {"choices": [{"text": "A"}]}\n\n'], "'return_token_ids'"),
        ([STREAM, event(65, prompt_token_ids=[0, *HELLO])], "other tokens than it was sent"),
        ([STREAM, event(65)], "no log-probabilities"),
        ([STREAM, event(66, logprobs=DRAWN)], "'return_tokens_as_token_ids'"),
        ([STREAM, event(65, logprobs=DRAWN | {"tokens": ["A"]})], "'return_tokens_as_token_ids'"),
        ([STREAM, event(65, logprobs=DRAWN | {"top_logprobs": []})], "differ in length"),
        ([STREAM, event(65, logprobs=DRAWN | {"top_logprobs": [{"A": -1.0}]})], "alternative"),
        ([STREAM, event(65, logprobs=DRAWN | {"token_logprobs": [None]})], "token_logprobs"),
        ([STREAM, event(65, logprobs=DRAWN | {"token_logprobs": [float("nan")]})], "finite number"),
        (
            [STREAM, event(65, logprobs=DRAWN | {"token_logprobs": [-9999.0]})],
            ": gives a token the log-probability -9999",
        ),
        ([STREAM, event(65, logprobs=DRAWN | {"token_logprobs": [0.5]})], "log-probability 0.5, which must lie"),
        ([STREAM, event(65, logprobs=DRAWN | {"top_logprobs": [{"token_id:65": 3.5}]})], "log-probability 3.5, which"),
        ([plain(401, '{"error": {"message": "no\\nkey"}}')], "HTTP 401 Some Reason: no key; give the server's key"),
        ([plain(404, '{"detail": "Not Found"}')], "HTTP 404 Some Reason: Not Found"),
        ([plain(404, "<html>nginx</html>", kind="text/html")], "HTTP 404 Some Reason"),
        ([plain(307, "", "Location: https://elsewhere/v1")], "redirects to https://elsewhere/v1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_such_endpoint_is_said_at_once(answer: list, words: str, connect: Connect) -> None:
    """One line with the address and what is wrong, no second try, and the engine's fault: no request does better."""
    endpoint = ScriptedEndpoint([answer])
    last = run(connect(endpoint), [Request(HELLO, 9, logprobs=1)])[0].last
    assert (last.finish_reason, last.fault) == ("error", "engine")
    assert last.message.startswith(f"{endpoint.url}/completions: ")
    assert words in last.message
    assert last.message.isprintable()
    assert len(last.message) < 500
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "answer",
    [
        [plain(400, '{"error": {"message": "too long", "code": 400}}')],
        [plain(422, '{"error": {"message": "too long"}}')],
        [STREAM, b'data: {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}\n\n', DONE],
        [STREAM, b'data: {"error": {"message": "too long", "type": "invalid_request_error"}}\n\n', DONE],
    ],
)
def test_what_the_endpoint_blames_the_request_for(answer: list, connect: Connect) -> None:
    """A refusal by status or within the stream is the request's fault, and final."""
    endpoint = ScriptedEndpoint([answer])
    last = run(connect(endpoint), [Request(HELLO, 9)])[0].last
    assert (last.finish_reason, last.fault, len(endpoint.bodies)) == ("error", "request", 1)
    assert "too long" in last.message


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_trouble_is_waited_out(status: int, connect: Connect) -> None:
    """As long as the endpoint says (0 s here, where our own wait would outlast the test), and then asked again."""
    busy = [plain(status, "<html>", "Retry-After: 0", kind="text/html")]
    dated = [plain(status, "", "Retry-After: Thu, 01 Jan 2015 00:00:00 GMT")]
    endpoint = ScriptedEndpoint([busy, dated, WHOLE])
    outcome = run(connect(endpoint, backoff_seconds=1000.0, longest_wait_seconds=1000.0), [Request(HELLO, 9)])[0]
    assert (outcome.ids, len(endpoint.bodies)) == (AB, 3)


def test_a_wait_that_is_too_long_is_not_begun(connect: Connect) -> None:
    """The request ends at once, with the wait that was asked for in its message."""
    endpoint = ScriptedEndpoint([[plain(429, "", "Retry-After: 3600")]])
    last = run(connect(endpoint), [Request(HELLO, 9)])[0].last
    assert (last.finish_reason, len(endpoint.bodies)) == ("error", 1)
    assert "3600 s" in last.message


# ------------------------------------------------------------------------------------------------- vLLM's own ways


def test_vllm_s_stream_is_read(connect: Connect) -> None:
    """As its source writes it: the drawn token comes first among alternatives, -9999 is no chance, a rounding
    above 0 is certainty, several at once."""
    logprobs = {
        "text_offset": [0, 1],
        "tokens": ["token_id:65", "token_id:66"],
        "token_logprobs": [-3.0, 1e-3],
        "top_logprobs": [
            {"token_id:65": -3.0, "token_id:70": -0.5, "token_id:71": -1.0},
            {"token_id:66": 1e-3, "token_id:72": -9999.0},
        ],
    }
    first = event(65, 66, logprobs=logprobs, prompt_token_ids=HELLO, stop_reason=None)
    nothing = {"text_offset": [], "tokens": [], "token_logprobs": [], "top_logprobs": []}
    separators = event(65, logprobs=DRAWN | {"text_offset": [2]}, text="\u2028 \x85 \x0b")
    last = event(finish="length", logprobs=nothing)
    endpoint = ScriptedEndpoint([[STREAM, first, separators, last, usage(3), DONE]])
    outcome = run(connect(endpoint), [Request(HELLO, 9, logprobs=2, cache_salt="s", stop=("zz",))])[0]
    assert [(found.logprob, found.top) for found in outcome.logprobs[:2]] == [
        (-3.0, [(70, -0.5), (71, -1.0)]),
        (0.0, [(66, 0.0), (72, float("-inf"))]),
    ]
    assert (outcome.ids, outcome.last.finish_reason, outcome.last.usage.cached) == ([65, 66, 65], "length", 3)
    assert endpoint.bodies == [
        {
            "model": "m", "prompt": HELLO, "max_tokens": 9, "stop": ["zz"], "logprobs": 2, "cache_salt": "s",
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, "stream": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True, "return_tokens_as_token_ids": True,
        }
    ]  # fmt: skip


def test_thoughts_and_their_stop_strings_are_read_here(connect: Connect) -> None:
    """A stop string in thoughts is none, and one in the answer ends it, although vLLM is not told of it and goes on."""
    ids = [*b"a", OPEN, *b"stop", OPEN + 1, *b"yes stop"]
    endpoint = ScriptedEndpoint([[STREAM, *(event(token) for token in ids[:-1]), event(ids[-1], *b" no"), HANG]])
    request = Request(HELLO, 99, stop=("stop",), thinking=Thinking(budget=5))
    outcome = run(connect(endpoint, TAGGED), [request])[0]
    assert (outcome.text("thinking"), outcome.text(), outcome.last.finish_reason) == ("stop", "ayes ", "stop")
    assert outcome.ids == ids
    assert outcome.last.usage.reasoning == 6
    assert "stop" not in endpoint.bodies[0]
    assert endpoint.bodies[0]["thinking_token_budget"] == 5


@pytest.mark.parametrize(
    ("kind", "said"),
    [("json_schema", "json"), ("regex", "regex"), ("grammar", "grammar"), ("json_object", "json_object")],
)
def test_constraints_have_vllm_s_form(kind: str, said: str, connect: Connect) -> None:
    """Each kind is the member of `structured_outputs` that vLLM and `fathom serve` read."""
    endpoint = ScriptedEndpoint()
    run(connect(endpoint), [Request(HELLO, 9, constraint=Constraint(kind=kind, text="x"))])
    assert endpoint.bodies[0]["structured_outputs"] == {said: True if kind == "json_object" else "x"}


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (Request([], 9), "prompt"),
        (Request(HELLO * 103, 9), "context is 512"),
        (Request(["a"], 9), "prompt"),
        (Request(HELLO, 0), "max_tokens"),
        (Request(HELLO, 9, logprobs=-1), "logprobs"),
        (Request(HELLO, 9, Sampling(temperature=0.7), logprobs=0, tempered_logprobs=True), "tempered_logprobs"),
        (Request(HELLO, 9, stop=("",)), "stop"),
        (Request(HELLO, 9, Sampling(logit_bias={1: 200.0})), "logit_bias"),
        (Request(HELLO, 9, thinking=Thinking(minimum=3)), "thinking.minimum"),
        (Request(HELLO, 9, constraint=Constraint(kind="json_object")), "constraint"),
    ],
)
def test_what_no_endpoint_could_do_is_refused_at_once(request_: Request, word: str, connect: Connect) -> None:
    """Nothing is sent, and the sentence names the field."""
    endpoint = ScriptedEndpoint()
    engine = connect(endpoint, TAGGED)
    with pytest.raises(UserError, match=word):
        submit(engine, request_)
    assert not endpoint.bodies
    assert engine.statistics().waiting == 0


def test_thoughts_need_tags(connect: Connect) -> None:
    """Bounds on thoughts are refused where the vocabulary has no tags, and where our service could not see them."""
    with pytest.raises(UserError, match="think tags"):
        submit(connect(ScriptedEndpoint()), Request(HELLO, 9, thinking=Thinking(budget=3)))
    spelled = byte_vocabulary(template="<think></think>")
    ours = plain(200, json.dumps({"data": [VLLM | {"owned_by": "fathom"}]}))
    engine = connect(ScriptedEndpoint(models=ours), spelled)
    with pytest.raises(UserError, match="starts_thinking"):
        submit(engine, Request(HELLO, 9, starts_thinking=True, thinking=Thinking(budget=3)))


# ----------------------------------------------------------------------------------------------------------- set-up


def models(*found: dict) -> bytes:
    return plain(200, json.dumps({"object": "list", "data": list(found)}))


@pytest.mark.parametrize(
    ("answer", "settings", "words"),
    [
        (models(), {}, "it has none"),
        (models(VLLM, VLLM | {"id": "n"}), {}, r"a recipe endpoint_model\); it has 'm', 'n'"),
        (models(VLLM), {"model": "mm"}, r"no model 'mm' \(did you mean 'm'\?\)"),
        (models({"id": "m"}), {}, "max_model_len"),
        (plain(200, "<html>", kind="text/html"), {}, "cannot be read"),
        (plain(404, ""), {}, "HTTP 404"),
        (plain(503, ""), {}, "tried 4 times"),
        (plain(301, "", "Location: /"), {}, "redirects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_endpoint_that_cannot_be_used_is_said_in_setting_up(answer: bytes, settings: dict, words: str) -> None:
    """One line names the address and what is missing, and no thread is left behind."""
    before = {thread for thread in threading.enumerate() if thread.name == "fathom-remote-engine"}
    with serving(ScriptedEndpoint(models=answer)) as endpoint:
        with pytest.raises(UserError, match=words) as refusal:
            RemoteEngine(RemoteSettings(url=endpoint.url, **QUICK, **settings), PLAIN)
        assert str(refusal.value).startswith(f"{endpoint.url}/models: ")
    assert before == {thread for thread in threading.enumerate() if thread.name == "fathom-remote-engine"}


def test_the_model_and_its_context_can_be_given(connect: Connect) -> None:
    """One of several models is chosen by name, and a context that nobody tells is taken from the settings."""
    endpoint = ScriptedEndpoint(models=models(VLLM, {"id": "adapter", "owned_by": "vllm"}))
    engine = connect(endpoint, model="adapter", context=100)
    assert engine.context == 100
    run(engine, [Request(HELLO, 1000)])
    assert (endpoint.bodies[0]["model"], endpoint.bodies[0]["max_tokens"]) == ("adapter", 95)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://host/v1",
        "http://",
        "http://user:sk-1@host/v1",
        "http://h/v1?a=1",
        "http://h:x/",
        "http://xn--/v1",
        "http://h/\x7f",
    ],
)
def test_addresses_that_cannot_be_meant(url: str) -> None:
    """They are refused without being repeated, since there may be a password in them."""
    with pytest.raises(UserError, match=r"^url \(in a recipe endpoint\): ") as refusal:
        RemoteEngine(RemoteSettings(url=url), PLAIN)
    assert "sk-1" not in str(refusal.value)


def test_nobody_there() -> None:
    """An address where nothing listens is said after the tries that were asked for."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free_port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"http://127.0.0.1:{free_port}/v1/models: nobody answers there.*tried 2 times"):
        RemoteEngine(RemoteSettings(url=f"http://127.0.0.1:{free_port}", backoff_seconds=0.01, retries=1), PLAIN)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without httpx, the sentence says what to install."""
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r"pip install 'fathom-lm\[remote\]'"):
        RemoteEngine(RemoteSettings(url="http://127.0.0.1:1"), PLAIN)
