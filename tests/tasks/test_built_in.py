"""What holds for every built-in task whose answers are texts."""

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from fathom.errors import UserError
from fathom.tasks import Problem, Task, open_task
from tests.tasks.hostile import HOSTILE

NAMES = ("arithmetic", "modular", "equations", "countdown", "logic", "bilingual", "smalltalk")
LEVELS = [(name, level) for name in NAMES for level in range(1, open_task(name).levels + 1)]


def _some(task: Task, count: int, level: int = 1, split: str = "train", seed: int = 0) -> list[Problem]:
    return list(itertools.islice(task.problems(split, level=level, seed=seed), count))


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_own_answer_is_right_and_others_are_wrong(name: str, level: int) -> None:
    """A problem's answer scores 1; that of another problem of the level scores 0 unless it is the same answer."""
    task = open_task(name)
    problems = _some(task, 30, level)
    for problem, other in itertools.pairwise(problems):
        assert task.check(problem, problem.answer) == 1
        assert task.check(problem, f" {problem.answer}.\n") == (name != "countdown")
        assert task.check(problem, other.answer) == (other.answer == problem.answer) or name in ("countdown", "logic")
        assert task.check(problem, f"{problem.answer} or {other.answer}") == 0
        assert task.check(problem, problem.question) == 0


@pytest.mark.parametrize("name", NAMES)
def test_hostile_answers_score_nothing(name: str) -> None:
    """Endless, nested, empty, foreign and overflowing texts are wrong and raise nothing."""
    task = open_task(name)
    for level in (1, task.levels):
        problem = _some(task, 1, level)[0]
        assert [text[:20] for text in HOSTILE if task.check(problem, text) != 0] == []


@pytest.mark.parametrize("name", NAMES)
def test_splits_never_share_a_problem(name: str) -> None:
    """Whatever the level and seed, no problem of training has the key of one held out."""
    task = open_task(name)
    keys: dict[str, set[str]] = {"train": set(), "held-out": set()}
    for split, level, seed in itertools.product(keys, range(1, task.levels + 1), (0, 1, 2)):
        keys[split] |= {problem.key or problem.question for problem in _some(task, 12, level, split, seed)}
    assert min(map(len, keys.values())) > 30
    assert not keys["train"] & keys["held-out"]


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_problems(name: str) -> None:
    """Problems are a function of split, level and seed; another seed gives others."""
    task = open_task(name)
    first, again, other = (_some(task, 20, level=min(2, task.levels), seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def _operations(problem: Problem) -> float:
    return sum(problem.question.count(sign) for sign in "+-*")


def _lines(problem: Problem) -> float:
    return len(problem.data["lines"])


def _arithmetic_load(problem: Problem) -> float:
    digits = sum(character.isdigit() for character in problem.question)
    return digits + 3 * problem.question.count("*")


def _trials(problem: Problem) -> float:
    return len(problem.data["trials"])


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("arithmetic", _arithmetic_load),
        ("modular", _operations),
        ("equations", _lines),
        ("countdown", _lines),
        ("logic", _trials),
        ("bilingual", _lines),
    ],
)
def test_levels_get_harder(name: str, measure: Callable[[Problem], float]) -> None:
    """The mean amount of work (operations, steps, worlds to rule out) never falls and ends above where it began."""
    task = open_task(name)
    work = [sum(map(measure, _some(task, 60, level))) / 60 for level in range(1, task.levels + 1)]
    assert all(later >= earlier - 0.35 for earlier, later in itertools.pairwise(work)), work
    assert work[-1] > work[0] + 1


def _solutions(name: str, count: int = 40) -> Iterator[tuple[Problem, str]]:
    task = open_task(name)
    for level in range(1, task.levels + 1):
        for problem in _some(task, count, level):
            yield problem, task.solution(problem, random.Random(level))


def _is_true(line: str) -> bool:
    """Whether `a + b = c` holds; calculations are of whole numbers here."""
    left, sign, right, _, result = line.split()
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else None}[sign] == int(result)


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])
def test_worked_solution_is_true_line_by_line_and_ends_in_the_answer(name: str) -> None:
    """Every line is a true calculation; the last one's result is the number that was wanted."""
    for problem, worked in _solutions(name):
        lines = worked.split("\n")
        assert all(map(_is_true, lines)), worked
        assert lines[-1].endswith(f"= {problem.data.get('target', problem.answer)}")


