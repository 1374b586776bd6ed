"""Families of small programming problems: each draws its parameters and gives the text, a right program and inputs.

The right programs are our own text, run in our own process to compute what is expected; parameters are written into
both the description and the program, so that one family is hundreds of different functions.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Puzzle:
    """One function, or one script, to be written."""

    text: str
    """What it is to do, in one or a few sentences, exact to the last corner."""
    source: str
    """A right program; its first line is the signature asked for. A script's is `def answer(text: str) -> str`."""
    draw: Callable[[random.Random], Arguments]
    """Arguments of one call; of a script, its standard input alone."""
    corners: tuple[Arguments, ...] = ()
    """Arguments that are always among the tests."""
    is_script: bool = False
    """Whether it reads standard input and prints, instead of being called."""


Family = Callable[[random.Random], Puzzle]

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NAMES = ("ada", "ben", "cleo", "dan", "eva", "finn")
_WORDS = ("tree", "moon", "a", "river", "sand", "if", "garden", "stone", "owl", "bridge", "sun", "lantern", "sea", "of")


def _list(random: random.Random, low: int = -20, high: int = 40, *, least: int = 0, most: int = 9) -> list[int]:
    return [random.randint(low, high) for _ in range(random.randint(least, most))]


def _sentence(random: random.Random, most: int = 8) -> str:
    return " ".join(random.choice(_WORDS) for _ in range(random.randint(1, most)))


def _word(random: random.Random, letters: str = _LETTERS, most: int = 10) -> str:
    return "".join(random.choice(letters) for _ in range(random.randint(1, most)))


def affine(random: random.Random) -> Puzzle:
    a, b = random.randint(2, 12), random.randint(1, 30)
    return Puzzle(
        f"returns {a} times x plus {b}",
        f"def scale(x: int) -> int:\n    return {a} * x + {b}\n",
        lambda random: (random.randint(-50, 50),),
        ((0,),),
    )


def count_letter(random: random.Random) -> Puzzle:
    letter, folded = random.choice(_LETTERS), random.random() < 0.5
    how = "capital letters count too" if folded else "capital letters do not count"
    return Puzzle(
        f"returns how often the letter '{letter}' occurs in text; {how}",
        f"def count_letter(text: str) -> int:\n    return text{'.lower()' if folded else ''}.count('{letter}')\n",
        lambda random: (_word(random, letter + letter.upper() + "xyz ", 12),),
        (("",), (letter + letter.upper(),)),
    )


def keep(random: random.Random) -> Puzzle:
    limit, (words, sign) = random.randint(-5, 25), random.choice((("greater than", ">"), ("smaller than", "<")))
    return Puzzle(
        f"returns the list of those numbers that are {words} {limit}, in the order given",
        f"def keep(numbers: list[int]) -> list[int]:\n    return [n for n in numbers if n {sign} {limit}]\n",
        lambda random: (_list(random),),
        (([],), ([limit - 1, limit, limit + 1],)),
    )


def surround(random: random.Random) -> Puzzle:
    mark, times = random.choice("*#-+=~.!"), random.randint(1, 6)
    return Puzzle(
        f"returns text with {times} times the character '{mark}' before it and as many after it",
        f"def surround(text: str) -> str:\n    return '{mark}' * {times} + text + '{mark}' * {times}\n",
        lambda random: (_word(random),),
        (("",),),
    )


def every(random: random.Random) -> Puzzle:
    start, step = random.randint(0, 4), random.randint(2, 6)
    return Puzzle(
        f"returns a list of the item with index {start} and of each further one {step} places after the last; "
        "indices count from 0",
        f"def every(items: list[int]) -> list[int]:\n    return items[{start}::{step}]\n",
        lambda random: (_list(random, most=18),),
        (([],), (list(range(20)),)),
    )


def clamp(random: random.Random) -> Puzzle:
    low = random.randint(-30, 10)
    high = low + random.randint(5, 40)
    return Puzzle(
        f"returns x, but {low} if x is smaller than {low}, and {high} if x is larger than {high}",
        f"def clamp(x: int) -> int:\n    return max({low}, min({high}, x))\n",
        lambda random: (random.randint(low - 20, high + 20),),
        ((low - 1,), (high + 1,), (low,)),
    )


