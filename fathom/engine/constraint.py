"""Constrained output: which tokens may come next so that the answer fits a JSON schema, an expression or a grammar.

The work is done by `llguidance` (MIT; no dependencies; an Earley parser over lexemes that walks a trie of the
vocabulary). Schemas and grammars come from strangers. The library bounds its own lexer and parser; what it does not
bound is bounded here: the length of the text, the depth of recursion over it (a stack of its own), `multipleOf`, whose
automaton has as many states as the numbers together have values, and intersections of expressions, which are compiled
on trial first (`probe.py`).
"""

import functools
import importlib
import json
import math
import secrets
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathom.data.tokenizer import Tokenizer
from fathom.engine.protocol import Constraint, QueueFull
from fathom.errors import UserError

_LONGEST_SCHEMA = 65_536  # bytes
_LONGEST_GRAMMAR = 8_192  # what the library says of a mistake can take quadratic time
_LARGEST_MULTIPLE = 10_000
_INTERSECTING = {"allOf", "pattern", "patternProperties", "multipleOf", "format", "x-guidance"}
"""Keys of schemas that may be compiled to an intersection of expressions."""
_INTERSECTING_SIGNS = ("&", "~", "%")
"""The same in grammars (of directives, some hold grammars of other kinds)."""
_PROBES = 2
_WHITESPACE = r"[ \n\r\t]{1,64}"  # unbounded, a small model can write white space until its tokens end
_STACK_BYTES = 512 * 2**20  # address space, not memory: only what recursion touches becomes real
_COMPILED_KEPT = 32  # of at most about half a gigabyte
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_stack_size = threading.Lock()  # the size is the whole process's setting


class GrammarCompiler:
    """Constraints for one model's vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's: masks have that length. Takes about a second for a large vocabulary.

        Raises `UserError` when `llguidance` is not installed, or cannot use this vocabulary.
        """
        try:
            self._library = importlib.import_module("llguidance")
        except ModuleNotFoundError:
            raise UserError(
                "constraint: constrained output needs llguidance, which is not installed; "
                "pip install 'fathom-lm[constrain]'"
            ) from None
        if not tokenizer.eos_token_ids:
            raise UserError("constraint: this model has no end-of-text token, so a constrained answer could not end")
        self._ends = tokenizer.eos_token_ids
        self._vocab_size = vocab_size
        try:
            self._vocabulary = self._library.LLTokenizer(
                _definition(tokenizer), n_vocab=vocab_size, eos_token=list(self._ends)
            )
        except ValueError as error:
            raise UserError(f"constraint: llguidance cannot use this vocabulary ({_one_line(error)})") from None
        self._limits = self._library.LLParserLimits(**_LIMITS)
        self._probes = threading.BoundedSemaphore(_PROBES)
        self._compiled = functools.lru_cache(maxsize=_COMPILED_KEPT)(self._compile)

    def start(self, constraint: Constraint) -> "Matcher":
        """A matcher before the answer's first token. From any thread; compiles a constraint that is new.

        Raises `UserError` for a constraint that is malformed, unsupported or too large, and `QueueFull` while others
        are being tried out.
        """
        return Matcher(self._compiled(constraint.kind, constraint.text), self._vocab_size, self._ends)

    def _compile(self, kind: str, text: str) -> Any:
        longest = _LONGEST_SCHEMA if kind == "json_schema" else _LONGEST_GRAMMAR
        if len(text.encode(errors="replace")) > longest:
            raise UserError(f"constraint: the {kind} is longer than {longest} bytes; shorten it")
        matcher: list[Any] = []
        failed: list[BaseException] = []

        def compile_and_look() -> None:
            try:
                matcher.append(self._matcher(kind, text))
                matcher[0].compute_bitmask()  # some limits show only here
            except (UserError, ValueError, RuntimeError) as error:
                failed.append(error)

        with _stack_size:
            before = threading.stack_size(_STACK_BYTES)
            try:
                thread = threading.Thread(target=compile_and_look, name="fathom-grammar")
                thread.start()
            finally:
                threading.stack_size(before)
        thread.join()
        if failed and not isinstance(failed[0], ValueError):
            raise failed[0]
        error = failed[0] if failed else matcher[0].get_error()
        if error:
            raise UserError(f"constraint: the {kind} cannot be used ({_one_line(error)}); correct or simplify it")
        return matcher[0]

    def _matcher(self, kind: str, text: str) -> Any:
        library = self._library.LLMatcher
        intersects = False
        if kind == "regex":
            grammar = library.grammar_from_regex(text)
        elif kind == "grammar":
            if "%json" in text:
                raise UserError("constraint: %json inside a grammar is not supported; use a json_schema instead")
            grammar = library.grammar_from_lark(text)
            intersects = any(sign in text for sign in _INTERSECTING_SIGNS)
        else:
            schema = '{"type": "object"}' if kind == "json_object" else text
            intersects = not _INTERSECTING.isdisjoint(_check_schema(schema))
            grammar = library.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        if intersects:
            self._probe(kind, grammar)
        return library(self._vocabulary, grammar, log_level=0, limits=self._limits)

    def _probe(self, kind: str, grammar: str) -> None:
        """Raise `UserError` for a grammar that cannot be compiled within bounds."""
        if not self._probes.acquire(blocking=False):
            raise QueueFull("other constraints like this one are being compiled; try again later")
        try:
            wanted = json.dumps({"grammar": grammar, "limits": _LIMITS, "stack": _STACK_BYTES})
            # -P: beside the program lie modules of ours, whose names are not to be found by what it imports.
            command = [sys.executable, "-P", str(Path(__file__).with_name("probe.py"))]
            ended = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
        finally:
            self._probes.release()
        if ended.returncode < 0:
            raise UserError(f"constraint: the {kind} takes too long or too much memory to compile; simplify it")
        if ended.returncode:
            raise RuntimeError(f"a grammar's trial failed: {_one_line(ended.stderr)}")


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int, ends: tuple[int, ...]) -> None:
        """Use `GrammarCompiler.start`."""
        self._matcher = matcher.deep_copy()
        self._vocab_size = vocab_size
        self._ends = ends

    def mask(self) -> Tensor:
        """bool [vocab_size]: the tokens that may come next, end of text where the answer may end.

        Raises `UserError` when the grammar has become too ambiguous to go on.
        """
        if self.finished:
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
            allowed[list(self._ends)] = True
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_))

    def advance(self, token: int) -> None:
        """Take an allowed `token`. Raises `UserError` when it is not, or when the grammar has become too ambiguous."""
        if token in self._ends and self.finished:
            return
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether only the end of the text can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(
                f"constraint: the answer cannot go on ({_one_line(self._matcher.get_error())}); simplify the grammar"
            )