def test_products_go_before_sums() -> None:
    """The answer is what Python's own order of operations gives."""
    for problem, _ in _solutions("arithmetic"):
        assert int(problem.answer) == eval(problem.question.removeprefix("What is ").partition("?")[0])


def test_worked_story_is_true_and_in_its_language() -> None:
    """The calculations hold, as many as the level says, and no Chinese story has English words nor the reverse."""
    for problem, worked in _solutions("bilingual"):
        assert all(map(_is_true, problem.data["lines"]))
        assert len(problem.data["lines"]) == problem.level
        chinese = problem.language == "zh"
        assert chinese is not any(character.isascii() and character.isalpha() for character in problem.question)
        assert chinese is any("一" <= character <= "鿿" for character in problem.question + worked)
        assert worked.rstrip(".。").endswith(problem.answer)


def test_equation_holds_with_its_answer() -> None:
    """Both sides of every line of the solution are equal where the unknown has the value given."""
    for problem, worked in _solutions("equations"):
        name = problem.data["name"]
        for line in worked.split("\n"):
            sides = [_side(side, name, problem.answer) for side in line.split(" = ")]
            assert sides[0] == sides[1], worked
        assert problem.level > 3 or problem.answer.lstrip("-").isdecimal()


def _side(side: str, name: str, value: str) -> object:
    """One side worked out exactly; digits before the unknown or a bracket multiply."""
    import re
    from fractions import Fraction

    formula = re.sub(rf"(\d)(?=[{name}(])", r"\1*", side).replace(name, f"Fraction('{value}')")
    formula = re.sub(r"(?<!['\d/])(\d+)(?![\d']|/\d*')", r"Fraction(\1)", formula)
    return eval(formula, {"Fraction": Fraction})


@pytest.mark.parametrize("text", ["x = 3", "X=3", "3", "3.0", "6/2", "+3", "3.", "３"])
def test_any_equal_form_of_an_equations_answer_is_right(text: str) -> None:
    """A value counts however it is written."""
    problem = Problem("Solve for x: x + 1 = 4.", "3", data={"name": "x", "lines": ()})
    assert open_task("equations").check(problem, text) == 1
    assert open_task("equations").check(problem, text.replace("3", "5").replace("３", "5").replace("6", "8")) == 0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("25 * (3 - 1)", 1),
        ("(3-1)*25", 1),
        ("25 × (3 − 1) = 50", 1),
        ("((25))*((3)-(1))", 1),
        ("25 * 3 - 25", 0),
        ("25 * (3 - 1) = 51", 0),
        ("25 + 25", 0),
        ("50", 0),
        ("25 * 2", 0),
        ("25 * (3 - 1) * 1", 0),
        ("25 * (3 - 1", 0),
        ("25 * (3 - 1))", 0),
        ("25 ** (3 - 1)", 0),
        ("25 // (3 - 1)", 0),
        ("25 / (3 - 3)", 0),
        ("-25 * (1 - 3)", 0),
        ("25(3-1)", 0),
        ("25 * (3 - 1) 25 * (3 - 1)", 0),
        ("25 * (3 - 1) = 50 = 50", 0),
        ("x = 25 * (3 - 1)", 0),
        ("２５ * (3 - 1)", 0),
    ],
)
def test_countdown_counts_the_numbers_and_the_value(text: str, score: float) -> None:
    """An expression is right with exactly the numbers given and exactly the target, and read strictly."""
    problem = Problem("", data={"numbers": (1, 3, 25), "target": 50})
    assert open_task("countdown").check(problem, text) == score


