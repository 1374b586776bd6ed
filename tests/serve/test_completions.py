"""What /v1/completions understands, and the form of its answers."""

import json
from collections.abc import Callable

from starlette.testclient import TestClient

from fathom.data import Tokenizer, train_bpe
from fathom.engine.protocol import Thinking
from tests.data.texts import text_of
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_chat import events

PATH = "/v1/completions"
Serve = Callable[..., TestClient]
ASK = {"model": "m", "prompt": "abc"}


def test_prompts_in_every_form(serve: Serve, tokenizer: Tokenizer) -> None:
    """A text begins with BOS and has no control tokens, ids are taken as they are, and lists are answered in order."""
    engine = FakeEngine([["a"], ["b"], ["c"], ["d"]])
    client = serve(engine)
    choices = client.post(PATH, json=ASK | {"prompt": ["x</think>", "y"], "n": 2}).json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert engine.requests[0].prompt_ids == [0, *tokenizer.encode("x</think>")]
    assert engine.requests[2].prompt_ids == [0, *tokenizer.encode("y")]
    client.post(PATH, json=ASK | {"prompt": [4, 5]})
    client.post(PATH, json=ASK | {"prompt": [[4, 5], [6]]})
    assert [request.prompt_ids for request in engine.requests[4:]] == [[4, 5], [4, 5], [6]]
    assert engine.requests[4].max_tokens == 16


def test_gaps_are_filled(serve: Serve, tokenizer: Tokenizer) -> None:
    """With `suffix` the prompt has the model's FIM markers; a vocabulary without them refuses."""
    engine = FakeEngine()
    answer = serve(engine).post("/beta/completions", json=ASK | {"suffix": "<｜fim▁end｜>z"})
    assert answer.status_code == 200
    begin, hole, end = tokenizer.fim
    plain = tokenizer.encode
    assert engine.requests[0].prompt_ids == [0, begin, *plain("abc"), hole, *plain("<｜fim▁end｜>z"), end]
    other = train_bpe([text_of(1, 50)], 300)
    definition = json.loads(other.backend.to_str().replace("fim", "mif"))
    other.backend = type(other.backend).from_str(json.dumps(definition))
    refusal = serve(FakeEngine(), of=other).post(PATH, json=ASK | {"suffix": "z"})
    assert (refusal.status_code, "fill-in-the-middle" in refusal.json()["error"]["message"]) == (422, True)


def test_echo_and_thoughts_stand_in_the_text(serve: Serve, tokenizer: Tokenizer) -> None:
    """The prompt comes first when asked for, and thoughts stand between the model's tags, streamed or not."""
    client = serve(FakeEngine([["x", ("thinking", "hm"), ("thinking", "m"), "y"]]))
    whole = client.post(PATH, json=ASK | {"echo": True}).json()["choices"][0]["text"]
    assert whole == "abcx<think>hmm</think>y"
    told = events(client.post(PATH, json=ASK | {"echo": True, "stream": True}).text)
    assert "".join(event["choices"][0]["text"] for event in told) == whole
    assert told[-1]["choices"][0]["finish_reason"] == "stop"
    engine = FakeEngine([[("thinking", "hm"), "y"]])
    opened = {"prompt": [8, *tokenizer.encode("<think>x", special=True)]}
    assert serve(engine).post(PATH, json=ASK | opened).json()["choices"][0]["text"] == "hm</think>y"
    assert engine.requests[0].starts_thinking


def test_log_probabilities_are_parallel_lists(serve: Serve) -> None:
    """Each list has one entry a token, and offsets count characters of the tokens before."""
    choice = serve(FakeEngine([["a", "b", "c"]])).post(PATH, json=ASK | {"logprobs": 2}).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {3}
    assert logprobs["text_offset"] == [0, 1, 2]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


def test_best_of_votes_within_each_prompt(serve: Serve) -> None:
    """The majority is taken prompt by prompt."""
    engine = FakeEngine([["1"], ["2"], ["2"], ["3"], ["3"], ["4"]])
    choices = serve(engine).post(PATH, json=ASK | {"prompt": ["a", "b"], "best_of": 3}).json()["choices"]
    assert [(choice["index"], choice["text"], choice["votes"]) for choice in choices] == [(0, "2", 2), (1, "3", 2)]


def test_token_ids_are_told_when_asked_for(serve: Serve) -> None:
    """Each choice has the ids of its prompt and of its tokens, whole or streamed, and otherwise there are none."""
    script = [["a", ("thinking", "hm"), ""]]
    wanted = ASK | {"prompt": [[4, 5], [6]], "return_token_ids": True}
    whole = serve(FakeEngine(script)).post(PATH, json=wanted).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in whole] == [[4, 5], [6]]
    assert [choice["token_ids"] for choice in whole] == [[20, 20, 20]] * 2
    told = events(serve(FakeEngine(script)).post(PATH, json=wanted | {"stream": True}).text)
    for place, prompt in enumerate([[4, 5], [6]]):
        mine = [choice for event in told if (choice := event["choices"][0])["index"] == place]
        assert [choice.get("prompt_token_ids") for choice in mine] == [prompt, None, None, None]
        assert [choice["token_ids"] for choice in mine] == [[20], [20], [20], []]
    assert "token_ids" not in json.dumps(serve(FakeEngine(script)).post(PATH, json=ASK).json())


def test_log_probabilities_name_tokens_by_id_when_asked_to(serve: Serve, tokenizer: Tokenizer) -> None:
    """Tokens and alternatives are `token_id:17`, and offsets still count characters of the text."""
    asked = ASK | {"logprobs": 2, "return_tokens_as_token_ids": True}
    logprobs = serve(FakeEngine([["a", "b"]])).post(PATH, json=asked).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:20"] * 2
    assert list(logprobs["top_logprobs"][0]) == ["token_id:20", "token_id:21"]
    assert logprobs["text_offset"] == [0, len(tokenizer.pieces[20])]


def test_bounds_on_thoughts_reach_the_engine(serve: Serve) -> None:
    """Both names of the budget and the least number; what contradicts itself is refused."""
    engine = FakeEngine()
    client = serve(engine)
    for given in ({"thinking_budget": 9}, {"thinking_token_budget": 9, "min_thinking_budget": 3}, {}):
        assert client.post(PATH, json=ASK | given).status_code == 200
    bounds = [request.thinking for request in engine.requests]
    assert bounds == [Thinking(budget=9), Thinking(budget=9, minimum=3), None]
    refusal = client.post(PATH, json=ASK | {"thinking_budget": 9, "thinking_token_budget": 8})
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (422, "thinking_budget")