def sum_of_multiples(random: random.Random) -> Puzzle:
    factor, power = random.randint(2, 12), random.randint(1, 3)
    what = {1: "the sum", 2: "the sum of the squares", 3: "the sum of the cubes"}[power]
    return Puzzle(
        f"returns {what} of those numbers that are multiples of {factor} (0 is one); 0 if there are none",
        f"def total(numbers: list[int]) -> int:\n    return sum(n**{power} for n in numbers if n % {factor} == 0)\n",
        lambda random: ([n * random.choice((1, factor)) for n in _list(random, -9, 9)],),
        (([],), ([factor, factor + 1, -factor],)),
    )


def print_total(random: random.Random) -> Puzzle:
    factor, plus = random.randint(2, 9), random.randint(0, 20)
    return Puzzle(
        "Each line of the input holds one whole number. "
        f"It prints their sum multiplied by {factor}, plus {plus}. An empty input has the sum 0.",
        f"def answer(text: str) -> str:\n    return str(sum(map(int, text.split())) * {factor} + {plus})\n",
        lambda random: ("".join(f"{n}\n" for n in _list(random)),),
        (("",),),
        is_script=True,
    )


def caesar(random: random.Random) -> Puzzle:
    shift = random.randint(1, 25)
    back = random.random() < 0.5
    return Puzzle(
        f"returns text with each of the letters a to z moved {shift} places {'back' if back else 'on'} in the "
        "alphabet, around its end; all other characters stay",
        dedent(f"""\
            def shift(text: str) -> str:
                moved = ""
                for c in text:
                    if "a" <= c <= "z":
                        c = chr((ord(c) - 97 {"-" if back else "+"} {shift}) % 26 + 97)
                    moved += c
                return moved
            """),
        lambda random: (_sentence(random, 4),),
        (("",), ("xyz ABC abc!",)),
    )


def chunks(random: random.Random) -> Puzzle:
    size, dropped = random.randint(2, 7), random.random() < 0.5
    turned = random.random() < 0.5
    last = "left out" if dropped else "kept"
    order = ", each turned around" if turned else ""
    only = f" if len(part) == {size}" if dropped else ""
    return Puzzle(
        f"returns the items in lists of {size}{order}; a shorter one at the end is {last}",
        dedent(f"""\
            def chunks(items: list[int]) -> list[list[int]]:
                parts = [items[i : i + {size}] for i in range(0, len(items), {size})]
                return [part{"[::-1]" if turned else ""} for part in parts{only}]
            """),
        lambda random: (_list(random, most=15),),
        (([],), (list(range(2 * size + 1)),)),
    )


def digits(random: random.Random) -> Puzzle:
    base, modulus = random.randint(2, 16), random.choice((None, *range(3, 12)))
    left = "" if modulus is None else f", modulo {modulus}"
    return Puzzle(
        f"returns the sum of the digits of n (0 or more) written in base {base}{left}",
        dedent(f"""\
            def digit_sum(n: int) -> int:
                total = 0
                while n:
                    total += n % {base}
                    n //= {base}
                return total{"" if modulus is None else f" % {modulus}"}
            """),
        lambda random: (random.randint(0, 10**6),),
        ((0,), (base**3 - 1,)),
    )


def fizz(random: random.Random) -> Puzzle:
    a, b = random.sample(range(2, 8), 2)
    one, two = random.sample(("fizz", "buzz", "hop", "clap", "zip"), 2)
    return Puzzle(
        f"returns a list of texts for the numbers 1 to n: '{one}' for multiples of {a}, '{two}' for multiples of {b}, "
        f"'{one}{two}' for multiples of both, and the number itself as text for all others",
        dedent(f"""\
            def count(n: int) -> list[str]:
                said = []
                for i in range(1, n + 1):
                    word = "{one}" * (i % {a} == 0) + "{two}" * (i % {b} == 0)
                    said.append(word or str(i))
                return said
            """),
        lambda random: (random.randint(1, 40),),
        ((0,), (a * b,)),
    )