@pytest.mark.parametrize(
    ("kind", "text", "score"),
    [
        ("knights", "Ann: knight, Bob: knave", 1),
        ("knights", "bob is a knave and ANN is a knight.", 1),
        ("knights", "Ann: knight\nBob: knave", 1),
        ("knights", "Ann: knave, Bob: knave", 0),
        ("knights", "Ann: knight", 0),
        ("knights", "Ann: knight, Bob: knave, Bob: knight", 0),
        ("knights", "Ann: knight, Ann: knight, Bob: knave", 0),
        ("knights", "Ann: knight, Bob: knight or knave", 0),
        ("knights", "Ann: knight, Bob: not knave", 0),
        ("knights", "Ann: knight, Bob: knave, maybe", 0),
        ("ordering", "Bob, Ann, Carl", 1),
        ("ordering", "bob > ann > carl", 1),
        ("ordering", "Bob, then Ann and then Carl.", 1),
        ("ordering", "Carl, Ann, Bob", 0),
        ("ordering", "Bob, Ann", 0),
        ("ordering", "Bob, Ann, Carl, Bob", 0),
        ("ordering", "Bob, Ann, Carl or Bob, Carl, Ann", 0),
        ("ordering", "Bob/Ann/Carl", 0),
    ],
)
def test_logic_takes_any_layout_and_one_content(kind: str, text: str, score: float) -> None:
    """Order, case and separators do not count where they say nothing; what is said must be all and nothing else."""
    pairs = (("ann", "knight"), ("bob", "knave"))
    problem = Problem("", data={"kind": kind, "solution": pairs if kind == "knights" else ("bob", "ann", "carl")})
    assert open_task("logic").check(problem, text) == score


def test_modular_solution_is_made_of_the_300_facts() -> None:
    """Every step is two digits, a sign and the last digit of their result, and the last one is the answer."""
    facts = set()
    for problem, worked in _solutions("modular", count=100):
        for step in worked.split(";"):
            said, _, digit = step.partition("=")
            digit = digit[-1]
            assert (
                int(digit)
                == {"+": sum, "-": lambda p: p[0] - p[1], "*": lambda p: p[0] * p[1]}[said[1]](
                    (int(said[0]), int(said[2]))
                )
                % 10
            )
            facts.add(said)
        assert worked[-1] == problem.answer
        assert worked[0] == problem.question[0]
    assert 280 < len(facts) <= 300


@pytest.mark.parametrize(("name", "mark"), [("modular", "!"), ("arithmetic", "Wait")])
def test_share_of_steps_is_corrected(name: str, mark: str) -> None:
    """About the share of steps that was asked for goes wrong first, none at a share of 0, and the answer holds."""
    never, often = open_task(f"{name}?corrections=0"), open_task(f"{name}?corrections=0.5")
    problems = _some(often, 200, level=3)
    worked = [often.solution(problem, random.Random(i)) for i, problem in enumerate(problems)]
    assert not any(mark in never.solution(problem, random.Random(0)) for problem in problems)
    steps = sum(never.solution(problem, random.Random(0)).count("=") for problem in problems)
    assert 0.4 < sum(text.count(mark) for text in worked) / steps < 0.6
    assert all(text.endswith(problem.answer) for text, problem in zip(worked, problems, strict=True))
    if name == "modular":
        assert all(text[i - 1] != text[i + 1] for text in worked for i in range(len(text)) if text[i] == "!")


def test_puzzles_have_exactly_one_solution() -> None:
    """Every other world is ruled out by a sentence of the puzzle, and the levels have the worlds they should."""
    task = open_task("logic")
    for level, worlds in enumerate((4, 6, 8, 16, 24, 32, 120), 1):
        for problem in _some(task, 10, level):
            assert len(set(problem.data["trials"])) == worlds
            assert problem.data["trials"][-1] == f"So {problem.answer}."


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("modular?corrections=2", "corrections = 2.0 is not a share"),
        ("modular?corrections=nan", "corrections = nan is not a share"),
        ("arithmetic?corrections=x", "corrections = 'x': is not a number"),
        ("bilingual?language=fr", "language = 'fr': is not one of both, en, zh"),
    ],
)
def test_impossible_option_is_one_line(name: str, said: str) -> None:
    """An option out of its range is refused with its name and value."""
    with pytest.raises(UserError) as error:
        open_task(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_bilingual_keeps_to_the_language_asked_for() -> None:
    """`language=zh` makes Chinese problems alone; without it both languages come."""
    assert {problem.language for problem in _some(open_task("bilingual?language=zh"), 20)} == {"zh"}
    assert {problem.language for problem in _some(open_task("bilingual"), 20)} == {"en", "zh"}