def _definition(tokenizer: Tokenizer) -> str:
    """`tokenizer.json` of a vocabulary in which no text spells a control token.

    The library tokenizes what a grammar leaves no choice about, and would find them there whatever their flags say.
    """
    definition = json.loads(tokenizer.plain_backend.to_str())
    secret = secrets.token_hex(16)
    names = {}
    for token in definition["added_tokens"]:
        if token["special"]:
            names[token["content"]] = token["content"] = f"<{secret}{token['id']}>"
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, dict):
        definition["model"]["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:  # of pairs with a score
        definition["model"]["vocab"] = [[names.get(piece, piece), *score] for piece, *score in vocabulary]
    return json.dumps(definition)


def _check_schema(text: str) -> set[str]:
    """All keys in a schema. Raises `UserError` for text that is no JSON, and for `multipleOf` that is too large.

    Wherever in a schema they stand, several can be followed at once, and then take a state for each of their remainders
    together: as many as the least common multiple of their digits.
    """
    try:
        left = [json.loads(text)]
    except (ValueError, RecursionError) as error:
        raise UserError(f"constraint: the JSON schema cannot be read ({_one_line(error)})") from None
    keys: set[str] = set()
    states = 1
    while left:
        node = left.pop()
        if isinstance(node, list):
            left.extend(node)
        elif isinstance(node, dict):
            left.extend(node.values())
            keys.update(node)
            number = node.get("multipleOf")
            if isinstance(number, int | float):
                states = math.lcm(states, _digits(number) or 1)
            if states > _LARGEST_MULTIPLE:
                raise UserError(
                    f"constraint: multipleOf {str(number)[:20]} in the JSON schema has too many digits, alone or "
                    f"with others: their least common multiple, without decimal points, may be {_LARGEST_MULTIPLE}"
                )
    return keys


def _digits(number: int | float) -> int:
    """A number without its decimal point: 0.25 is 25, 2.0 is 2."""
    if not math.isfinite(number):
        return 0
    exact = abs(Decimal(str(number)))
    whole = exact == exact.to_integral_value()
    return int(exact) if whole else int("".join(map(str, exact.normalize().as_tuple().digits)))


def _one_line(error: object) -> str:
    line = " ".join(str(error).replace("<non-verbose/>", "").split())
    if line.startswith("NoExtension"):  # the library's name for it
        return "no text fits it"
    return line if len(line) <= 200 else f"{line[:197]}..."
