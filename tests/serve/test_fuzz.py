"""Schemathesis makes requests from the service's own OpenAPI document, valid and not."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from fathom.data import Tokenizer
from fathom.serve.app import create_app
from fathom.serve.settings import ServiceSettings
from tests.serve.fake_engine import FakeEngine


def test_no_request_is_answered_with_a_server_error(tokenizer: Tokenizer) -> None:
    """Whatever a body, path or header holds, the answer is no 500, and every refusal is the error object."""
    engine = FakeEngine([[("thinking", "t"), "a"]])
    app = create_app(engine, tokenizer, ServiceSettings(names=("m",)))
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    for result in document.get_all_operations():
        operation = result.ok()

        @seed(0)
        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]), known=st.booleans())
        def holds(case, known: bool) -> None:
            if known and isinstance(case.body, dict):
                case.body = {**case.body, "model": "m"}
            answer = case.call()
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400 and case.method != "HEAD":
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        holds()
