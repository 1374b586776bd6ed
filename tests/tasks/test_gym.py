"""The datasets of reasoning-gym as tasks."""

import itertools
import os
import pickle
import subprocess
import sys

import pytest

from fathom.errors import UserError
from fathom.tasks import Problem, open_task
from fathom.tasks.gym import _HASH_ORDERED, _READABLE, _SLOW_TO_MAKE, Gym, _make, dataset_names, make_entry
from fathom.tasks.task import judge
from tests.tasks.hostile import HOSTILE

pytest.importorskip("reasoning_gym")

_OPTIONS = {
    "composite": {"datasets": "chain_sum,gcd"},
    # Its curriculum's easiest level takes seconds for a problem.
    "sokoban": {"min_w": "6", "max_w": "6", "min_h": "6", "max_h": "6", "min_boxes": "1", "max_boxes": "1"},
}
_FEW = {"coin_flip": 6, "propositional_logic": 2}
"""Levels for datasets whose first has too few different problems to hold any out."""


@pytest.mark.parametrize("name", dataset_names())
def test_every_dataset_opens_and_judges(name: str) -> None:
    """Each makes a problem for either split, scores its own answer 1, a wrong one 0, and says so of a failing check."""
    task = Gym(name, _OPTIONS.get(name, {}))
    for split in ("train", "held-out"):
        problem = next(task.problems(split, level=_FEW.get(name, 1)))
        assert problem.held_out == (split == "held-out")
        assert problem.question
        if problem.answer:
            assert judge(task, problem, problem.answer).score == 1
            assert judge(task, problem, f" {problem.answer}\n").score == 1
    wrong = judge(task, problem, "surely wrong")
    assert wrong.score == 0
    assert judge(task, problem, "").score == 0


@pytest.mark.parametrize("name", sorted(_READABLE))
def test_text_that_is_no_answer_is_not_shown_to_gullible_checkers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could call something, or is skipped by a checker or taken for right, does not reach it; answers do."""
    shown = []

    def record(function: object, dataset: str, config: bytes, entry: dict, answer: str, **_: object) -> float:
        shown.append(answer)
        return 0.0

    monkeypatch.setattr("fathom.tasks.gym.isolated", record)
    task = Gym(name, _OPTIONS.get(name, {}))
    problems = list(itertools.islice(task.problems("train", level=min(2, task.levels)), 10))
    for problem in problems:
        assert task.check(problem, problem.answer + " ") == 0
    assert shown == [problem.answer for problem in problems]
    for text in (
        "__import__('os')",
        "exit()",
        "open('x')",
        "().__class__",
        "lambda: 0",
        "[x for x in y]",
        *HOSTILE[3:4],
    ):
        shown.clear()
        assert task.check(problems[0], text) == 0
        assert shown == [], text


def test_problems_do_not_depend_on_the_hash_seed() -> None:
    """Datasets that go through sets make the same problems in runs whose sets are ordered differently."""
    code = (
        "import random\nfrom fathom.tasks.gym import Gym\n"
        f"for name in {sorted(_HASH_ORDERED)}:\n"
        "    for seed in (0, 1):\n"
        "        problem = Gym(name, {}).problem(random.Random(seed), 1)\n"
        "        print(problem.question, problem.answer)\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != b"", runs[0].stderr


@pytest.mark.parametrize("name", sorted(_SLOW_TO_MAKE))
def test_reseeded_dataset_makes_what_a_new_one_makes(name: str) -> None:
    """The shortcut for datasets that are slow to make changes no problem."""
    config = pickle.dumps(Gym(name, {})._configs[0])
    for seed in (1, 2, 3):
        kept, new = make_entry(name, config, seed), _make(name, config, seed)[0]
        assert (kept["question"], kept["answer"]) == (new["question"], new["answer"])


def test_options_reach_the_library() -> None:
    """Options decide the problems; there is then one level."""
    task = open_task("gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1")
    assert task.levels == 1
    for problem in itertools.islice(task.problems("train"), 20):
        assert sum(character.isdigit() for character in problem.question) == 2


def test_curriculum_gives_harder_levels() -> None:
    """Levels are the library's: chains grow with them."""
    task = open_task("gym:chain_sum")
    lengths = [
        sum(len(p.question) for p in itertools.islice(task.problems("train", level=level), 40))
        for level in range(1, task.levels + 1)
    ]
    assert task.levels > 2
    assert lengths[-1] > 1.5 * lengths[0]


