"""What an honest reader finds in a completion: one thought, one answer, and whether the form was kept.

A policy trained by reward finds every gap between what a rule accepts and what was meant. So one principle decides all:
**the answer counts only where a reader would find exactly one, in the place where an answer belongs, after the
thought.** Two levels follow from it, and only they:

- *Readable*: there is one answer without doubt, though the form may be broken (text between the tags, a second
  `</think>`, the same answer twice). It earns accuracy, so that a model which does not know the form yet has something
  to learn from. No trick gains by this: whatever else was written, one answer was bet on.
- *Well-formed*: the layout was kept to the letter. It earns the format reward.

What is decided by the principle:

- Several different answers are none; the same one twice is readable.
- What stands in the thought is no answer, and a thought that goes on after an answer takes it back: both would be bets.
- A tag is its exact letters. Other case, attributes, spaces, look-alike letters, HTML entities: text that breaks the
  form. An answer that holds a tag or such a look-alike, or characters that are not seen, is none.
- Tags are read as plain text is: a code fence or a comment around them hides nothing, but is text outside the tags.
- Cut off at the token limit: never well-formed. Readable only where the answer is closed by a tag, for anything else
  may have been about to go on.
- A thought is read where there is exactly one and nothing stands before it. Without letter or digit it is empty.

Text that is appended to a well-formed completion can thus only lose it what it has (layouts that have no closing mark,
`rest` and the last line of `line`, take it as part of the answer, as any reader would).

Every step is linear in the completion's length, and no text raises.
"""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass

from fathom.config.rewards import Layout
from fathom.tasks.characters import PerCharacter, compatible, is_mark, is_unseen

LONGEST_ANSWER = 65_536
"""Characters of an answer, at most: what is longer was not written to be read, and could stall a check."""


@dataclass(frozen=True)
class Reading:
    """What was found in one completion."""

    thought: str
    """Without its tags; empty where there is not exactly one."""
    answer: str | None
    """Without its tags and the white space around; None where there is not exactly one."""
    well_formed: bool
    """Whether the layout was kept to the letter."""
    fault: str
    """One short phrase: why there is no answer or else why the form is not kept; empty for a well-formed completion."""


@dataclass(frozen=True)
class _Found:
    """Answers in a stretch of text outside of thoughts."""

    answers: list[str]
    broken: str = ""
    """Why no answer can be taken from this text whatever its `answers`."""
    untidy: str = ""
    """Why the text does not keep the form."""


@dataclass(frozen=True)
class _Split:
    """A completion taken apart at its think tags."""

    thoughts: list[str]
    outside: list[str]
    """The stretches between: first the one before any thought; the last follows the last tag unless `thinking`."""
    thinking: bool
    """Whether the last thought was never closed."""
    astray: bool
    """Whether a tag opened or closed what was open or closed already."""


def read(completion: str, layout: Layout, *, starts_thinking: bool, finished: bool) -> Reading:
    """Read `completion` by the rules on top of this file.

    `starts_thinking`: the prompt ended with an open `<think>`. `finished`: the model ended by itself; False where it
    was cut off at the token limit.
    """
    split = _split(completion, starts_thinking)
    answer, fault, untidy = _answer(split, layout, finished=finished)
    fault = fault or untidy or _form_fault(completion, split, layout, finished=finished)
    one_thought = len(split.thoughts) == 1 and not split.astray and not split.outside[0].strip()
    thought = split.thoughts[0].strip() if one_thought else ""
    return Reading(thought, answer, answer is not None and not fault, fault)


def says_something(text: str) -> bool:
    """Whether there is a letter or digit in it."""
    return any(character.isalnum() for character in text)


def _split(completion: str, thinking: bool) -> _Split:
    first, *rest = re.split(r"(</?think>)", completion)
    thoughts, outside = ([first], [""]) if thinking else ([], [first])
    astray = False
    for tag, text in zip(rest[::2], rest[1::2], strict=True):
        opens = tag == "<think>"
        astray |= opens == thinking
        thinking = opens
        (thoughts if opens else outside).append(text)
    return _Split(thoughts, outside, thinking, astray)


def _answer(split: _Split, layout: Layout, *, finished: bool) -> tuple[str | None, str, str]:
    """The one answer or None, why there is none, and why the text around it does not keep the form."""
    find = _FINDERS[layout.form]
    early = find("\n".join(split.outside if split.thinking else split.outside[:-1]))
    if early.answers or early.broken:
        return None, "an answer before the thought's end", ""
    if split.thinking:
        return None, "the thought is not closed" if finished else "cut off in the thought", ""
    if layout.form == "rest" and layout.thoughts == "required" and len(split.outside) == 1:
        return None, "no thought, so no end of it", ""
    found = find(split.outside[-1])
    if found.broken:
        return None, found.broken, ""
    if not finished and layout.form != "tags":
        return None, "cut off before the end", ""
    different = {answer.strip() for answer in found.answers}
    if len(different) != 1:
        return None, "several answers" if different else "no answer", ""
    (answer,) = different
    if fault := _unreadable(answer, layout):
        return None, fault, ""
    return answer, "", found.untidy or ("the answer is given twice" if len(found.answers) > 1 else "")


