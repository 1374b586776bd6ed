"""The service as a real server on loopback, and OpenAI's own client against it."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from fathom.data import Tokenizer
from fathom.engine.protocol import Sampling
from fathom.errors import UserError
from fathom.serve.app import create_app
from fathom.serve.server import Server, announcement, listen, read_keys
from fathom.serve.settings import ServiceSettings
from tests.serve.fake_engine import STALL, FakeEngine
from tests.serve.templates import HERMES, with_template


@contextmanager
def running(engine: FakeEngine, tokenizer: Tokenizer, **settings) -> Iterator[tuple]:
    """(base URL, server) of a service in a thread."""
    app = create_app(engine, tokenizer, ServiceSettings(names=("m",), **settings))
    listener = listen("127.0.0.1", 0)
    server = Server(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def test_openai_s_client_works_unmodified(tokenizer: Tokenizer) -> None:
    """Chat, streams, tools, completions, models and errors, through the library that everyone has."""
    script = [("thinking", "hm"), "Hi ", '<tool_call>{"name": "f", "arguments": {}}</tool_call>']
    with running(FakeEngine([script]), with_template(tokenizer, HERMES), api_keys=("sk",)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0)
        talk = [{"role": "user", "content": "hi"}]
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
        answer = client.chat.completions.create(model="m", messages=talk, tools=tools, logprobs=True, seed=1)
        message = answer.choices[0].message
        assert (message.content, message.reasoning_content) == ("Hi ", "hm")
        assert message.tool_calls[0].function.name == "f"
        assert answer.usage.completion_tokens_details.reasoning_tokens == 1
        talk += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "1"}]
        stream = client.chat.completions.create(
            model="m", messages=talk, stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 5}
        )
        told = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in told if chunk.choices).startswith("Hi ")
        assert told[-1].usage.prompt_tokens > 0
        effort = client.chat.completions.create(
            model="m", messages=talk, reasoning_effort="low", extra_body={"thinking": {"type": "enabled"}}
        )
        assert effort.choices[0].finish_reason == "stop"
        completion = client.completions.create(model="m", prompt=["a", "b"], logprobs=1, max_tokens=4)
        assert len(completion.choices) == 2
        assert len(list(client.completions.create(model="m", prompt="a", stream=True))) > 1
        assert [model.id for model in client.models.list()] == ["m"]
        with pytest.raises(openai.NotFoundError, match="no model 'x'"):
            client.chat.completions.create(model="x", messages=talk)
        with pytest.raises(openai.UnprocessableEntityError) as refusal:
            client.chat.completions.create(model="m", messages=talk, temperature=3)
        assert refusal.value.param == "temperature"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="no").models.list()


def test_a_client_that_hangs_up_is_noticed(tokenizer: Tokenizer) -> None:
    """Over a real connection too, closing it cancels the request."""
    engine = FakeEngine([["a", STALL]])
    with running(engine, tokenizer) as (url, _):
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        assert engine.tickets[0].cancelled.wait(10)


def test_a_body_of_100_mb_is_refused(tokenizer: Tokenizer) -> None:
    """Declared or in pieces, the client reads a 413, and the server answers the next one."""
    with running(FakeEngine(), tokenizer) as (url, _):
        piece = b" " * 2**20
        headers = {"content-type": "application/json"}
        for body in (piece * 100, (piece for _ in range(100))):
            answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=60)
            assert answer.status_code == 413
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_a_signal_drains(tokenizer: Tokenizer) -> None:
    """After SIGTERM health says draining, new requests are refused, and the running one finishes before the end."""
    engine = FakeEngine([["a", STALL, "b"]])
    with running(engine, tokenizer, drain_seconds=30) as (url, server):
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as answer:
            assert engine.stalled.wait(10)
            server.handle_exit(signal.SIGTERM, None)
            assert httpx.get(f"{url}/health").status_code == 503
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 503
            engine.go_on.set()
            text = "".join(answer.iter_text())
        assert '"content":"b"' in text
        assert text.endswith("data: [DONE]\n\n")
    assert engine.closed


def test_a_drain_has_an_end(tokenizer: Tokenizer) -> None:
    """What has not finished in time is cut short, and says so."""
    engine = FakeEngine([["a", STALL]])
    with running(engine, tokenizer, drain_seconds=0.1) as (url, server):
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        threading.Timer(0, lambda: engine.stalled.wait(10) and server.handle_exit(signal.SIGTERM, None)).start()
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
    assert answer["choices"][0]["finish_reason"] == "insufficient_system_resource"


def test_a_process_ends_by_itself(tmp_path: Path) -> None:
    """Told to end by a real signal, the process drains, closes its engine and exits with 0."""
    command = [sys.executable, "-m", "tests.serve.run_fake"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        url = process.stdout.readline().strip()
        body = {"model": "m", "prompt": "hi", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert "first" in next(lines)
            process.send_signal(signal.SIGTERM)
            told = list(lines)
        assert '"finish_reason":"insufficient_system_resource"' in "".join(told)
        assert told[-2:] == ["data: [DONE]", ""]
        assert process.wait(30) == 0
        assert process.stdout.read() == "closed\n"


def test_where_it_listens_is_said() -> None:
    """Names and address; anything but loopback is said, and warned of when there is no key."""
    with listen("127.0.0.1", 0) as listener:
        said = announcement(listener, ServiceSettings(names=("a", "b")))
        assert said[0] == "model name for requests: a, b"
        assert len(said) == 2
        drawn = announcement(listener, ServiceSettings(sampling=Sampling(temperature=0.6)))
        assert drawn[1] == "requests that do not say: temperature 0.6, top_p 1"
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot listen"):
            listen("127.0.0.1", port)
    with listen("0.0.0.0", 0) as listener:
        assert "other machines" in announcement(listener, ServiceSettings(api_keys=("k",)))[-1]
        assert "no API key" in announcement(listener, ServiceSettings())[-1]
    with pytest.raises(UserError, match="cannot listen"):
        listen("no such host.invalid", 1)


def test_keys_come_from_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, environment and a file with comments; a file without keys is a mistake, not an open door."""
    monkeypatch.setenv("FATHOM_API_KEYS", "env1 env2")
    file = tmp_path / "keys"
    file.write_text("# mine\nfile1#2\n\n  # laptop\nenv1\n")
    assert read_keys(["arg"], file) == ("arg", "env1", "env2", "file1#2")
    file.write_text("file1  # laptop\n")
    with pytest.raises(UserError, match="white space"):
        read_keys([], file)
    file.write_text("# none\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys([], file)
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)"):
        read_keys([], tmp_path / "absent")
    with pytest.raises(UserError, match="empty"):
        read_keys([" "], None)