def test_levels_that_the_library_refuses_are_left_out() -> None:
    """A curriculum with impossible levels keeps the others; one that has only such has one level, the defaults."""
    assert Gym("caesar_cipher", {}).levels == 2
    assert Gym("knight_swap", {}).levels == 1


def test_partial_credit_is_given_only_on_demand() -> None:
    """The library's share for a right answer among other words counts as 0, unless `strict=false`."""
    for name, least, most in (("gym:chain_sum", 0, 0), ("gym:chain_sum?strict=false", 0.01, 0.99)):
        task = open_task(name)
        problem = next(task.problems("train"))
        assert least <= task.check(problem, f"it is {problem.answer}") <= most


def test_checker_that_takes_anything_is_not_asked() -> None:
    """Of True and False one is wrong, whatever the library thinks."""
    task = open_task("gym:game_of_life_halting")
    problem = next(task.problems("train"))
    assert {problem.answer: 1.0} == {text: s for text in ("True", "False", "x") if (s := task.check(problem, text))}


def test_puzzle24_takes_its_own_numbers_alone() -> None:
    """Four other numbers that make 24, or a value that only rounds to it, are wrong; another order is right."""
    task = open_task("gym:puzzle24")
    entry = {"metadata": {"numbers": [3, 1, 4, 3], "source_dataset": "puzzle24"}}
    problem = Problem("?", "3*(3 + 1 + 4)", data={"entry": entry})
    assert task.check(problem, "(4 + 3 + 1)*3") == 1
    assert task.check(problem, "1*2*3*4") == 0
    assert task.check(problem, "3*4*(3 - 1)/1") == 0
    problem = Problem("?", data={"entry": {"metadata": {"numbers": [7, 7, 2], "source_dataset": "puzzle24"}}})
    assert task.check(problem, "7*7/2") == 0


def test_raising_checker_is_a_fault_that_names_it() -> None:
    """A checker of the library that raises scores 0 and says what it raised."""
    task = open_task("gym:prime_factorization")
    verdict = judge(task, next(task.problems("train")), "21 = 126")
    assert verdict.score == 0
    assert verdict.fault.startswith("gym:prime_factorization: its check raised Failed: ValueError")


def test_endless_check_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checker that would compute for ever ends with a fault, and the next check works."""
    monkeypatch.setattr("fathom.tasks.isolation.SECONDS", 1)
    task = open_task("gym:simple_integration")
    problem = next(task.problems("train"))
    verdict = judge(task, problem, "9**9**9**9**9")
    assert verdict.score == 0
    assert "processor time" in verdict.fault
    assert judge(task, problem, f"0 + {problem.answer}") == judge(task, problem, problem.answer)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gym:chain_sums", "no such dataset (did you mean 'chain_sum'?)"),
        ("gym:", "no such dataset"),
        ("gym:chain_sum?min_term=2", "unknown option 'min_term' (did you mean 'min_terms'?)"),
        ("gym:chain_sum?min_terms=two", "min_terms = 'two': is not a whole number"),
        ("gym:chain_sum?min_terms=9&max_terms=2", "max_terms must be >= min_terms"),
        ("gym:chain_sum?seed=1", "unknown option 'seed'"),
        ("gym:chain_sum?min_terms", "'min_terms' is not of the form key=value"),
        ("gym:chain_sum?strict=maybe", "strict = 'maybe': is not one of true, false"),
        ("gym:composite", "Must specify at least one dataset"),
        ("gym:composite?datasets=gdc", "no such dataset"),
        ("gym:calendar_arithmetic?year=x", "year = 'x'"),
    ],
)
def test_mistake_in_a_name_is_one_line(name: str, said: str) -> None:
    """Names and options that there are not, and values that the library refuses, are said in one line."""
    with pytest.raises(UserError) as error:
        open_task(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_same_seed_same_problems() -> None:
    """Problems depend on split, level and seed alone."""

    def some(seed: int) -> list[Problem]:
        return list(itertools.islice(open_task("gym:gcd").problems("held-out", level=2, seed=seed), 5))

    assert some(1) == some(1) != some(2)
