"""Reading a request's body: bounded, in time, and only JSON that means the same to everyone."""

import asyncio
import json
import math
from collections import Counter
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from fathom.serve.errors import ApiError, explain
from fathom.serve.settings import ServiceSettings

_DEEPEST = 64
"""Objects within objects; deeper ones would exhaust the stack of whoever walks them later."""
_MOST_MEMBERS = 4096
"""Of one object; each unknown one would become an error of its own, which is costly by the million."""

Form = TypeVar("Form", bound=BaseModel)


async def read_body(request: Request, form: type[Form], settings: ServiceSettings) -> Form:
    """The body as `form`. Raises `ApiError`: 400 unreadable, 413 too large, 422 wrong in content.

    A body without `Content-Length` is counted while it arrives, so that no more than the limit is ever held. The type
    must be `application/json`: browsers send any other across origins without asking, and a web page that its user
    happens to visit must not be able to use a server on loopback.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type is '{kind[:60]}'; send JSON with 'Content-Type: application/json'"
        raise ApiError(400, message, code="invalid_content_type")
    try:
        async with asyncio.timeout(settings.body_seconds):
            data = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        message = f"the body did not arrive within {settings.body_seconds:g} seconds"
        raise ApiError(400, message, code="body_timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the connection closed before the body had arrived", code="incomplete_body") from None
    # Megabytes take a while, in which other clients are served.
    return await asyncio.to_thread(_parse, data, form)


def parse_json(data: bytes) -> Any:
    """The value of a JSON text. Raises `ApiError` (400) where readers of JSON would not agree, or could be harmed."""
    try:
        return strict_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        message = f"the body is not valid UTF-8 (byte {error.start})"
        raise ApiError(400, message, code="invalid_utf8") from None
    except json.JSONDecodeError as error:
        message = f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise ApiError(400, message, code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body's JSON is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # ours, and Python's for numbers of thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def strict_json(text: str) -> Any:
    """The value of a JSON text that means the same to everyone. Raises `ValueError` and `RecursionError`."""
    value = json.loads(text, object_pairs_hook=_members)
    _check(value)
    return value


def _parse(data: bytes, form: type[Form]) -> Form:
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return form.model_validate(value)
    except ValidationError as error:
        raise explain(form, error, value) from None


async def _read(request: Request, limit: int) -> bytes:
    message = f"the body is larger than {limit} bytes"
    too_large = ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise too_large
    return bytes(data)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"an object has the member {max(names, key=lambda name: names[name])[:60]!a} twice")
    return members


def _check(value: Any) -> None:
    """Refuse what `json` lets pass: endless nesting, numbers that are not finite, halves of surrogate pairs."""
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if len(item) > _MOST_MEMBERS:
                    raise ValueError(f"an object has more than {_MOST_MEMBERS} members")
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number is not finite")
            elif isinstance(item, str) and not item.isascii():
                _check_characters(item)
        level, depth = below, depth + 1


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a surrogate pair, which is no character") from None
