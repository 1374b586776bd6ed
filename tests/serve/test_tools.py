"""Calls are found in text in every form, however it is cut, and what is no call stays text."""

import json

import pytest

from fathom.data import Tokenizer
from fathom.engine.constraint import GrammarCompiler
from fathom.serve.tools import Call, ToolReader, call_grammar, tool_form
from tests.serve.templates import HERMES, LLAMA, with_template

V3 = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
V3_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31_CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
ONE, TWO = '{"q": "ü ``` <x>"}', '{"n": [1, {"a": null}]}'

WELL_FORMED = [
    ("deepseek_v3", "Hm.", V3.format(V3_CALL.format("f", ONE) + "\n" + V3_CALL.format("g", TWO))),
    ("deepseek_v31", "Hm.", V3.format(V31_CALL.format("f", ONE) + V31_CALL.format("g", TWO))),
    (
        "hermes",
        "Hm.",
        f'<tool_call>\n{{"name": "f", "arguments": {ONE}}}\n</tool_call>'
        f'<tool_call>{{"name": "g", "arguments": {TWO}}}</tool_call>',
    ),
    ("llama", "", f'{{"name": "f", "parameters": {ONE}}}'),
    ("llama", "", f'<|python_tag|>{{"name": "f", "parameters": {ONE}}}'),
]


def read(form: str, text: str, size: int) -> list[str | Call]:
    reader = ToolReader(form, ["f", "g"])
    pieces = [piece for start in range(0, len(text), size) for piece in reader.push(text[start : start + size])]
    return pieces + reader.finish()


def split(pieces: list[str | Call]) -> tuple[str, list[tuple[str, object]]]:
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [(piece.name, json.loads(piece.arguments)) for piece in pieces if isinstance(piece, Call)]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("form", "before", "calls"), WELL_FORMED)
def test_calls_are_found_however_the_text_is_cut(form: str, before: str, calls: str, size: int) -> None:
    """Text before a call comes through, and each call is whole, with a name and arguments as they were meant."""
    text, found = split(read(form, before + calls, size))
    assert text == before
    expected = [("f", json.loads(ONE)), ("g", json.loads(TWO))]
    assert found == (expected[:1] if form == "llama" else expected)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "a < b <tool and <tool_cal"),
        ("hermes", "<tool_call>{</tool_call>"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call> so'),
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>"),
        ("hermes", "<tool_call>" + "[" * 5000 + "</tool_call>"),
        ("llama", '{"name": "f"'),
        ("llama", '{"answer": 4}'),
        ("llama", 'It is {"name": "f", "parameters": {}}'),
        ("deepseek_v3", V3.format(V31_CALL.format("f", ONE))),
        ("deepseek_v31", V3.format(V3_CALL.format("f", ONE))),
        ("deepseek_v3", V3.format("noise" + V3_CALL.format("f", ONE))),
        ("deepseek_v3", V3.format("")),
    ],
)
def test_what_is_no_call_stays_text(form: str, text: str, size: int) -> None:
    """Malformed and unclosed calls, and calls of functions that were not offered, lose no character."""
    assert split(read(form, text, size)) == (text, [])


def test_text_is_not_held_back_without_need() -> None:
    """What cannot begin a call is handed out at once."""
    reader = ToolReader("hermes", ["f"])
    assert reader.push("hello <") == ["hello "]
    assert reader.push("b> there") == ["<b> there"]
    llama = ToolReader("llama", ["f"])
    assert llama.push("hello") == ["hello"]
    assert llama.push(' {"a"') == [' {"a"']


def test_the_form_is_the_template_s() -> None:
    """Each family's template is known by what it writes itself."""
    v31 = "{{ '<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments }}"
    assert tool_form(v31) == "deepseek_v31"
    assert tool_form(v31 + "'```json'") == "deepseek_v3"
    assert tool_form(HERMES) == "hermes"
    assert tool_form(LLAMA) == "llama"
    assert tool_form("{{ messages }}") is None


@pytest.mark.parametrize(
    ("form", "call"),
    [
        ("deepseek_v3", V3.format(V3_CALL)),
        ("deepseek_v31", V3.format(V31_CALL)),
        ("hermes", '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'),
        ("llama", '{{"name": "{}", "parameters": {}}}'),
    ],
)
def test_a_required_call_is_what_the_grammar_allows(tokenizer: Tokenizer, form: str, call: str) -> None:
    """Each form's grammar takes a well-formed call of an offered function and nothing else; what it takes is parsed."""
    pytest.importorskip("llguidance")
    chatty = with_template(tokenizer, HERMES)
    compiler = GrammarCompiler(chatty, chatty.vocab_size)
    functions = [{"name": name, "parameters": {"type": "object"}} for name in ("f", "g")]

    added = chatty.backend.get_added_tokens_decoder()
    markers = {token.content: number for number, token in added.items()}

    def allowed(text: str) -> bool:
        matcher = compiler.start(call_grammar(form, functions, markers))
        for token in chatty.encode(text, special=True):
            if not matcher.mask()[token]:
                return False
            matcher.advance(token)
        return bool(matcher.mask()[chatty.eos_token_ids[0]])

    for arguments in (ONE, TWO, "{}", '{"a": [-1.5e3, "\\n", true]}'):
        assert allowed(call.format("g", arguments))
        assert split(read(form, call.format("g", arguments), 1000)) == ("", [("g", json.loads(arguments))])
    for name, arguments in (("h", "{}"), ("f", "[]"), ("f", '{"a": }'), ("f", "{")):
        assert not allowed(call.format(name, arguments))
    assert not allowed("Hm. " + call.format("f", "{}"))
