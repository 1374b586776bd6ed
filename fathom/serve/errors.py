"""Failures as the error object that OpenAI's clients read, under DeepSeek's status codes.

400 a body that cannot be read or a prompt that does not fit · 401 no valid key · 404 no such model or path ·
405 wrong method · 413 body too large · 422 a parameter that cannot be served · 429 a key's own limit ·
500 our mistake · 503 overloaded or shutting down. 402 (balance) is never used: nothing here costs money.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from fathom.errors import UserError, nearest

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "overloaded_error"}
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


def explain(cls: type[BaseModel], error: ValidationError) -> ApiError:
    """The first thing wrong with a body of form `cls`; an unknown parameter names the nearest known one."""
    first = error.errors()[0]
    path = ".".join(str(part)[:100] for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _field_names(cls) if len(first["loc"]) > 1 else set(_names(cls))
        message = f"unknown parameter '{path}'{nearest(str(first['loc'][-1])[:100], sorted(known))}"
        return ApiError(422, message, code="unknown_parameter", param=path)
    if first["type"] == "missing":
        return ApiError(422, f"'{path}' is missing", code="missing_parameter", param=path)
    reason = first["msg"].removeprefix("Value error, ")
    if not path:
        return ApiError(422, reason, code="invalid_parameter")
    value = "" if isinstance(first["input"], dict | list) else f" = {_SHORT.repr(first['input'])}"
    return ApiError(422, f"'{path}'{value}: {reason}", code="invalid_parameter", param=path)


def _names(cls: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in cls.model_fields.items()]


def _field_names(cls: type[BaseModel]) -> set[str]:
    """Every name in the schema of `cls`, whatever object it belongs to."""
    schema = cls.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    return {name for part in objects for name in part.get("properties", {})}
