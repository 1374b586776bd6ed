"""A service over a scripted engine, in process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from starlette.testclient import TestClient

from fathom.data import Tokenizer, train_bpe
from fathom.serve.app import create_app
from fathom.serve.settings import ServiceSettings
from tests.data.texts import text_of
from tests.serve.fake_engine import FakeEngine


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """DeepSeek's control tokens and format; without tools."""
    return train_bpe((text_of(seed, 100) for seed in range(10)), 400)


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Iterator[Callable[..., TestClient]]:
    """`serve(engine, tokenizer=…, **settings)` gives a client of a new service."""
    with ExitStack() as stack:

        def start(engine: FakeEngine, *, of: Tokenizer = tokenizer, **settings) -> TestClient:
            app = create_app(engine, of, ServiceSettings(**{"names": ("m",), **settings}))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield start


@pytest.fixture
def ask() -> dict:
    """A small chat request."""
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