def word_counts(random: random.Random) -> Puzzle:
    least, (words, key) = random.randint(1, 6), random.choice((("word", "word"), ("first letter of a word", "word[0]")))
    return Puzzle(
        f"returns a dictionary from each {words} to how many words of text have it, "
        f"counting only words of at least {least} letters; words are separated by spaces",
        dedent(f"""\
            def word_counts(text: str) -> dict[str, int]:
                counts = {{}}
                for word in text.split():
                    if len(word) >= {least}:
                        counts[{key}] = counts.get({key}, 0) + 1
                return counts
            """),
        lambda random: (_sentence(random, 12),),
        (("",),),
    )


def ranked(random: random.Random) -> Puzzle:
    place, default = random.randint(2, 5), random.choice((-1, 0, 99, -100))
    largest = random.random() < 0.5
    end = "largest" if largest else "smallest"
    return Puzzle(
        f"returns the number that is in place {place} among the different numbers, counted from the {end} (place 1); "
        f"{default} if there are too few",
        dedent(f"""\
            def ranked(numbers: list[int]) -> int:
                different = sorted(set(numbers), reverse={largest})
                return different[{place - 1}] if len(different) >= {place} else {default}
            """),
        lambda random: (_list(random, 0, 12, most=12),),
        (([],), ([3, 3, 3],)),
    )


def rotate(random: random.Random) -> Puzzle:
    steps, left = random.randint(1, 9), random.random() < 0.5
    return Puzzle(
        f"returns text rotated by {steps} places to the {'left' if left else 'right'}, around its end "
        "(as often as it takes where the text is shorter); an empty text stays empty",
        dedent(f"""\
            def rotate(text: str) -> str:
                if not text:
                    return ""
                k = {steps if left else -steps} % len(text)
                return text[k:] + text[:k]
            """),
        lambda random: (_word(random, most=12),),
        (("",), ("ab",)),
    )


def totals(random: random.Random) -> Puzzle:
    least = random.randint(-5, 60)
    return Puzzle(
        "returns a dictionary from each name to the sum of its amounts, "
        f"leaving out names whose sum is below {least}; pairs are of a name and an amount",
        dedent(f"""\
            def totals(pairs: list[tuple[str, int]]) -> dict[str, int]:
                sums = {{}}
                for name, amount in pairs:
                    sums[name] = sums.get(name, 0) + amount
                return {{name: total for name, total in sums.items() if total >= {least}}}
            """),
        lambda random: ([(random.choice(_NAMES), n) for n in _list(random, most=12)],),
        (([],), ([("ada", least)],)),
    )


def mean_above(random: random.Random) -> Puzzle:
    limit, default = random.randint(-5, 25), random.choice((0.0, -1.0, 0.5))
    return Puzzle(
        f"returns the mean, as a float, of those numbers that are above {limit}; {default} if there are none",
        dedent(f"""\
            def mean_above(numbers: list[int]) -> float:
                kept = [n for n in numbers if n > {limit}]
                return sum(kept) / len(kept) if kept else {default}
            """),
        lambda random: (_list(random),),
        (([],), ([limit],)),
    )


def print_words(random: random.Random) -> Puzzle:
    least, mark = random.randint(2, 6), random.choice("-_+/|")
    return Puzzle(
        "For each line of the input it prints one line: the words of that line that have at least "
        f"{least} letters, in reverse order, joined by '{mark}'; an empty line where there are none.",
        dedent(f"""\
            def answer(text: str) -> str:
                lines = []
                for line in text.splitlines():
                    words = [word for word in line.split() if len(word) >= {least}]
                    lines.append("{mark}".join(reversed(words)))
                return "\\n".join(lines)
            """),
        lambda random: ("".join(_sentence(random) + "\n" for _ in range(random.randint(1, 4))),),
        is_script=True,
    )


