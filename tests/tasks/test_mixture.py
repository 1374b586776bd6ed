"""Several tasks as one."""

import itertools
import json
import random
from pathlib import Path

import pytest

from fathom.config.rewards import Rewards
from fathom.errors import UserError
from fathom.tasks import open_task
from fathom.tasks.checker import Checker, Sample
from fathom.tasks.mixture import stays_in_sandbox, uses_sandbox
from fathom.tasks.task import Task
from fathom.tasks.words import units

NAME = "modular?levels=8 + bilingual?levels=2&numbers=small"


def some(task: Task, split: str, level: int, count: int = 300):
    return list(itertools.islice(task.problems(split, level=level), count))


def test_a_mixture_holds_out_what_its_parts_hold_out():
    """No training problem of a mixture is one that a part, opened alone, holds out, nor the other way round."""
    mixture = open_task(NAME)
    for split in ("train", "held-out"):
        for problem in some(mixture, split, 3):
            assert mixture.part_of(problem)[1].held_out == (split == "held-out")
            assert problem.held_out == (split == "held-out")


def test_what_a_file_holds_out_no_other_part_trains_on(tmp_path: Path):
    """A held-out question of one file is passed over where another file, or a rule, has it for training, in whichever
    spelling; all other draws stay the ones they were, and a part that has nothing else says so."""
    pytest.importorskip("math_verify")
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    shared = [problem.question for problem in some(open_task("modular?levels=1"), "train", 1, 5)]
    rows = [(n, {"question": f"What is {n} + 1?", "answer": n + 1, "split": "train"}) for n in range(20)]
    rows.append((20, {"question": "another", "answer": 0, "split": "test"}))
    train.write_text("".join(json.dumps(row) + "\n" for _, row in rows))
    held_out = [{"question": f"what is {n}+1", "answer": n + 1, "split": "test"} for n in range(5)]
    held_out += [{"question": question, "answer": "0", "split": "test"} for question in shared]
    held_out += [{"question": "other", "answer": "0", "split": "train"}]
    test.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    mixture = open_task(f"{train} + {test} + modular?levels=1")
    leaks = {tuple(units(row["question"])) for row in held_out[:-1]}
    assert {tuple(units(problem.question)) for problem in some(mixture, "held-out", 1)} > leaks
    found = some(mixture, "train", 1, 600)
    assert not {tuple(units(problem.question)) for problem in found} & leaks
    own = [own for task, own in map(mixture.part_of, found) if task.name == "modular"]
    plain = [p for p in some(open_task("modular?levels=1"), "train", 1, 600) if p.question not in shared]
    assert own == plain[: len(own)]
    train.write_text("".join(json.dumps(row) + "\n" for _, row in (rows[0], rows[-1])))
    with pytest.raises(UserError, match="level 1 has nothing for training that is not held out as well"):
        some(open_task(f"{train} + {test}"), "train", 1)


def test_parts_come_equally_often_and_levels_are_spread():
    """Each part gives about half; level 1 is the first of both, the last level the last of both."""
    mixture = open_task(NAME)
    assert mixture.levels == 8
    for level, (modular, bilingual) in {1: (1, 1), 4: (4, 1), 5: (5, 2), 8: (8, 2)}.items():
        found = [mixture.part_of(problem) for problem in some(mixture, "train", level)]
        assert {(task.name, own.level) for task, own in found} == {("modular", modular), ("bilingual", bilingual)}
        assert 90 < sum(task.name == "modular" for task, _ in found) < 210
        assert all(problem.level == level for problem in some(mixture, "train", level, 20))


def test_each_problem_is_checked_by_the_rule_of_its_part():
    """Right answers are right, others wrong, and a unit is taken where the part takes one, also in other processes."""
    mixture = open_task("modular + bilingual?language=en + gym:chain_sum")
    problems = some(mixture, "train", 4, 40)
    with Checker("modular + bilingual?language=en + gym:chain_sum", workers=1) as checker:
        right = checker.check_all([(problem, problem.answer) for problem in problems])
        wrong = checker.check_all([(problem, "-12345") for problem in problems])
        told = [problem for problem in problems if mixture.part_of(problem)[0].name == "bilingual"]
        with_unit = checker.check_all([(p, f"{p.answer} {p.data['problem'].data['units'][0]}") for p in told])
    assert {verdict.score for verdict in right} == {1.0}
    assert {verdict.score for verdict in wrong} == {0.0}
    assert told
    assert {verdict.score for verdict in with_unit} == {1.0}


def test_programs_in_a_mixture_are_run_in_the_sandbox_and_others_are_not():
    """A mixture with programs starts processes for its other parts; checks of both kinds come back in their order."""
    name = "programs + modular?levels=2"
    mixture = open_task(name)
    assert uses_sandbox(mixture)
    assert not stays_in_sandbox(mixture)
    assert stays_in_sandbox(open_task("programs"))
    problems = some(mixture, "train", 1, 8)
    answers = [mixture.part_of(p)[1].answer for p in problems]
    with Checker(name, workers=1) as checker:
        verdicts = checker.check_all(list(zip(problems, answers, strict=True)))
        swapped = checker.check_all(list(zip(problems, reversed(answers), strict=True)))
    assert [verdict.score for verdict in verdicts] == [1.0] * len(problems)
    assert [verdict.score for verdict in swapped] != [1.0] * len(problems)


def test_rewards_of_a_mixture_know_the_language_of_each_problem():
    """A thought in the language of the problem earns all of the language's reward, in the other none."""
    mixture = open_task("bilingual?language=zh + bilingual?language=en")
    settings = Rewards(language=1.0)
    samples = [
        Sample(problem, f"<think>{thought}</think><answer>{problem.answer}</answer>", tokens=9, finished=True)
        for problem in some(mixture, "train", 1, 10)
        for thought in ("先算这个数", "First this number")
    ]
    with Checker(mixture, workers=1) as checker:
        rewards = checker.score_all(samples, max_tokens=99, starts_thinking=False, settings=settings)
    for sample, reward in zip(samples, rewards, strict=True):
        same = ("先" in sample.completion) == (sample.problem.language == "zh")
        assert reward.parts["language"] == float(same)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("modular + nodular", "unknown task 'nodular' (did you mean 'modular'?)"),
        ("modular?levels=13", "levels = 13, but it has 1 to 12"),
        ("modular?levels=0", "levels = 0, but it has 1 to 12"),
        ("modular?levels=many", "levels = 'many'"),
        ("modular + ", "unknown task ''"),
    ],
)
def test_a_part_that_there_is_not_is_refused(name: str, said: str):
    """One line that names the part."""
    with pytest.raises(UserError) as error:
        open_task(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_mixing_puts_that_share_of_lines_in_the_other_language():
    """Of the lines of worked solutions; without it there is none, and with all there is no line of the question's."""
    for mixing, least, most in ((0.0, 0.0, 0.0), (0.3, 0.25, 0.35), (1.0, 1.0, 1.0)):
        task, source = open_task(f"bilingual?numbers=small&mixing={mixing}"), random.Random(1)
        lines = [
            ("。" in line) != (problem.language == "zh")
            for problem in some(task, "train", 3)
            for line in task.solution(problem, source).split("\n")
        ]
        assert least <= sum(lines) / len(lines) <= most


def test_small_numbers_stay_small():
    """Nothing in a worked solution of three steps is above 81."""
    task = open_task("bilingual?numbers=small")
    results = [int(line.rpartition(" ")[2]) for p in some(task, "train", 3, 2000) for line in p.data["lines"]]
    assert min(results) >= 0
    assert max(results) <= 81
