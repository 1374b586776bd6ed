"""Plain data as JSON text and back, types kept: what crosses the sandbox's wall, in both directions.

JSON's own forms stand for None, bool, int, float (with NaN and the infinities as Python's json writes them), str and
list; the other types are an object of one key, the type's name: `{"tuple": [1, 2]}`, `{"dict": [[key, value], …]}`,
`{"bytes": "hex"}`. A subclass is no plain data: it could bring code of its own.
"""

import json
from typing import Any

INTEGER_DIGITS = 4300
"""An integer of more digits does not pass; reading one takes time that grows with their square."""
_TOO_LARGE = 10**INTEGER_DIGITS
_COLLECTIONS = {"tuple": tuple, "set": set, "frozenset": frozenset}


def write(value: Any) -> str:
    """`value` as text. Raises `TypeError` for what is no plain data, `ValueError` for an integer that is too long."""
    return json.dumps(_tag(value))


def read(text: str | bytes) -> Any:
    """What `write` wrote. The text may be anybody's: whatever is wrong with it raises `ValueError`."""
    try:
        return _untag(json.loads(text, parse_int=_integer))
    except (RecursionError, TypeError) as error:  # too deep; a list as a key, an object of other keys
        raise ValueError(f"no plain data: {error}") from None


def _tag(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        if abs(value) >= _TOO_LARGE:
            raise ValueError(f"an integer of more than {INTEGER_DIGITS} digits")
        return value
    if kind is list:
        return [_tag(item) for item in value]
    if kind is dict:
        return {"dict": [[_tag(key), _tag(item)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in _COLLECTIONS.values():
        return {kind.__name__: [_tag(item) for item in value]}
    raise TypeError(f"{kind.__name__} is no plain data")


def _untag(form: Any) -> Any:
    if isinstance(form, list):
        return [_untag(item) for item in form]
    if not isinstance(form, dict):
        return form
    ((name, content),) = form.items()
    if name == "dict":
        return {_untag(key): _untag(item) for key, item in content}
    if name == "bytes":
        return bytes.fromhex(content)
    if name in _COLLECTIONS and isinstance(content, list):
        return _COLLECTIONS[name](_untag(item) for item in content)
    raise ValueError(f"no plain data: an object with the key {name[:20]!r}")


def _integer(digits: str) -> int:
    if len(digits) > INTEGER_DIGITS + 1:  # one for the sign
        raise ValueError(f"an integer of more than {INTEGER_DIGITS} digits")
    return int(digits)