def robot(random: random.Random) -> Puzzle:
    size, step, wraps = random.randint(4, 12), random.randint(1, 3), random.random() < 0.5
    edge = "comes in again on the other side" if wraps else "stays where it is instead"
    inside = f"0 <= x < {size} and 0 <= y < {size}"
    moved = f"(x % {size}, y % {size})" if wraps else f"(x, y) if {inside} else place"
    return Puzzle(
        f"returns where a robot ends, as a tuple (x, y). It starts at (0, 0) on a board of {size} by {size} cells, "
        f"x and y from 0 to {size - 1}. Each character of moves takes it {step} cells: 'R' adds to x, 'L' takes from "
        f"x, 'U' adds to y, 'D' takes from y. A move that would leave the board: it {edge}",
        dedent(f"""\
            def robot(moves: str) -> tuple[int, int]:
                place = (0, 0)
                for move in moves:
                    dx, dy = {{"R": (1, 0), "L": (-1, 0), "U": (0, 1), "D": (0, -1)}}[move]
                    x, y = place[0] + {step} * dx, place[1] + {step} * dy
                    place = {moved}
                return place
            """),
        lambda random: (_word(random, "RRULUD", 20),),
        (("",), ("L",), ("R" * size + "U",)),
    )


def account(random: random.Random) -> Puzzle:
    fee, credit, start = random.randint(1, 5), random.choice((0, 10, 50)), random.randint(0, 100)
    return Puzzle(
        f"returns the balance of an account that begins with {start}. Positive amounts are paid in. Negative amounts "
        f"are paid out, with a fee of {fee} each; one that would bring the balance, fee included, below {-credit} is "
        "left out without a fee",
        dedent(f"""\
            def account(amounts: list[int]) -> int:
                balance = {start}
                for amount in amounts:
                    if amount < 0:
                        amount -= {fee}
                        if balance + amount < {-credit}:
                            continue
                    balance += amount
                return balance
            """),
        lambda random: (_list(random, -90, 50, most=10),),
        (([],), ([-start - credit],), ([-start - credit + fee],)),
    )


def recurrence(random: random.Random) -> Puzzle:
    p, q, m = random.randint(1, 6), random.randint(1, 6), random.choice((97, 101, 1000, 1009))
    a, b = random.randint(0, 9), random.randint(1, 9)
    return Puzzle(
        f"returns item n of the sequence that begins with {a}, {b} (items 0 and 1), in which every further item is "
        f"{p} times the one before plus {q} times the one before that, modulo {m}",
        dedent(f"""\
            def sequence(n: int) -> int:
                a, b = {a}, {b}
                for _ in range(n):
                    a, b = b, ({p} * b + {q} * a) % {m}
                return a
            """),
        lambda random: (random.randint(2, 60),),
        ((0,), (1,), (2,)),
    )


def brackets(random: random.Random) -> Puzzle:
    depth, (opening, closing) = random.randint(1, 5), random.choice(("()", "[]", "{}", "<>"))
    return Puzzle(
        f"returns True if every '{opening}' in text has its '{closing}' after it and the other way round, "
        f"and they are nested at most {depth} deep, else False; all other characters are passed over",
        dedent(f"""\
            def balanced(text: str) -> bool:
                depth = 0
                for c in text:
                    if c == "{opening}":
                        depth += 1
                    elif c == "{closing}":
                        depth -= 1
                    if depth < 0 or depth > {depth}:
                        return False
                return depth == 0
            """),
        lambda random: (_nested(random, opening, closing),),
        (
            ("",),
            (closing + opening,),
            (opening * depth + closing * depth,),
            (opening * (depth + 1) + closing * (depth + 1),),
        ),
    )


def _nested(random: random.Random, opening: str, closing: str) -> str:
    """Brackets that are balanced, up to one that may be missing."""
    text = ""
    for _ in range(random.randint(1, 6)):
        cut = random.randint(0, len(text))
        text = text[:cut] + opening + random.choice(("", "a", "b")) + closing + text[cut:]
    gone = random.randrange(2 * len(text))
    return text[:gone] + text[gone + 1 :]


