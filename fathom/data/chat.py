"""Chat templates: how a list of messages becomes the one string a model was trained on.

Templates are Jinja programs that come with a model folder, written by strangers. They run in Jinja's immutable
sandbox, with the few names that `transformers` gives them, so that the same template renders the same string.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from fathom.errors import UserError

OPENING, CLOSING = "<think>", "</think>"
"""What stands around thoughts."""

# Names under which programs pass the reasoning of a message; templates read the first (and gpt-oss the second).
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """`messages` (dicts with `role` and `content`) through a Jinja chat template, in which `variables` have values.

    As in `transformers`, keys whose value is None are left out, and a message's reasoning is found under each
    of its customary names. Raises `UserError` when the template is broken or refuses the messages.
    """
    if not messages:
        raise UserError("chat: no messages; give at least one")
    try:
        # One mapping, not keywords: a variable may be called like a parameter (`self`).
        return _compile(template).render({**variables, "messages": [_message(m) for m in messages]})
    except Exception as error:  # a template is a stranger's program: it can fail in any way
        raise UserError(f"chat template: {_one_line(error)}; check the messages' roles and contents") from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING_FIELDS if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks an assistant's words for training masks; here it is inert."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and sorts keys, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
