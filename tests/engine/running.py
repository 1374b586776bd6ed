"""Engines over small random models, and requests that are waited for."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fathom.config import ModelConfig
from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import BuiltinTicket, Engine, EngineSettings
from fathom.engine.protocol import Chunk, Request, Sampling, TokenLogprob
from fathom.model.paged import PagedCache
from fathom.model.transformer import Transformer
from tests.engine.vocabularies import byte_vocabulary
from tests.model.configs import QWEN3, V3

TAGGED = byte_vocabulary(tags=True)
"""259 tokens: bytes, <eos> 256, <think> 257, </think> 258."""
OPEN, CLOSE = 257, 258
PLAIN = byte_vocabulary()
GREEDY = Sampling(temperature=0.0)
CONTEXT = 512

MLA = V3.replace(
    vocab_size=259, max_position_embeddings=CONTEXT, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=8, q_lora_rank=16, hidden_size=32, intermediate_size=48,
)  # fmt: skip
GQA = QWEN3.replace(
    vocab_size=259, max_position_embeddings=CONTEXT, num_hidden_layers=2, head_dim=32, hidden_size=32,
    intermediate_size=48, tie_word_embeddings=False,
)  # fmt: skip
CONFIGS = {"mla": MLA, "gqa": GQA}

PATIENCE = 60.0
"""Seconds after which a request that should have ended is a failure."""


@dataclass
class Outcome:
    """What came of a request."""

    chunks: list[Chunk] = field(default_factory=list)
    ticket: BuiltinTicket | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def take(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        if chunk.finish_reason is not None:
            self.ended.set()

    def wait(self) -> "Outcome":
        assert self.ended.wait(PATIENCE), f"not ended: {self.chunks}"
        return self

    @property
    def ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def last(self) -> Chunk:
        return self.chunks[-1]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [found for chunk in self.chunks for found in chunk.logprobs or []]

    def text(self, part: str = "answer") -> str:
        return "".join(chunk.text for chunk in self.chunks if chunk.part == part)


@contextlib.contextmanager
def engine_of(model: Transformer, tokenizer: Tokenizer = TAGGED, **settings: object) -> Iterator[Engine]:
    """An engine that is idle, and holds no page, when the test is done with it."""
    engine = Engine(model, tokenizer, EngineSettings(**{"cache_memory": 2**22, **settings}))  # type: ignore[arg-type]
    try:
        yield engine
        assert_idle(engine)
    finally:
        engine.close()


def assert_idle(engine: Engine) -> None:
    """Everybody has ended: nobody runs or waits, and no page is held."""
    levels = engine.statistics()
    for _ in range(int(PATIENCE / 0.01)):
        levels = engine.statistics()
        if not levels.running and not levels.waiting and not levels.cache_blocks_used:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{levels=}")


def memory_for(config: ModelConfig, pages: int, *, mtp_layers: int = 0) -> int:
    """Bytes of `cache_memory` that hold so many pages in float32."""
    return PagedCache(config, pages=pages, dtype=torch.float32, mtp_layers=mtp_layers).nbytes()


def submit(engine: Engine, request: Request) -> Outcome:
    outcome = Outcome()
    outcome.ticket = engine.submit(request, outcome.take)
    return outcome


def run(engine: Engine, requests: Sequence[Request]) -> list[Outcome]:
    """All at once; returns when all have ended."""
    outcomes = [submit(engine, request) for request in requests]
    return [outcome.wait() for outcome in outcomes]


def at_once(engine: Engine, requests: Sequence[Request]) -> list[Outcome]:
    """All at once, and none of them ends before the engine knows of the last; returns when all have ended.

    The engine is held up by another request, of one token.
    """
    gate = threading.Event()
    engine.submit(ask([0], 1), lambda _: gate.wait(PATIENCE) and None)
    try:
        outcomes = [submit(engine, request) for request in requests]
    finally:
        gate.set()
    return [outcome.wait() for outcome in outcomes]


def alone(engine: Engine, requests: Sequence[Request]) -> list[Outcome]:
    """One after another."""
    return [submit(engine, request).wait() for request in requests]


def ask(prompt: Sequence[int], max_tokens: int = 20, sampling: Sampling = GREEDY, **more: object) -> Request:
    """A request that does not end by chance."""
    return Request(list(prompt), max_tokens, sampling, **{"ignore_eos": True, **more})  # type: ignore[arg-type]
