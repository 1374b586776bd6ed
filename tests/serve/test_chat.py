"""What /v1/chat/completions understands, and the form of its answers."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from fathom.data import Tokenizer
from fathom.engine.protocol import Constraint
from tests.serve.fake_engine import FakeEngine
from tests.serve.templates import HERMES, LLAMA, with_template

PATH = "/v1/chat/completions"
Serve = Callable[..., TestClient]
THOUGHTFUL = [("thinking", "let me "), ("thinking", "see"), "It is ", "4."]


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events; asserts that `[DONE]` ends it."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_thoughts_and_answer_are_apart(serve: Serve, ask: dict) -> None:
    """`reasoning_content` stands beside `content`, and usage accounts for thoughts and for the prompt cache."""
    answer = serve(FakeEngine([THOUGHTFUL])).post(PATH, json=ask).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("let me see", "It is 4.")
    assert answer["choices"][0]["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 2
    assert usage["prompt_cache_hit_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 1
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4


def test_a_stream_says_the_same_as_an_object(serve: Serve, ask: dict) -> None:
    """Deltas add up to the message, thoughts first; usage comes last, without choices, and only when asked for."""
    client = serve(FakeEngine([THOUGHTFUL]))
    told = events(client.post(PATH, json=ask | {"stream": True, "stream_options": {"include_usage": True}}).text)
    deltas = [event["choices"][0]["delta"] for event in told[:-1]]
    assert deltas[0]["role"] == "assistant"
    kinds = [key for delta in deltas[1:] for key in delta]
    assert kinds == ["reasoning_content", "reasoning_content", "content", "content"]
    assert "".join(delta.get("content", "") for delta in deltas) == "It is 4."
    assert told[-1]["choices"] == []
    assert told[-1]["usage"]["completion_tokens"] == 4
    assert all(event["usage"] is None for event in told[:-1])
    assert told[-2]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in event for event in events(client.post(PATH, json=ask | {"stream": True}).text))


def test_parameters_reach_the_engine(serve: Serve, ask: dict) -> None:
    """Every parameter that says something about the text arrives where the engine reads it."""
    engine = FakeEngine()
    given = {
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -100},
        "seed": -1,
        "stop": "x",
        "n": 2,
        "logprobs": True,
        "top_logprobs": 3,
        "cache_salt": "s",
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    }
    assert serve(engine).post(PATH, json=ask | given).status_code == 200
    first, second = engine.requests
    assert first.max_tokens == 7
    assert first.sampling.model_dump() == {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 0,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {5: -100},
        "seed": 2**63 - 1,
    }
    assert second.sampling.seed == 0
    assert first.stop == ("x",)
    assert first.logprobs == 3
    assert first.cache_salt == ":s"
    assert first.constraint == Constraint(kind="json_schema", text='{"type": "object"}')


def test_harmless_parameters_of_openai_s_clients_are_accepted(serve: Serve, ask: dict) -> None:
    """What cannot change the answer is no reason to refuse it."""
    given = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "modalities": ["text"],
        "stop": None,
        "tools": None,
    }
    assert serve(FakeEngine()).post(PATH, json=ask | given).status_code == 200


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"guided_json": {"a": 1}}, "json_schema", '{"a": 1}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_grammar": "start: x"}, "grammar", "start: x"),
        ({"guided_choice": ['"a"', "ü"]}, "grammar", 'start: "\\"a\\"" | "ü"\n'),
        ({"structured_outputs": {"json": {"a": 1}}}, "json_schema", '{"a": 1}'),
        ({"structured_outputs": {"regex": "b"}}, "regex", "b"),
    ],
)
def test_every_dialect_of_constraints(serve: Serve, ask: dict, given: dict, kind: str, text: str) -> None:
    """OpenAI's and both of vLLM's ways to say what the answer must be mean one thing to the engine."""
    engine = FakeEngine()
    assert serve(engine).post(PATH, json=ask | given).status_code == 200
    assert engine.requests[0].constraint == Constraint(kind=kind, text=text)


def test_log_probabilities_follow_the_tokens(serve: Serve, ask: dict) -> None:
    """Each token has one entry, thoughts in a list of their own, and minus infinity is a number that JSON has."""
    client = serve(FakeEngine([[("thinking", "t"), "impossible"]]))
    body = ask | {"logprobs": True, "top_logprobs": 2}
    logprobs = client.post(PATH, json=body).json()["choices"][0]["logprobs"]
    assert [len(logprobs[part]) for part in ("reasoning_content", "content")] == [1, 1]
    entry = logprobs["content"][0]
    assert entry["logprob"] == -9999
    assert bytes(entry["bytes"]).decode() == entry["token"]
    assert len(entry["top_logprobs"]) == 2
    streamed = [event["choices"][0] for event in events(client.post(PATH, json=body | {"stream": True}).text)]
    assert [choice["logprobs"]["content"] for choice in streamed if choice["logprobs"]] == [[], logprobs["content"]]
    assert client.post(PATH, json=ask).json()["choices"][0]["logprobs"] is None


def test_best_of_gives_what_most_agree_with(serve: Serve, ask: dict) -> None:
    """Of several samples the majority's answer comes back, and all of them are accounted for."""
    engine = FakeEngine([["Answer: 5"], ["so it is \\boxed{4.0}"], ["Answer: 4"]])
    answer = serve(engine).post(PATH, json=ask | {"best_of": 3}).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["so it is \\boxed{4.0}"]
    assert answer["choices"][0]["votes"] == 2
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].prompt_ids)
    several = serve(FakeEngine([["a"], ["b"]])).post(PATH, json=ask | {"n": 2}).json()["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in several] == [(0, "a"), (1, "b")]


def test_a_prefix_is_continued(serve: Serve, tokenizer: Tokenizer) -> None:
    """The prompt ends with what the assistant has said, or with its thoughts inside an open tag."""
    engine = FakeEngine()
    client = serve(engine)
    asked = {"role": "user", "content": "hi"}

    def prompt(**last: str) -> str:
        messages = [asked, {"role": "assistant", "prefix": True, **last}]
        assert client.post("/beta/chat/completions", json={"model": "m", "messages": messages}).status_code == 200
        return tokenizer.decode(engine.requests[-1].prompt_ids, skip_special=False)

    assert prompt(content="Dear").endswith("<｜Assistant｜></think>Dear")
    assert not engine.requests[-1].starts_thinking
    assert prompt(content="", reasoning_content="Well").endswith("<｜Assistant｜><think>Well")
    assert engine.requests[-1].starts_thinking
    assert prompt(content="4", reasoning_content="Well").endswith("<think>Well</think>4")
    assert not engine.requests[-1].starts_thinking


def test_earlier_thoughts_are_dropped(serve: Serve, tokenizer: Tokenizer) -> None:
    """`reasoning_content` of earlier turns leaves no trace in the prompt; within a turn of tool calls it stays."""
    engine = FakeEngine()
    chatty = with_template(tokenizer, HERMES)
    client = serve(engine, of=chatty)
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "A", "reasoning_content": "secret", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "R"}
    for messages, shown in (
        ([{"role": "user", "content": "a"}, answer, result], True),
        ([{"role": "user", "content": "a"}, answer, result, {"role": "user", "content": "b"}], False),
    ):
        assert client.post(PATH, json={"model": "m", "messages": messages}).status_code == 200
        assert ("secret" in chatty.decode(engine.requests[-1].prompt_ids, skip_special=False)) is shown


