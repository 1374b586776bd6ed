"""Constrained output: what masks allow, and that no schema, expression or grammar can hang or end the process."""

import contextlib
import json
import random
import re
import sys
import threading

import pytest

from fathom.data import Tokenizer
from fathom.engine.constraint import GrammarCompiler, Matcher
from fathom.engine.protocol import Constraint, QueueFull
from fathom.errors import UserError
from tests.engine.vocabularies import EOS, byte_vocabulary

pytest.importorskip("llguidance", reason="constrained output is optional: pip install 'fathom-lm[constrain]'")

TOKENIZER = byte_vocabulary(b'{"', b'":', b"ab", b'"}', "é".encode(), b"\xe2\x82", tags=True)
SIZE = TOKENIZER.vocab_size + 7
SCHEMA = {
    "type": "object",
    "properties": {"ab": {"type": "integer"}, "kind": {"enum": ["é", "y"]}},
    "required": ["ab", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, SIZE)


def write(matcher: Matcher, dice: random.Random, longest: int = 400) -> str:
    """Any text that the masks allow, ended as soon as it may be."""
    tokens = []
    for _ in range(longest):
        allowed = matcher.mask().nonzero()[:, 0].tolist()
        if EOS in allowed:
            break
        tokens.append(dice.choice(allowed))
        matcher.advance(tokens[-1])
    return b"".join(TOKENIZER.pieces[token] for token in tokens).decode(errors="replace")


@pytest.mark.parametrize("seed", range(8))
def test_a_schema_gives_what_it_describes(compiler: GrammarCompiler, seed: int) -> None:
    """Random allowed tokens make an object with exactly the required keys and types."""
    matcher = compiler.start(Constraint(kind="json_schema", text=json.dumps(SCHEMA)))
    value = json.loads(write(matcher, random.Random(seed)))
    assert set(value) == {"ab", "kind"}
    assert isinstance(value["ab"], int)
    assert value["kind"] in ("é", "y")


def test_expressions_grammars_and_any_object(compiler: GrammarCompiler) -> None:
    """Each kind of constraint is kept: the text matches the expression, is of the grammar, parses as an object."""
    dice = random.Random(0)
    assert re.fullmatch("[a-c]{3}é+", write(compiler.start(Constraint(kind="regex", text="[a-c]{3}é+")), dice))
    text = write(compiler.start(Constraint(kind="grammar", text='start: "(" start ")" | "x" "y"')), dice)
    assert re.fullmatch(r"\(*xy\)*", text)
    assert text.count("(") == text.count(")")
    matcher = compiler.start(Constraint(kind="json_object"))
    assert [chr(t) if t < 256 else t for t in matcher.mask().nonzero()[:, 0].tolist()] == ["{", 257]


def test_control_tokens_are_never_text(compiler: GrammarCompiler) -> None:
    """A grammar that allows any text allows no control token and no id without a token."""
    mask = compiler.start(Constraint(kind="regex", text="(.|\n)+")).mask()
    assert mask.shape == (SIZE,)
    assert mask[ord("a")]
    assert not mask[EOS]
    assert not mask[TOKENIZER.vocab_size - 2 :].any()


@pytest.mark.parametrize("text", ["<think>b", "<eos></think>"])
def test_a_spelled_control_token_is_text(compiler: GrammarCompiler, text: str) -> None:
    """Where a constraint leaves no choice but to spell a control token, ordinary tokens do."""
    matcher = compiler.start(Constraint(kind="regex", text=text))
    tokens = []
    while not matcher.finished:
        tokens += matcher.mask().nonzero()[:1, 0].tolist()
        matcher.advance(tokens[-1])
    assert b"".join(TOKENIZER.pieces[token] for token in tokens) == text.encode()
    assert max(tokens) < EOS


def test_trials_do_not_pile_up(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """While as many constraints are being tried out as may be, another is told to come back."""
    monkeypatch.setattr(compiler, "_probes", threading.BoundedSemaphore(1))
    constraint = Constraint(kind="json_schema", text='{"type": "string", "pattern": "^trial$"}')
    with compiler._probes, pytest.raises(QueueFull, match="try again later"):
        compiler.start(constraint)
    compiler.start(constraint)


def test_a_finished_answer_can_only_end(compiler: GrammarCompiler) -> None:
    """At its end only the end of the text is allowed, and taking it changes nothing."""
    matcher = compiler.start(Constraint(kind="regex", text="a"))
    assert not matcher.finished
    matcher.advance(ord("a"))
    for _ in range(2):
        assert matcher.finished
        assert matcher.mask().nonzero()[:, 0].tolist() == [EOS]
        matcher.advance(EOS)


def test_answers_go_their_own_ways(compiler: GrammarCompiler) -> None:
    """A second answer with the same constraint does not feel what the first one takes."""
    constraint = Constraint(kind="regex", text="ax|by")
    first = compiler.start(constraint)
    second = compiler.start(constraint)
    first.advance(ord("a"))
    second.advance(ord("b"))
    assert second.mask().nonzero()[:, 0].tolist() == [ord("y")]
    assert first.mask().nonzero()[:, 0].tolist() == [ord("x")]


def test_a_token_that_is_not_allowed_is_refused(compiler: GrammarCompiler) -> None:
    """Taking what the mask forbids is an error of one line."""
    matcher = compiler.start(Constraint(kind="regex", text="ab"))
    with pytest.raises(UserError, match="cannot go on"):
        matcher.advance(ord("z"))


def test_our_own_vocabulary_can_be_used(tokenizer: Tokenizer) -> None:
    """A trained tokenizer with many control tokens gives masks of the model's size."""
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size + 64).start(Constraint(kind="json_object"))
    assert {tokenizer.decode([token]).strip()[0] for token in matcher.mask().nonzero()[:, 0].tolist()} == {"{"}


HOSTILE = {
    "not JSON": ("json_schema", "{nonsense"),
    "no schema": ("json_schema", "[]"),
    "unknown type": ("json_schema", '{"type": "nope"}'),
    "unknown file": ("json_schema", '{"$ref": "http://127.0.0.1/x"}'),
    "half an expression": ("regex", "[a-"),
    "unknown rule": ("grammar", "start: foo"),
    "schema in a grammar": ("grammar", 'start: %json {"type": "object"}'),
    "long": ("regex", "a" * 9000),
    "endless reference": ("json_schema", '{"$ref": "#"}'),
    "deep list": ("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000),
    "deep allOf": ("json_schema", '{"allOf":[' * 5000 + "{}" + "]}" * 5000),
    "deep expression": ("regex", "(" * 4000 + "a" + ")" * 4000),
    "deep grammar": ("grammar", "start: " + "(" * 4000 + '"a"' + ")" * 4000),
    "huge multiple": ("json_schema", '{"type": "integer", "multipleOf": 99999989}'),
    "huge decimal multiple": ("json_schema", '{"items": [{"type": "number", "multipleOf": 1234567.0891}]}'),
    "multiples that multiply": (
        "json_schema",
        '{"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}',
    ),
    "multiples behind a reference": (
        "json_schema",
        '{"type": "integer", "multipleOf": 9973, "$ref": "#/$defs/a", "$defs": {"a": {"multipleOf": 9967}}}',
    ),
    "multiples beside each other": (
        "json_schema",
        json.dumps({"anyOf": [{"type": "integer", "multipleOf": 9900 + n} for n in range(50)]}),
    ),
    "patterns that multiply": (
        "json_schema",
        json.dumps({"type": "string", "allOf": [{"pattern": f"a.{{{n}}}b"} for n in range(10, 40)]}),
    ),
    "intersection in a grammar": (
        "grammar",
        "start: A\nA: " + " & ".join(f"/.*a.{{{n}}}b.*/" for n in range(10, 40)),
    ),
    "nothing fits": ("regex", r"[^\s\S]"),
    "product of choices": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"required": [f"a{n}"]}, {"required": [f"b{n}"]}]} for n in range(30)]}),
    ),
    "chain of rules": ("grammar", "\n".join(["start: r0", *(f"r{n}: r{n + 1} r{n + 1}" for n in range(300))])),
}
DEFINITIONS = {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(1500)} | {"1500": {}}
LARGE = {
    "ordinary intersections": (
        "json_schema",
        json.dumps(
            {"anyOf": [{"type": "number", "multipleOf": 0.01}, {"type": "string", "pattern": "a.b", "maxLength": 9}]}
        ),
    ),
    "nested repetition": ("regex", "((a{1,1000}b?){1,1000}c?){1,1000}d"),
    "optional repetition": ("regex", "(a?){100000}a{100000}"),
    "long chain": ("json_schema", json.dumps({"$ref": "#/$defs/0", "$defs": DEFINITIONS})),
    "huge length": ("json_schema", '{"type": "string", "minLength": 1000000000}'),
    "huge list": ("json_schema", '{"type": "array", "minItems": 1000000000}'),
    "exponential automaton": ("regex", "(a|b)*a(a|b){30}"),
    "ambiguous": ("grammar", 'start: a\na: a a | "x" | a a a'),
    "many options": ("regex", "a?" * 4000),
    "wide choice": ("json_schema", json.dumps({"enum": list(range(9000))})),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_compiled_is_one_line(compiler: GrammarCompiler, name: str) -> None:
    """Malformed, endless and explosive constraints are a sentence; the next good one works."""
    kind, text = HOSTILE[name]
    with pytest.raises(UserError) as caught:
        compiler.start(Constraint(kind=kind, text=text))
    assert str(caught.value).startswith("constraint: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    compiler.start(Constraint(kind="regex", text="a"))


@pytest.mark.parametrize("name", LARGE)
def test_large_constraints_work_or_are_refused(compiler: GrammarCompiler, name: str) -> None:
    """What is large but legal gives masks or a sentence, at the start or later, and never ends the process."""
    kind, text = LARGE[name]
    with contextlib.suppress(UserError):
        write(compiler.start(Constraint(kind=kind, text=text)), random.Random(0), longest=30)
    assert write(compiler.start(Constraint(kind="regex", text="a")), random.Random(0)) == "a"


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library the first use is a sentence that names the extra."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'fathom-lm\[constrain\]'"):
        GrammarCompiler(TOKENIZER, SIZE)