def steps_down(random: random.Random) -> Puzzle:
    divisor, factor, plus = random.randint(2, 3), random.randint(2, 5), random.randint(1, 5)
    limit = random.randint(20, 60)
    return Puzzle(
        f"returns how many steps it takes from n (1 or more) to 1, where a step divides by {divisor} if that leaves no "
        f"remainder and else multiplies by {factor} and adds {plus}; {limit} if 1 is not reached in fewer steps",
        dedent(f"""\
            def steps(n: int) -> int:
                for done in range({limit}):
                    if n == 1:
                        return done
                    n = n // {divisor} if n % {divisor} == 0 else {factor} * n + {plus}
                return {limit}
            """),
        lambda random: (random.choice((random.randint(1, 60), divisor ** random.randint(1, 5))),),
        ((1,), (divisor**4,)),
    )


def window(random: random.Random) -> Puzzle:
    width, largest = random.randint(2, 6), random.random() < 0.5
    which = "largest" if largest else "smallest"
    circular = random.random() < 0.5
    around = "; the list is a circle: its first number follows its last" if circular else ""
    last = "len(numbers)" if circular else f"len(numbers) - {width - 1}"
    return Puzzle(
        f"returns the {which} sum of {width} numbers that follow each other{around}; None if there are "
        f"fewer than {width} numbers",
        dedent(f"""\
            def window(numbers: list[int]) -> int | None:
                if len(numbers) < {width}:
                    return None
                twice = numbers + numbers
                return {"max" if largest else "min"}(sum(twice[i : i + {width}]) for i in range({last}))
            """),
        lambda random: (_list(random, least=width, most=14),),
        (([],), (list(range(width)),)),
    )


def automaton(random: random.Random) -> Puzzle:
    rule, rounds = random.randint(1, 254), random.randint(1, 6)
    table = ", ".join(f"{n:03b} gives {rule >> n & 1}" for n in range(8))
    return Puzzle(
        f"returns the row of cells after {rounds} rounds. cells is a text of '0' and '1' in a circle. In a round every "
        f"cell becomes what its left neighbour, itself and its right neighbour together give: {table}",
        dedent(f"""\
            def automaton(cells: str) -> str:
                for _ in range({rounds}):
                    n = len(cells)
                    around = (cells[i - 1] + cells[i] + cells[(i + 1) % n] for i in range(n))
                    cells = "".join(str({rule} >> int(three, 2) & 1) for three in around)
                return cells
            """),
        lambda random: ("".join(random.choice("01") for _ in range(random.randint(3, 16))),),
    )


def print_totals(random: random.Random) -> Puzzle:
    least, falling = random.randint(1, 60), random.random() < 0.5
    order = "the largest sum first" if falling else "the smallest sum first"
    return Puzzle(
        "Each line of the input holds a name, a space and a whole number. It prints one line 'name sum' for each name "
        f"whose numbers have a sum of at least {least}, {order}, names of equal sums in alphabetical order.",
        dedent(f"""\
            def answer(text: str) -> str:
                sums = {{}}
                for line in text.splitlines():
                    name, number = line.split()
                    sums[name] = sums.get(name, 0) + int(number)
                kept = [(name, total) for name, total in sums.items() if total >= {least}]
                kept.sort(key=lambda pair: ({"-" if falling else ""}pair[1], pair[0]))
                return "\\n".join(f"{{name}} {{total}}" for name, total in kept)
            """),
        lambda random: ("".join(f"{random.choice(_NAMES)} {n}\n" for n in _list(random, -9, 50, least=1, most=12)),),
        is_script=True,
    )


FAMILIES: tuple[tuple[Family, ...], ...] = (
    (affine, count_letter, keep, surround, every, clamp, sum_of_multiples, print_total),
    (caesar, chunks, digits, fizz, word_counts, ranked, rotate, totals, mean_above, print_words),
    (robot, account, recurrence, brackets, steps_down, window, automaton, print_totals),
)
"""The families of each level, the easiest first."""
