"""How much of a thought is in the language that was asked for.

DeepSeek-R1 rewards language consistency: of the words in a thought, the share that is in the target language (§2.3.2).
Languages are told apart by script, so that the measure is exact, quick, and cannot be argued with by a model:

- Chinese is written without spaces: every Han character is a word (and every kana, Thai or Khmer letter is one of
  another language). A Chinese word has about 1.5 of them, so that mixing weighs a little more in an English thought.
- English words are runs of the letters A to Z. A run with letters of any other alphabet or with accents is a word of
  another language: a Cyrillic `а` in it gains nothing, nor does pinyin with its tones. Full-width and mathematical
  letters are read as the letters that they show.
- A run counts once for every twenty letters begun: prose does not shrink by leaving out its spaces.
- Numbers, signs, single Latin or Greek letters (variables) and the commands and function names of formulae are
  neutral: they are the same in every language. Code counts by its words. Marks such as `$` or a code fence neutralise
  nothing, for anything could be put between them.

What script cannot tell: English from German without umlauts or pinyin without tones, letters spaced out, filler from
thought. Filler in the target language earns its share, as it would have by the published rule; what stops it is
that it costs tokens and helps no answer.
"""

import re
import unicodedata
from functools import cache
from itertools import groupby

from fathom.tasks.characters import PerCharacter, compatible, is_unseen
from fathom.tasks.task import Language

# What the Unicode names of a language's letters begin with; another language is another line.
_SCRIPTS: dict[Language, str] = {"en": "LATIN", "zh": "CJK"}
_UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"})
_LETTERS_PER_WORD = 20

_RUN = re.compile(r"(?:[^\W\d_][\u0300-\u036f]*)+")
_COMMAND = re.compile(
    r"\\(?:frac|dfrac|tfrac|sqrt|cdot|times|div|pm|mp|leq?|geq?|neq?|approx|equiv|sum|prod|int|lim|infty|left|right|"
    r"begin|end|text|mathrm|mathbf|boxed|quad|qquad|ldots|cdots|dots|Rightarrow|rightarrow|to|implies|therefore|alpha|"
    r"beta|gamma|delta|theta|lambda|mu|pi|sigma|phi|omega)(?![A-Za-z])"
)
_FUNCTIONS = frozenset({"sin", "cos", "tan", "log", "ln", "exp", "max", "min", "mod", "gcd", "lcm", "abs", "sqrt"})


def share(text: str, target: Language) -> float | None:
    """The share of words that are in `target`, 0 to 1; None where there is no word of any language."""
    ours = total = 0
    wanted = _SCRIPTS[target]
    for run in _RUN.findall(_COMMAND.sub(" ", text.translate(_PLAIN))):
        for script, letters in _parts(run):
            if words := _words(script, letters):
                total += words
                ours += words * (script == wanted)
    return ours / total if total else None


def _parts(run: str) -> list[tuple[str, str]]:
    """A run of letters as stretches of spaced and of unspaced script; a stretch of mixed alphabets has script ""."""
    if run.isascii():
        return [("LATIN", run)]
    parts = []
    for unspaced, stretch in groupby(run, key=lambda letter: _script(letter) if _script(letter) in _UNSPACED else ""):
        letters = "".join(stretch)
        parts.append((unspaced or _alphabet(letters), letters))
    return parts


def _alphabet(letters: str) -> str:
    """The one alphabet of a spaced stretch; "" where there are several, or Latin with more than A to Z."""
    if letters.isascii():
        return "LATIN"
    alphabets = {_script(letter) for letter in set(letters)}
    return alphabets.pop() if len(alphabets) == 1 and "LATIN" not in alphabets else ""


def _words(script: str, letters: str) -> int:
    if script in _UNSPACED:
        return len(letters)
    if len(letters) == 1 and _script(letters) in ("LATIN", "GREEK"):
        return 0
    if letters.lower() in _FUNCTIONS:
        return 0
    return -(-len(letters) // _LETTERS_PER_WORD)


@cache
def _script(letter: str) -> str:
    """`LATIN`, `CYRILLIC`, `CJK`: how the character's Unicode name begins."""
    return unicodedata.name(letter, "").partition(" ")[0]


_PLAIN = PerCharacter(lambda character: "" if is_unseen(character) else compatible(character))
