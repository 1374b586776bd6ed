"""What is wrong with a request is told in the documented error object and code, and the service lives on."""

import json
from collections.abc import Callable, Iterator

import pytest
from starlette.testclient import TestClient

from fathom.data import Tokenizer
from fathom.errors import UserError
from tests.serve.fake_engine import FakeEngine
from tests.serve.templates import HERMES, with_template

PATH = "/v1/chat/completions"
Serve = Callable[..., TestClient]
JSON = {"content-type": "application/json"}
HELLO = '{"model": "m", "messages": [{"role": "user", "content": "hi"}]'


def refusal(answer) -> tuple[int, str | None, str | None]:
    """(status, code, param); asserts the form of the error object."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in answer.text
    return answer.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b"null", 400, "invalid_json"),
        (b'{"model": "\xff\xfe"}', 400, "invalid_utf8"),
        (b"\xef\xbb\xbf{}", 400, "invalid_json"),
        (HELLO.encode() + b', "temperature": NaN}', 400, "invalid_json"),
        (HELLO.encode() + b', "temperature": 1e999}', 400, "invalid_json"),
        (HELLO.encode() + b', "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (HELLO.encode() + b', "seed": ' + b"9" * 500 + b"}", 422, "invalid_parameter"),
        (HELLO.encode() + b', "max_tokens": 1e2}', 422, "invalid_parameter"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (HELLO.encode() + b', "guided_json": ' + b'{"a":' * 70 + b"1" + b"}" * 71, 400, "invalid_json"),
        (b"{" + b",".join(b'"%d": 1' % place for place in range(5000)) + b"}", 400, "invalid_json"),
        (b'{"model": "\\ud800"}', 400, "invalid_json"),
        (b'{"\\udfff": 1}', 400, "invalid_json"),
        (HELLO.encode() + b', "seed": 1, "seed": 2}', 400, "invalid_json"),
        (HELLO.encode() + b', "metadata": {"a": 1, "\\u0061": 1}}', 400, "invalid_json"),
    ],
)
def test_bodies_that_cannot_be_read(serve: Serve, body: bytes, status: int, code: str) -> None:
    """Broken JSON, broken UTF-8, numbers beyond numbers and endless nesting."""
    client = serve(FakeEngine())
    assert refusal(client.post(PATH, content=body, headers=JSON))[:2] == (status, code)
    assert client.post(PATH, content=HELLO + "}", headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "prefix": True}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 65}, "n"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_parameters_that_cannot_be_served(serve: Serve, ask: dict, given: dict, param: str) -> None:
    """A 422 that names the parameter."""
    assert refusal(serve(FakeEngine()).post(PATH, json=ask | given)) == (422, "invalid_parameter", param)


@pytest.mark.parametrize(
    "given",
    [
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"٣": 1}},
        {"logit_bias": {"1": 101}},
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"n": 3, "best_of": 2},
        {"best_of": 2, "stream": True},
        {"top_logprobs": 2},
        {"max_tokens": 1, "max_completion_tokens": 2},
        {"stream_options": {"include_usage": True}},
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        {"tool_choice": "required"},
    ],
)
def test_parameters_that_contradict_each_other(serve: Serve, ask: dict, given: dict) -> None:
    """A 422 with a sentence."""
    assert refusal(serve(FakeEngine()).post(PATH, json=ask | given))[:2] == (422, "invalid_parameter")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stop": 5}, "'stop' = 5: must be a text or a list"),
        ({"stop": [5]}, "'stop.0' = 5: must be a text"),
        ({"thinking": "on"}, "'thinking' = 'on': must be an object"),
        ({"tool_choice": 5}, "'tool_choice' = 5: must be 'none', 'auto' or 'required' or an object"),
        ({"tool_choice": {"type": "function"}}, "'tool_choice.function' is missing"),
        ({"messages": [5]}, "'messages.0' = 5: must be an object"),
        ({"messages": []}, "'messages': must not be empty"),
        ({"temperature": 3}, "'temperature' = 3: must be less than or equal to 2"),
    ],
)
def test_sentences_know_nothing_of_python(serve: Serve, ask: dict, given: dict, said: str) -> None:
    """What is wrong is said of the JSON that was sent: no classes, no names of types in the place."""
    assert serve(FakeEngine()).post(PATH, json=ask | given).json()["error"]["message"] == said


@pytest.mark.parametrize("foreign", ["foo", "id_slot", "timestamp", "stop_token_ids"])
def test_no_guess_is_better_than_a_wild_one(serve: Serve, ask: dict, foreign: str) -> None:
    """A parameter that other programs have and nothing here is like gets no suggestion."""
    message = serve(FakeEngine()).post(PATH, json=ask | {foreign: 1}).json()["error"]["message"]
    assert message == f"unknown parameter '{foreign}'"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"functions": []}, "tools"),
        ({"repeat_penalty": 1.1}, "repetition_penalty"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking_budget"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort"),
    ],
)
def test_what_others_call_ours(serve: Serve, ask: dict, given: dict, meant: str) -> None:
    """A parameter under another program's name is refused with ours."""
    answer = serve(FakeEngine()).post(PATH, json=ask | given)
    assert refusal(answer)[:2] == (422, "unknown_parameter")
    assert answer.json()["error"]["message"].endswith(f"(did you mean '{meant}'?)")


