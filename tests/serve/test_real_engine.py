"""The service over the built-in engine and a small model with every part of the large ones."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from fathom.data import Tokenizer
from fathom.engine.engine import Engine, EngineSettings
from tests.model.configs import V3, build
from tests.serve.test_server import running

CONTEXT = 192


@pytest.fixture(scope="module")
def service(tokenizer: Tokenizer) -> Iterator[tuple[str, Engine]]:
    """(base URL, engine)"""
    model = build(
        V3.replace(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=CONTEXT,
            hidden_size=64,
            kv_lora_rank=32,
            q_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
            moe_intermediate_size=32,
            num_attention_heads=4,
        )
    )
    engine = Engine(model, tokenizer, EngineSettings(cache_memory=2**22, max_running=8, queue=64))
    with running(engine, tokenizer) as (url, _):
        yield url, engine


def chat(url: str, content: str, **more: object) -> dict:
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "temperature": 0, **more}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_thinking_budget_is_exact(service: tuple[str, Engine]) -> None:
    """Thoughts take as many tokens as allowed, then the answer comes; off leaves none; a minimum is kept."""
    url, _ = service
    for budget in (3, 17):
        bounds = {"thinking_budget": budget, "min_thinking_budget": budget}
        usage = chat(url, "hi", max_tokens=40, ignore_eos=True, **bounds)["usage"]
        assert usage["completion_tokens"] == 40
        # The closing tag counts as reasoning; the opening one stands in the prompt.
        assert usage["completion_tokens_details"]["reasoning_tokens"] == budget + 1
    off = chat(url, "hi", max_tokens=20, thinking={"type": "disabled"})
    assert "reasoning_content" not in off["choices"][0]["message"]


def test_texts_do_not_depend_on_who_else_asks_or_leaves(service: tuple[str, Engine]) -> None:
    """Among many streams, some of which hang up, every completed text is that of its solo run, and nothing leaks."""
    url, engine = service
    questions = [f"question {number}" for number in range(12)]
    alone = [chat(url, question, max_tokens=24)["choices"][0]["message"] for question in questions]
    draw = random.Random(0)

    def leave_early(question: str) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 150}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            for _ in zip(range(draw.randrange(8)), answer.iter_lines(), strict=False):
                pass

    leavers = [threading.Thread(target=leave_early, args=(question,)) for question in questions]
    for leaver in leavers:
        leaver.start()
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda question: chat(url, question, max_tokens=24), questions))
    for leaver in leavers:
        leaver.join()
    assert [answer["choices"][0]["message"] for answer in together] == alone
    assert chat(url, "last", max_tokens=1)["usage"]["completion_tokens"] == 1
    while engine.statistics().running or engine.statistics().waiting:  # those who left last are about to be noticed
        threading.Event().wait(0.01)
    assert engine.statistics().cache_blocks_used == 0
