"""Failures as the error object that OpenAI's clients read, under DeepSeek's status codes.

400 a body that cannot be read or a prompt that does not fit · 401 no valid key · 403 a foreign host ·
404 no such model or path · 405 wrong method · 413 body too large · 422 a parameter that cannot be served ·
429 a key's own limit · 500 our mistake · 503 overloaded or shutting down. 402 (balance) is never used: nothing here
costs money.
"""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fathom.errors import UserError, nearest

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "overloaded_error"}
_FOREIGN = {
    "functions": "tools",
    "function_call": "tool_choice",
    "thinking.budget_tokens": "thinking_budget",
    "reasoning": "reasoning_effort",
    "repeat_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "stop_sequences": "stop",
}
"""What other programs call a parameter of ours."""
ALIKE = 0.75
"""How alike a word and a known one must be for a guess: what other programs understand is no misspelling of ours."""
_PLAIN = {
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "none_required": "must be null",
    "too_short": "must not be empty",
}
"""pydantic's kinds of error whose messages speak of Python."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class ApiError(Exception):
    """A request that is answered with an error object. `message` is one sentence for the client's author."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


def refused(error: UserError, param: str | None = None) -> ApiError:
    """A `UserError` of the library, which says what a parameter's matter is, as a 422."""
    return ApiError(422, str(error), code="invalid_parameter", param=param)


def explain(cls: type[BaseModel], error: ValidationError, value: Any) -> ApiError:
    """The first thing wrong with `value`, a body of form `cls`; an unknown parameter names the one that was meant."""
    errors = error.errors(include_url=False, include_context=False)
    # Of a value that may have several forms, each form complains: the one that understood most is the one meant.
    same = [found for found in errors if found["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same, key=lambda found: len(_place(value, found)))
    path = _place(value, first)
    shown = ".".join(str(part)[:100] for part in path)
    if first["type"] == "extra_forbidden":
        known = sorted(_field_names(cls) if len(path) > 1 else _names(cls))
        word = str(path[-1])[:100]
        guess = f" (did you mean '{_FOREIGN[shown]}'?)" if shown in _FOREIGN else nearest(word, known, cutoff=ALIKE)
        return ApiError(422, f"unknown parameter '{shown}'{guess}", code="unknown_parameter", param=shown)
    if first["type"] == "missing":
        return ApiError(422, f"'{shown}' is missing", code="missing_parameter", param=shown)
    reasons = dict.fromkeys(_reason(found) for found in same if _place(value, found) == path)
    reason = " or ".join([next(iter(reasons)), *(other.removeprefix("must be ") for other in list(reasons)[1:])])
    if not path:
        return ApiError(422, reason, code="invalid_parameter")
    given = "" if isinstance(first["input"], dict | list) else f" = {_SHORT.repr(first['input'])}"
    return ApiError(422, f"'{shown}'{given}: {reason}", code="invalid_parameter", param=shown)


def _place(value: Any, error: ErrorDetails) -> list[int | str]:
    """Where in `value` the error is: its `loc` without the names that pydantic gives to the forms of a union."""
    place: list[int | str] = []
    for part in error["loc"]:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
            place.append(part)
    return [*place, error["loc"][-1]] if error["type"] == "missing" else place


def _reason(error: ErrorDetails) -> str:
    said = error["msg"].removeprefix("Value error, ")
    return _PLAIN.get(error["type"]) or re.sub(r"^\w+ should", "must", said)


def _names(cls: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in cls.model_fields.items()]


def _field_names(cls: type[BaseModel]) -> set[str]:
    """Every name in the schema of `cls`, whatever object it belongs to."""
    schema = cls.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    return {name for part in objects for name in part.get("properties", {})}