def test_unknown_parameters_name_the_nearest(serve: Serve, ask: dict) -> None:
    """At any depth, a typo is told with what was probably meant."""
    client = serve(FakeEngine())
    for given, param, meant in (
        ({"max_token": 5}, "max_token", "max_tokens"),
        ({"messages": [{"role": "user", "contnt": "x"}]}, "messages.0.contnt", "content"),
        ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge", "include_usage"),
    ):
        answer = client.post(PATH, json=ask | given)
        assert refusal(answer) == (422, "unknown_parameter", param)
        assert f"did you mean '{meant}'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"prompt": []}, 422),
        ({"prompt": ""}, 200),
        ({"prompt": [[]]}, 422),
        ({"prompt": [-1]}, 422),
        ({"prompt": [10**6]}, 422),
        ({"prompt": [1, "a"]}, 422),
        ({"prompt": ["a"] * 65}, 422),
        ({"prompt": "a", "echo": True, "logprobs": 1}, 422),
        ({"prompt": [1], "suffix": "x"}, 422),
        ({"prompt": None}, 422),
        ({}, 422),
    ],
)
def test_prompts_that_are_none(serve: Serve, given: dict, status: int) -> None:
    """Empty, foreign or mixed prompts of /v1/completions are a 422 (an empty text is still behind BOS)."""
    assert serve(FakeEngine()).post("/v1/completions", json={"model": "m", **given}).status_code == status


def test_a_prompt_over_the_context(serve: Serve, ask: dict) -> None:
    """400 with OpenAI's code; one token below, the answer has one token's room."""
    engine = FakeEngine()
    client = serve(engine)
    client.post(PATH, json=ask)
    length = len(engine.requests[0].prompt_ids)
    engine.context = length
    assert refusal(client.post(PATH, json=ask)) == (400, "context_length_exceeded", "messages")
    engine.context = length + 1
    assert client.post(PATH, json=ask | {"max_tokens": 50}).status_code == 200
    assert engine.requests[-1].max_tokens == 1


def test_refusals_are_short(serve: Serve, ask: dict) -> None:
    """However long and however wrong a body is, one short sentence comes back."""
    client = serve(FakeEngine())
    for given in ({"x" * 10**6: 1}, {"model": "x" * 10**6}, {"messages": [0] * 10**6}, {"stop": ["x" * 2000] * 1000}):
        answer = client.post(PATH, json=ask | given)
        assert refusal(answer)[0] in (404, 422)
        assert len(answer.content) < 1000


def test_what_is_not_there(serve: Serve, ask: dict) -> None:
    """Unknown models and paths are 404, wrong methods 405, each with the error object."""
    client = serve(FakeEngine(), names=("quickstart",))
    answer = client.post(PATH, json=ask | {"model": "quickstrat"})
    assert refusal(answer) == (404, "model_not_found", "model")
    assert "did you mean 'quickstart'" in answer.json()["error"]["message"]
    nothing = client.get("/v1/nothing")
    assert refusal(nothing)[:2] == (404, "not_found")
    said = "'/v1/nothing' is not served here; there are /v1/chat/completions, /v1/completions, /v1/models, /health"
    assert nothing.json()["error"]["message"] == f"{said}, /metrics"
    assert refusal(client.post("/v1/nothing"))[0] == 404
    assert refusal(client.get(PATH))[0] == 405
    assert refusal(client.delete("/health"))[0] == 405
    assert refusal(client.get("/js/../../app.py"))[0] == 404
    assert refusal(client.get("/js/%2e%2e/%2e%2e/app.py"))[0] == 404


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(serve: Serve, kind: str) -> None:
    """A type that browsers send across origins unasked is refused, so that no web page can use a local service."""
    answer = serve(FakeEngine()).post(PATH, content=HELLO + "}", headers={"content-type": kind})
    assert refusal(answer)[:2] == (400, "invalid_content_type")


def test_large_bodies_are_never_held(serve: Serve) -> None:
    """Over the limit is a 413, whether declared or only counted, and reading stops there."""
    client = serve(FakeEngine(), max_body_bytes=1000)
    assert refusal(client.post(PATH, content=b" " * 1001, headers=JSON))[:2] == (413, "body_too_large")
    assert refusal(client.post(PATH, content=b" " * 1000, headers=JSON))[0] == 400

    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    assert refusal(client.post(PATH, content=endless(), headers=JSON))[:2] == (413, "body_too_large")


def test_a_grammar_that_gives_up_is_the_client_s_fault(serve: Serve, ask: dict) -> None:
    """An answer that its constraint does not let go on is a 422 with the reason, streamed too."""
    client = serve(FakeEngine([["a", UserError("constraint: the answer cannot go on")]]))
    answer = client.post(PATH, json=ask | {"guided_grammar": "x"})
    assert refusal(answer)[:2] == (422, "invalid_parameter")
    assert answer.json()["error"]["message"] == "constraint: the answer cannot go on"
    assert '"code":"invalid_parameter"' in client.post(PATH, json=ask | {"stream": True}).text


