"""The answers' forms, for the OpenAPI document, and the document itself."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fathom.serve.errors import ErrorObject
from fathom.serve.schema import ChatForm, CompletionForm

_FAILURES = {
    400: "The body cannot be read, or the prompt does not fit.",
    401: "No valid API key.",
    403: "The request is for a host that is not this service.",
    404: "No such model.",
    413: "The body is too large.",
    422: "A parameter is unknown or cannot be served.",
    429: "This key's limit is reached.",
    500: "The server made a mistake.",
    503: "The server is overloaded or shutting down.",
}
_SUMMARY = "A language model in the form of OpenAI's API, with DeepSeek's additions."
_OF_GET = (401, 403, 500)


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    context: int
    """Longest prompt and answer together, in tokens."""
    max_model_len: int
    """The same, as vLLM calls it."""
    thinking: bool
    """It has think tags, so the dial of thinking works."""
    tools: bool
    """Its chat template shows tools to it."""
    chat: bool
    """It has a chat template."""
    fim: bool
    """It fills gaps: `suffix` works."""


class ModelList(BaseModel):
    """The models that are served."""

    object: str
    data: list[Model]


class Health(BaseModel):
    """Whether requests are taken."""

    status: str
    """`ok` or `draining`."""


class Version(BaseModel):
    """The program that answers."""

    version: str


def post(form: type[BaseModel], summary: str) -> dict[str, Any]:
    """Route settings of an endpoint that reads `form` by itself."""
    body = {"required": True, "content": {"application/json": {"schema": _reference(form)}}}
    streamed = {"text/event-stream": {"schema": {"type": "string"}}, "application/json": {"schema": {"type": "object"}}}
    return {
        "summary": summary,
        "openapi_extra": {"requestBody": body},
        "responses": {200: {"description": "The answer, or its stream.", "content": streamed}, **_failures(_FAILURES)},
        "response_model": None,
    }


def get(model: type[BaseModel], summary: str) -> dict[str, Any]:
    """Route settings of an endpoint that answers with `model`."""
    return {"summary": summary, "response_model": model, "responses": _failures(_OF_GET)}


def install(app: FastAPI, *, version: str, with_keys: bool) -> None:
    """Make `app.openapi` the document with the request forms in it."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title="Fathom", version=version, summary=_SUMMARY, routes=app.routes)
            forms = [(ChatForm, "validation"), (CompletionForm, "validation")]
            _, definitions = models_json_schema(forms, ref_template=_TEMPLATE)
            made.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            if with_keys:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


_TEMPLATE = "#/components/schemas/{model}"


def _reference(form: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _TEMPLATE.format(model=form.__name__)}


def _failures(codes: Any) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorObject, "description": _FAILURES[code]} for code in codes}