def test_tools_go_in_and_calls_come_out(serve: Serve, tokenizer: Tokenizer, ask: dict) -> None:
    """Tools reach the template, and a call comes back parsed, whole and in a stream, with its finish reason."""
    script = ["Let me look.\n<tool", '_call>\n{"name": "find", "arguments": {"q": "ü"}}\n</tool_', "call>"]
    engine = FakeEngine([script])
    chatty = with_template(tokenizer, HERMES)
    client = serve(engine, of=chatty)
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    choice = client.post(PATH, json=ask | {"tools": [tool]}).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look.\n"
    function = choice["message"]["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("find", {"q": "ü"})
    assert '"name": "find"' in chatty.decode(engine.requests[0].prompt_ids)
    told = events(client.post(PATH, json=ask | {"tools": [tool], "stream": True}).text)
    calls = [call for event in told for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "find")]
    assert not any("<tool" in (event["choices"][0]["delta"].get("content") or "") for event in told)
    again = [*ask["messages"], choice["message"], {"role": "tool", "tool_call_id": "x", "content": "done"}]
    assert client.post(PATH, json={"model": "m", "messages": again, "tools": [tool]}).status_code == 200
    plain = client.post(PATH, json=ask | {"tools": [tool], "tool_choice": "none"}).json()["choices"][0]
    assert plain["message"]["content"] == "".join(script)
    assert '"name": "find"' not in chatty.decode(engine.requests[-1].prompt_ids)


