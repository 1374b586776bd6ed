"""Tool calls: found in a model's text again, in the form that its chat template teaches, or asked for by a grammar.

| form | a call |
|---|---|
| DeepSeek V3, R1 | `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a fenced JSON block, `<｜tool▁call▁end｜>` |
| DeepSeek V3.1 | `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>` |
| Hermes, Qwen | `<tool_call>{"name": …, "arguments": {…}}</tool_call>` |
| Llama | the whole answer is `{"name": …, "parameters": {…}}` |

What does not parse, or calls a function that was not offered, is given back as the text it is.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fathom.engine.protocol import Constraint

Form = Literal["deepseek_v3", "deepseek_v31", "hermes", "llama"]
_OPEN = "<｜tool▁calls▁begin｜>"
_CLOSE = "<｜tool▁calls▁end｜>"
_CALL = re.compile(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>\s*", re.DOTALL)
_FENCED = re.compile(r"([^\n]+)\n```(?:json)?\n(.*?)\n?```\s*", re.DOTALL)
_PYTHON_TAG = "<|python_tag|>"
_TAGS: dict[str, tuple[str, str]] = {
    "deepseek_v3": (_OPEN, _CLOSE),
    "deepseek_v31": (_OPEN, _CLOSE),
    "hermes": ("<tool_call>", "</tool_call>"),
}


@dataclass(frozen=True)
class Call:
    """A function that the model wants called."""

    name: str
    arguments: str
    """A JSON object."""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_json(self) -> dict[str, Any]:
        """As it stands in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def tool_form(template: str) -> Form | None:
    """The form that a chat template teaches; None where it is none that is known here."""
    if "<｜tool▁call▁begin｜>" in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    if "<tool_call>" in template and "</tool_call>" in template:
        return "hermes"
    return "llama" if _PYTHON_TAG in template or '"parameters":' in template else None


class ToolReader:
    """Splits an answer, as it arrives, into text and calls. A call is handed out when it is complete."""

    def __init__(self, form: Form, names: Sequence[str]) -> None:
        self._form = form
        self._names = tuple(names)  # no set: what a model calls a name may be of any type
        self._held = ""
        self._text_came = False

    def push(self, text: str) -> list[str | Call]:
        """What `text` completes."""
        self._held += text
        if self._form == "llama":
            return self._push_llama()
        opening, closing = _TAGS[self._form]
        found: list[str | Call] = []
        while (start := self._held.find(opening)) >= 0:
            end = self._held.find(closing, start)
            if end < 0:
                break
            end += len(closing)
            calls = self._parse(self._held[start + len(opening) : end - len(closing)])
            found += [self._held[:start], *(calls or [self._held[start:end]])]
            self._held = self._held[end:]
        if start < 0:
            start = len(self._held) - _overlap(self._held, opening)
        found.append(self._held[:start])
        self._held = self._held[start:]
        return [piece for piece in found if piece]

    def finish(self) -> list[str | Call]:
        """What is left at the end; a call that never closed is text."""
        held, self._held = self._held, ""
        calls = self._parse(held.strip().removeprefix(_PYTHON_TAG)) if self._form == "llama" else None
        return [*calls] if calls else [held] if held else []

    def _push_llama(self) -> list[str | Call]:
        """The form has no end, so what begins like a call is held until the answer ends."""
        begun = self._held.lstrip()
        like_a_call = begun.startswith("{") or _PYTHON_TAG.startswith(begun[: len(_PYTHON_TAG)])
        if like_a_call and not self._text_came:
            return []
        self._text_came = True
        text, self._held = self._held, ""
        return [text] if text else []

    def _parse(self, body: str) -> list[Call] | None:
        """The calls in `body`, or None when any of it is malformed."""
        if self._form in ("hermes", "llama"):
            value = _object(body)
            key = "arguments" if self._form == "hermes" else "parameters"
            pairs = [(value.get("name"), value.get(key))] if value else []
        else:
            pairs = [self._deepseek_pair(*found.groups()) for found in _CALL.finditer(body)]
            if _CALL.sub("", body).strip():
                return None
        if not pairs or any(name not in self._names or not isinstance(given, dict) for name, given in pairs):
            return None
        return [Call(name, json.dumps(given, ensure_ascii=False)) for name, given in pairs]

    def _deepseek_pair(self, head: str, tail: str) -> tuple[str | None, dict[str, Any] | None]:
        if self._form == "deepseek_v31":
            return head.strip(), _object(tail)
        fenced = _FENCED.fullmatch(tail)
        return (fenced[1].strip(), _object(fenced[2])) if fenced and head.strip() == "function" else (None, None)


def call_grammar(form: Form, functions: Sequence[dict[str, Any]], markers: Mapping[str, int]) -> Constraint:
    """A constraint under which the answer is one call of one of `functions` (OpenAI's form: name, parameters).

    `markers` are the vocabulary's added tokens: a grammar names them by their ids, since their spelling is other text.
    Llama's form is JSON as a whole, so arguments follow the function's schema. In the others they are any JSON object:
    grammars cannot hold schemas.
    """
    if form == "llama":
        schemas = [_call_schema(function) for function in functions]
        return Constraint(kind="json_schema", text=json.dumps({"anyOf": schemas}, ensure_ascii=False))
    before, between, after = _AROUND[form]
    names = " | ".join(_quoted(function["name"]) for function in functions)
    before, between, after = (_with_tokens(text, markers) for text in (before, between, after))
    start = f"start: {before} name {between} object {after}\nname: {names}\n"
    return Constraint(kind="grammar", text=start + _JSON_OBJECT)


_AROUND = {
    "hermes": ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    "deepseek_v3": (
        f"{_OPEN}<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        "\n```json\n",
        f"\n```<｜tool▁call▁end｜>{_CLOSE}",
    ),
    "deepseek_v31": (f"{_OPEN}<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", f"<｜tool▁call▁end｜>{_CLOSE}"),
}
"""What a call has before its name, between name and arguments, and after them."""

_JSON_OBJECT = r"""
object: "{" SPACE? (pair ("," SPACE? pair)*)? SPACE? "}"
pair: STRING ":" SPACE? value
array: "[" SPACE? (value ("," SPACE? value)*)? SPACE? "]"
value: object | array | STRING | NUMBER | "true" | "false" | "null"
STRING: /"([^"\\\x00-\x1f]|\\(["\\\/bfnrt]|u[0-9a-fA-F]{4}))*"/
NUMBER: /-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?/
SPACE: /[ \n]{1,16}/
"""


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    properties = {"name": {"const": function["name"]}, "parameters": function.get("parameters") or {"type": "object"}}
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _with_tokens(text: str, markers: Mapping[str, int]) -> str:
    pieces = [piece for piece in re.split(r"(</?tool_call>|<｜[^｜]*｜>)", text) if piece]
    return " ".join(f"<[{markers[piece]}]>" if piece in markers else _quoted(piece) for piece in pieces)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs can be read, but not sent
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` begin `tag`."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
