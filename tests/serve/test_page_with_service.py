"""The chat page as the real service sends it, with a scripted engine behind: that the two agree on every word."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="the page's tests need selenium: pip install selenium")

import uvicorn

from fathom.data import Tokenizer
from fathom.serve.app import create_app
from fathom.serve.settings import ServiceSettings
from tests.serve.browser import CHROMIUM, DRIVER, Browser
from tests.serve.fake_engine import STALL, FakeEngine

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="the page's tests need Chromium and its driver: apt-get install chromium chromium-driver",
)


@contextmanager
def running(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[str]:
    """The address of a service on a free port."""
    app = create_app(engine, tokenizer, ServiceSettings(names=("m",)))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def test_page_and_service_agree(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every file arrives, thoughts and answer show, every setting is accepted, stop cancels in the engine."""
    said = (("thinking", "Let me see."), "The answer is $", "x^2", "$.")
    engine = FakeEngine(scripts=(said, said, ("half", STALL)))
    page = Browser(tmp_path)
    try:
        with running(engine, tokenizer) as address:
            page.visit(address)
            page.click("#settings")
            for name, value in {"system": "Be brief.", "temperature": "0.5", "maxTokens": "64", "budget": "9"}.items():
                page.find(f"#setting-{name}").send_keys(value)
            page.click("#settings-dialog [type=submit]")
            page.ask("first")
            assert page.text(".problem p") == ""
            assert page.text(".thoughts .prose") == "Let me see."
            assert page.all(".answer-text math")
            assert "4 tokens (1 of thought)" in page.text(".figures")
            page.click("#think")
            page.ask("second")
            assert [request.thinking.budget for request in engine.requests] == [9, 0]
            page.write("third")
            page.wait(lambda: page.text(".answer-text") == "half")
            page.click("#send")
            page.settled()
            assert engine.ended.wait(10)
            assert page.complaints() == []
    finally:
        page.driver.quit()