def _form_fault(completion: str, split: _Split, layout: Layout, *, finished: bool) -> str:
    """Why a completion whose answer is readable is not well-formed; empty where it is."""
    if not finished:
        return "cut off at the token limit"
    if split.astray or len(split.thoughts) > 1:
        return "think tags that do not pair"
    if split.thoughts and split.outside[0].strip():
        return "text before the thought"
    if layout.thoughts == "required" and not (split.thoughts and says_something(split.thoughts[0])):
        return "the thought is empty" if split.thoughts else "no thought"
    if layout.form == "tags" and any(_ANSWER_TAG.search(thought) for thought in split.thoughts):
        return "an answer tag in the thought"
    if _imitates_tag(_EXACT_TAG[layout.form].sub(" ", completion), layout):
        return "something that looks like a tag"
    return ""


def _unreadable(answer: str, layout: Layout) -> str:
    """Why nobody would take this text for an answer; empty where one would."""
    if not answer:
        return "the answer is empty"
    if len(answer) > LONGEST_ANSWER:
        return "the answer is endless"
    if any(is_unseen(character) for character in set(answer)):
        return "characters in the answer that are not seen"
    if _imitates_tag(answer, layout):
        return "something that looks like a tag in the answer"
    return ""


# --- where each form keeps its answer ---------------------------------------------------------------------------------

_ANSWER_TAG = re.compile(r"</?answer>")
_BOX_MARK = re.compile(r"\\boxed[ \t]*\{|\\.|[{}]", re.DOTALL)
_LINE_MARK = re.compile(r"(?:answer|答案)[ \t]*[:：](.*)", re.IGNORECASE)


def _tagged(text: str) -> _Found:
    pieces = _ANSWER_TAG.split(text)
    tags = _ANSWER_TAG.findall(text)
    if tags != ["<answer>", "</answer>"] * (len(tags) // 2):
        return _Found([], broken="answer tags that do not pair")
    untidy = "text outside the tags" if any(piece.strip() for piece in pieces[::2]) else ""
    return _Found(pieces[1::2], untidy=untidy)


def _boxed(text: str) -> _Found:
    """Boxes at the outermost level; braces pair, and those that LaTeX escapes do not count."""
    answers: list[str] = []
    start, depth = 0, 0
    for mark in _BOX_MARK.finditer(text):
        sign = mark.group()
        if sign.startswith("\\boxed"):
            if depth:
                return _Found(answers, broken="a box in a box")
            start, depth = mark.end(), 1
        elif depth and sign in "{}":
            depth += 1 if sign == "{" else -1
            if not depth:
                answers.append(text[start : mark.start()])
    return _Found(answers, broken="a box that is not closed" if depth else "")


def _lined(text: str) -> _Found:
    lines = [_without_bold(line.strip()) for line in text.splitlines() if line.strip()]
    matches = [_LINE_MARK.fullmatch(line) for line in lines]
    answers = [match[1] for match in matches if match]
    return _Found(answers, untidy="text after the answer" if answers and not matches[-1] else "")


def _without_bold(line: str) -> str:
    """`**Answer:** 2**3` as `Answer: 2**3`: the pair that opens the line goes, and nothing else."""
    return line[2:].replace("**", "", 1) if line.startswith("**") else line


def _whole(text: str) -> _Found:
    return _Found([text] if text.strip() else [])


_FINDERS: dict[str, Callable[[str], _Found]] = {"tags": _tagged, "boxed": _boxed, "line": _lined, "rest": _whole}

# --- what only looks as if --------------------------------------------------------------------------------------------

_TAGS = {"tags": "think|answer", "boxed": "think", "line": "think", "rest": "think"}
_EXACT_TAG = {form: re.compile(f"</?(?:{names})>") for form, names in _TAGS.items()}
_TAG_LIKE = {form: re.compile(rf"<\s*(?:/\s*)?(?:{names})\b[^<>]*>") for form, names in _TAGS.items()}
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|lt|gt|sol);?", re.IGNORECASE)
# Of other alphabets, but drawn like the letters of the tags' names and their brackets.
_LOOK_ALIKES = {
    "a": "аαɑᴀ",
    "e": "еεҽᴇ",
    "h": "һнհʜ",
    "i": "іιıɪ",
    "k": "кκᴋ",
    "n": "ոηпɴ",
    "r": "гᴦʀ",
    "s": "ѕꜱ",
    "t": "тτᴛ",
    "w": "ѡωԝᴡ",
    "<": "‹⟨〈《«",
    ">": "›⟩〉》»",
    "/": "⁄∕⧸",
}
_DRAWN_LIKE = {other: letter for letter, others in _LOOK_ALIKES.items() for other in others}


def _imitates_tag(text: str, layout: Layout) -> bool:
    """Whether something in it would be taken for one of the layout's tags at a glance."""
    if "&" in text:
        text = _ENTITY.sub(lambda entity: html.unescape(entity.group()), text)
    return _TAG_LIKE[layout.form].search(text.translate(_AT_A_GLANCE)) is not None


def _at_a_glance(character: str) -> str:
    if is_unseen(character) or is_mark(character):
        return ""
    return "".join(_DRAWN_LIKE.get(letter, letter) for letter in compatible(character).casefold())


_AT_A_GLANCE = PerCharacter(_at_a_glance)