@pytest.mark.parametrize(
    "name",
    ["self", "template", "variables", "args", "kwargs", "extra", "source", "context", "loop", "a b", "", "range"],
)
def test_template_variables_of_any_name(serve: Serve, ask: dict, name: str) -> None:
    """A variable that is called like a parameter of ours is one for the template all the same."""
    engine = FakeEngine()
    assert serve(engine).post(PATH, json=ask | {"chat_template_kwargs": {name: "x"}}).status_code == 200
    with_it, without = (serve(engine).post(PATH, json=ask) and engine.requests[place] for place in (0, -1))
    assert with_it.prompt_ids == without.prompt_ids


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token"]
)
def test_template_variables_that_are_the_service_s(serve: Serve, ask: dict, name: str) -> None:
    """What a conversation itself decides cannot be set beside it."""
    answer = serve(FakeEngine()).post(PATH, json=ask | {"chat_template_kwargs": {name: "x"}})
    assert refusal(answer) == (422, "invalid_parameter", "chat_template_kwargs")


def test_mistakes_in_a_plain_completion_name_its_parameter(serve: Serve) -> None:
    """There are no messages to be wrong."""
    engine = FakeEngine(context=4)
    client = serve(engine)
    long = client.post("/v1/completions", json={"prompt": [5] * 4})
    assert refusal(long) == (400, "context_length_exceeded", "prompt")


def test_several_keys_are_refused(serve: Serve) -> None:
    """A right key beside another is none: which of them counts is nothing to guess about."""
    client = serve(FakeEngine(), api_keys=("sk",))
    headers = [("authorization", "Bearer sk"), ("authorization", "Bearer other")]
    for path in ("/v1/models", "/v1/models/m"):
        assert client.get(path, headers=headers[:1]).status_code == 200
        assert refusal(client.get(path, headers=headers))[:2] == (401, "invalid_api_key")


def test_what_the_engine_refuses(serve: Serve, ask: dict) -> None:
    """Its sentence is a 422, a full queue a 503 that says when to come back, a failure a 500 without insides."""
    refusing = serve(FakeEngine(refuse=UserError("the grammar has no start rule")))
    assert refusing.post(PATH, json=ask | {"guided_grammar": "x"}).json()["error"]["message"].startswith("the grammar")
    engine = FakeEngine(full_after=1)
    full = serve(engine).post(PATH, json=ask | {"n": 3})
    assert refusal(full)[:2] == (503, "overloaded")
    assert int(full.headers["retry-after"]) >= 1
    assert engine.tickets[0].cancelled.is_set()
    failing = serve(FakeEngine([["a", RuntimeError("out of memory")]]))
    assert refusal(failing.post(PATH, json=ask))[0] == 500
    streamed = failing.post(PATH, json=ask | {"stream": True}).text
    assert '"error":' in streamed
    assert streamed.endswith("data: [DONE]\n\n")


def test_our_own_mistakes_are_a_500_without_insides(serve: Serve, ask: dict) -> None:
    """An exception that nobody foresaw is told as a mistake of the server, and nothing of it leaks."""

    class Broken(FakeEngine):
        def submit(self, request, deliver):
            raise ZeroDivisionError("inner secret")

    client = serve(Broken(), concurrent_requests=1)
    for _ in range(2):
        answer = client.post(PATH, json=ask)
        assert refusal(answer)[0] == 500
        assert "secret" not in answer.text
        assert answer.headers["x-frame-options"] == "DENY"
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "arguments",
    ["{", "", "[]", "5", "null", '"{}"', '{"a": NaN}', '{"a": 1e999}', '"\\ud800"', '{"a": 1, "a": 2}', "[" * 9999],
)
def test_arguments_that_are_no_json(serve: Serve, tokenizer: Tokenizer, ask: dict, arguments: str) -> None:
    """A template that needs a call's arguments as an object gets one, or the client a 422."""
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    messages = [*ask["messages"], {"role": "assistant", "tool_calls": [call]}]
    client = serve(FakeEngine(), of=with_template(tokenizer, HERMES))
    assert refusal(client.post(PATH, json=ask | {"messages": messages})) == (422, "invalid_parameter", "messages")


def test_models_without_a_chat_template_refuse_to_chat(serve: Serve, tokenizer: Tokenizer, ask: dict) -> None:
    """A 422 that says so; completions still work."""
    client = serve(FakeEngine(), of=with_template(tokenizer, None))
    assert "no chat template" in client.post(PATH, json=ask).json()["error"]["message"]
    assert client.post("/v1/completions", json={"model": "m", "prompt": "a"}).status_code == 200


def test_the_document_is_json(serve: Serve) -> None:
    """The OpenAPI document has every endpoint, and its references lead somewhere."""
    document = serve(FakeEngine()).get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/health",
        "/metrics",
        "/version",
    }
    references = {text.split('"')[0] for text in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert references <= set(document["components"]["schemas"])