def test_a_call_can_be_required(serve: Serve, tokenizer: Tokenizer, ask: dict) -> None:
    """`tool_choice` required, or naming a function, becomes a grammar; what cannot be required is refused."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("find", "open")]
    engine = FakeEngine()
    client = serve(engine, of=with_template(tokenizer, HERMES))
    assert client.post(PATH, json=ask | {"tools": tools, "tool_choice": "required"}).status_code == 200
    assert "find" in engine.requests[-1].constraint.text
    named = {"type": "function", "function": {"name": "open"}}
    assert client.post(PATH, json=ask | {"tools": tools, "tool_choice": named}).status_code == 200
    assert "find" not in engine.requests[-1].constraint.text
    unknown = named | {"function": {"name": "opne"}}
    answer = client.post(PATH, json=ask | {"tools": tools, "tool_choice": unknown})
    assert (answer.status_code, "did you mean 'open'" in answer.json()["error"]["message"]) == (422, True)
    client = serve(engine, of=with_template(tokenizer, "{{ tools }}"))
    assert client.post(PATH, json=ask | {"tools": tools, "tool_choice": "required"}).status_code == 422
    toolless = serve(engine)
    assert "does not show tools" in toolless.post(PATH, json=ask | {"tools": tools}).json()["error"]["message"]


def test_models_say_what_they_can_do(serve: Serve, tokenizer: Tokenizer) -> None:
    """The list names what a client should offer; each model can be asked for, an unknown one is a 404."""
    client = serve(FakeEngine(), names=("a/b", "c"))
    listed = client.get("/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["a/b", "c"]
    assert (listed[0]["thinking"], listed[0]["tools"], listed[0]["fim"]) == (True, False, True)
    assert client.get("/v1/models/a/b").json() == listed[0]
    assert client.get("/v1/models/x").status_code == 404
    other = serve(FakeEngine(), of=with_template(tokenizer, LLAMA)).get("/v1/models").json()["data"][0]
    assert (other["thinking"], other["tools"]) == (False, True)


def test_token_ids_are_told_when_asked_for(serve: Serve, ask: dict) -> None:
    """The prompt's stand beside the choices (streamed: in the first event), those drawn in each choice; else none."""
    script = [[("thinking", "hm"), "It", ""]]
    engine = FakeEngine(script)
    wanted = ask | {"return_token_ids": True, "n": 2}
    whole = serve(engine).post(PATH, json=wanted).json()
    assert whole["prompt_token_ids"] == engine.requests[0].prompt_ids
    assert [choice["token_ids"] for choice in whole["choices"]] == [[20, 20, 20]] * 2
    told = events(serve(FakeEngine(script)).post(PATH, json=wanted | {"stream": True}).text)
    assert [event.get("prompt_token_ids") for event in told] == [engine.requests[0].prompt_ids] + [None] * (
        len(told) - 1
    )
    for place in range(2):
        mine = [choice for event in told if (choice := event["choices"][0])["index"] == place]
        assert [token for choice in mine for token in choice.get("token_ids", [])] == [20, 20, 20]
        thought = next(choice for choice in mine if "reasoning_content" in choice["delta"])
        assert thought["token_ids"] == [20]
    assert "token_ids" not in json.dumps(serve(FakeEngine(script)).post(PATH, json=ask).json())


def test_log_probabilities_name_tokens_by_id_when_asked_to(serve: Serve, ask: dict) -> None:
    """Tokens and alternatives are `token_id:17`."""
    asked = ask | {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    [entry] = serve(FakeEngine([["a"]])).post(PATH, json=asked).json()["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["top_logprobs"][0]["token"]) == ("token_id:20", "token_id:20")
