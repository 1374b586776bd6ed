"""Evaluations as a whole: what is asked, what is counted, and what is left when one ends early."""

import json
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fathom.config.evaluation import EvaluationSettings
from fathom.engine.protocol import Chunk, FinishReason, Request, Usage
from fathom.errors import UserError
from fathom.evaluate.answers import Answer, EngineAnswers, Reply
from fathom.evaluate.evaluate import INTERRUPTED, Progress, evaluate, grade
from fathom.evaluate.results import Evaluation, Graded, Prices, Spent, Tried, measured
from fathom.evaluate.transcripts import LONGEST, Transcript, shown
from fathom.tasks.checker import Checker
from fathom.tasks.reading import Reading, read
from fathom.tasks.task import Problem
from tests.engine.running import MLA, PLAIN, TAGGED, engine_of
from tests.evaluate.scripted import MODULAR, Scripted
from tests.model.configs import build


def _timeless(found: Evaluation) -> list:
    return [replace(one, cost=replace(one.cost, seconds=0, joules=None)) for one in found.measurements]


@pytest.fixture(scope="module")
def half_right() -> tuple[Scripted, Evaluation, list[Progress]]:
    """Level 1 is answered rightly by samples 0 and 1 of four, level 2 never; with a budget, nothing is."""
    told: list[Progress] = []
    answers = Scripted(lambda p, n, budget: p.answer if p.level == 1 and n < 2 and budget is None else f"no {n % 2}")
    settings = MODULAR.replace(budgets=(3,))
    return answers, evaluate(answers, settings, model="m", prices=Prices(1.0, 2.0), tell=told.append), told


def test_only_held_out_problems_are_asked(half_right) -> None:
    """As many of either level, none of training, and the same ones at every budget."""
    asked, _, _ = half_right
    problems = [problem for problem, budget in asked.asked if budget is None]
    assert all(problem.held_out for problem in problems)
    assert sorted(problem.level for problem in problems) == [1] * 4 + [2] * 4
    assert [problem for problem, budget in asked.asked if budget == 3] == problems


def test_numbers_by_hand(half_right) -> None:
    """Two of four samples right at one of two levels: pass@k, cons@k, levels, lengths and costs as worked by hand."""
    _, found, told = half_right
    free, cut = found.measurements
    assert free.pass_at[1].value == pytest.approx(1 / 4)
    assert free.pass_at[2].value == pytest.approx((1 - 1 / 6) / 2)
    assert free.pass_at[4].value == pytest.approx(1 / 2)
    # Level 1 says "a a no-0 no-1": of the six pairs one is "a a", four have one "a" and tie, one has none.
    assert free.cons_at[2].value == pytest.approx((1 + 4 / 2) / 6 / 2)
    assert free.cons_at[4].value == pytest.approx(1 / 2)
    assert {level: own.pass_at_1.value for level, own in free.levels.items()} == {1: 0.5, 2: 0.0}
    assert free.levels[1].cons_at[2].value == pytest.approx((1 + 4 / 2) / 6)
    by_level = free.as_json()["levels"]
    assert by_level["1"]["problems"] == 4
    assert by_level["1"]["cons@k"]["2"]["value"] == pytest.approx(1 / 2)
    assert by_level["2"]["pass@k"]["4"]["value"] == 0
    assert (free.thought_tokens.mean, free.completion_tokens.median) == (4, 10)
    assert (free.cost.right, free.cost.prompt_tokens, free.cost.completion_tokens) == (8, 160, 320)
    assert free.cost.money == pytest.approx((160 * 1 + 320 * 2) / 1e6)
    assert free.cost.per_solved()["completion_tokens"] == 40
    assert free.cost.per_solved()["joules"] is None
    assert (cut.pass_at_1.value, cut.cost.per_solved()["completion_tokens"]) == (0, None)
    assert found.free("modular") == free
    assert found.by_budget("modular") == [cut]
    assert [one.done for one in told] == list(range(1, 17))
    assert told[-1].total == 16


def test_equal_answers_vote_together() -> None:
    """1,000 and 1000.0 are one answer, and what has none votes for nothing."""
    problem = Problem("n?", "1000")
    answers = [Answer(text, True) for text in ("1,000", "1000.0", "7", "")]
    with Checker(f"{Path(__file__).with_name('thousand.py')}:Thousand", workers=1) as checker:
        tried = grade(Reply(problem, tuple(answers)), checker, MODULAR)
    assert [sample.said for sample in tried.samples] == ["1000", "1000", "7", None]
    assert [sample.right for sample in tried.samples] == [True, True, False, False]
    assert tried.cons_at(4) == 1
    found = measured("t", None, [tried], MODULAR, Spent())
    assert (found.unread, found.unread_for) == (0.25, "no answer")


def test_transcripts_are_of_the_same_problems_for_every_model() -> None:
    """Whatever is answered and in whatever order: the first sample of each, from the lowest level to the highest."""
    settings = MODULAR.replace(levels=6, problems=12)
    right = evaluate(Scripted(lambda p, n, b: f"<think>so {n}</think>{p.answer}"), settings, model="a").measurements[0]
    wrong = evaluate(Scripted(lambda p, n, b: f"no </think> {n}"), settings, model="b").measurements[0]
    assert [one.question for one in right.transcripts] == [one.question for one in wrong.transcripts]
    assert [one.level for one in right.transcripts] == [1, 3, 4, 6]
    assert {(one.thought, one.right) for one in right.transcripts} == {("so 0", True)}
    assert {(one.thought, one.answer, one.right) for one in wrong.transcripts} == {("", "no </think> 0", False)}
    assert right.as_json()["transcripts"][0]["question"] == right.transcripts[0].question
    assert right.as_json()["samples"] == settings.samples


def test_half_a_character_can_be_written() -> None:
    """In a thought and in an answer it is a question mark, so that minutes of measuring end in a file."""
    answers = Scripted(lambda p, n, b: f"<think>a\ud83d</think>{p.answer}\udc00")
    text = json.dumps(evaluate(answers, MODULAR, model="m").as_json(), ensure_ascii=False)
    assert text.encode().count(b"a?") == 4


def test_a_transcript_stays_short() -> None:
    """A thought of a hundred thousand letters keeps its two ends; problems go from the lowest level to the highest, few
    are shown all, and none twice."""
    text = "<think>" + "a" * 50_000 + "b" * 50_000 + "</think>7"
    reading = read(text, MODULAR.layout, starts_thinking=False, finished=True)
    thought = Transcript.of(Problem("q"), Answer(text, True), reading, right=True).thought
    assert len(thought) < LONGEST + 50
    assert (thought[0], thought[-1]) == ("a", "b")
    assert [one.level for one in shown([Problem(str(level), level=level) for level in (5, 3, 1, 4, 2)])] == [1, 2, 4, 5]
    for count in (1, 2, 3, 4, 9):
        assert len(set(map(id, shown([Problem(str(place)) for place in range(count)])))) == min(count, 4)


def test_language_is_that_of_the_thoughts_with_words() -> None:
    """Half of the thoughts are English and half Chinese, and figures count for nothing; figures alone give no share."""
    said = {0: "so it is", 1: "所以", 2: "1+1", 3: "1+1"}
    answers = Scripted(lambda p, n, b: f"<think>{said[n]}</think>{p.answer}")
    found = evaluate(answers, MODULAR, model="m")
    assert found.measurements[0].as_json()["language"] == 0.5
    assert found.measurements[0].as_json()["language_thoughts"] == 2 * 8
    assert evaluate(Scripted(lambda p, n, b: p.answer), MODULAR, model="m").measurements[0].language is None


def test_order_changes_nothing() -> None:
    """Samples and problems in another order give the same measurement."""
    draw = random.Random(2)
    tried = [
        Tried(
            Problem(str(number), level=1 + number % 3),
            tuple(
                Graded(
                    Answer("", True, 3, draw.randint(1, 9), 1),
                    Reading("", "", True, ""),
                    draw.choice("abc"),
                    float(draw.random() < 0.4),
                    draw.choice([None, 0.5, 1.0]),
                )
                for _ in range(4)
            ),
        )
        for number in range(12)
    ]
    mixed = [Tried(one.problem, tuple(draw.sample(one.samples, 4))) for one in draw.sample(tried, len(tried))]
    first, second = (measured("t", None, one, MODULAR, Spent()) for one in (tried, mixed))
    assert repr(second.as_json()) == repr(first.as_json())


@pytest.mark.parametrize("end", [KeyboardInterrupt(), UserError("the endpoint is gone")])
def test_what_was_measured_is_kept(end: BaseException) -> None:
    """Ctrl-C or an error in the fifth problem leaves the four before it, and says why there are no more."""
    count = iter(range(100))
    answers = Scripted(lambda problem, number, budget: end if next(count) == 4 * MODULAR.samples else problem.answer)
    found = evaluate(answers, MODULAR, model="m")
    assert found.measurements[0].problems == 4
    assert found.measurements[0].pass_at_1.value == 1
    assert found.stopped == (INTERRUPTED if isinstance(end, KeyboardInterrupt) else str(end))
    assert found.as_json()["complete"] is False
    assert answers.closed == 1


def test_where_nothing_was_measured_the_error_is_raised() -> None:
    """An error before the first problem has ended is the caller's."""
    for end in (KeyboardInterrupt(), UserError("gone")):
        with pytest.raises(type(end)):
            evaluate(Scripted(lambda problem, number, budget, end=end: end), MODULAR, model="m")


def test_a_real_engine() -> None:
    """A random model: thoughts keep to their budget, and the same seed gives the same numbers, another one others."""
    settings = MODULAR.replace(budgets=(0, 5), prompt={"style": "template", "opens_thought": True}, temperature=1.0)
    with engine_of(build(MLA)) as engine:
        answers = EngineAnswers(engine, TAGGED)
        found, again = (evaluate(answers, settings, model="m") for _ in range(2))
        other = evaluate(answers, settings.replace(seed=9), model="m")
    assert _timeless(found) == _timeless(again)
    assert _timeless(found) != _timeless(other)
    free, none, five = found.measurements
    assert (none.thought_tokens.mean, five.thought_tokens.median) == (0, 5)
    assert 4 < five.thought_tokens.mean <= 5 < free.thought_tokens.mean
    assert free.problems == five.problems == 8
    assert free.cost.completion_tokens <= 8 * 4 * settings.max_tokens


def test_a_prompt_that_does_not_fit_is_left_out_and_counted() -> None:
    """Problems whose prompt fills the context are not measured; where none fits, that is an error."""
    with engine_of(build(MLA), context=12) as engine:
        answers = EngineAnswers(engine, TAGGED)
        found = evaluate(answers, MODULAR.replace(levels=8), model="m").measurements[0]
        assert 0 < found.left_out == 8 - found.problems
        assert "context is 12" in found.left_out_for
        with pytest.raises(UserError, match="no problem could be answered: its prompt has"):
            evaluate(answers, MODULAR.replace(prompt={"style": "zero"}), model="m")


class Stalls:
    """An engine that answers prompts of one token alone; of the others, those that nobody cancels fail in the end."""

    context = 100

    def __init__(self) -> None:
        self.cancelled = 0
        self.left: list[threading.Timer] = []

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> SimpleNamespace:
        def end(reason: FinishReason) -> None:
            deliver(Chunk("answer", "", [65, 256], None, Usage(), reason))

        if len(request.prompt_ids) == 1:
            end("stop")
            return SimpleNamespace(cancel=lambda: None)
        late = threading.Timer(5.0, end, ["error"])
        self.left.append(late)
        late.start()

        def cancel() -> None:
            self.cancelled += 1
            late.cancel()
            end("cancelled")

        return SimpleNamespace(cancel=cancel)


def test_leaving_early_gives_up_what_is_under_way() -> None:
    """After the first reply, closing the iterator cancels the requests of all problems that are being answered."""
    engine, settings = Stalls(), MODULAR.replace(samples=64)
    replies = EngineAnswers(engine, TAGGED).replies(
        [Problem("1"), *(Problem(f"{number}+1=") for number in range(20))], settings, budget=None
    )
    assert next(replies).problem.question == "1"
    replies.close()
    assert len(engine.left) == engine.cancelled > 0
    assert len(engine.left) < 20 * 64


BAD = {
    "task": (MODULAR.replace(tasks=("modullar",)), "unknown task 'modullar'.*'modular'"),
    "level": (MODULAR.replace(levels=99), "levels = 99, but task modular has"),
    "template": (MODULAR.replace(prompt={"style": "chat"}), "no chat template"),
    "tags": (MODULAR.replace(budgets=(4,)), "budgets: .*<think>"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_measured_is_refused_at_once(name: str) -> None:
    """One line that says what is wrong, before anything is drawn."""
    settings, said = BAD[name]
    with engine_of(build(MLA), PLAIN) as engine:
        with pytest.raises(UserError, match=said) as refusal:
            evaluate(EngineAnswers(engine, PLAIN), settings, model="m")
        assert "\n" not in str(refusal.value)
        assert engine.statistics().completion_tokens == 0


def test_a_file_without_held_out_problems_is_refused(tmp_path: Path) -> None:
    """Problems that are all for training cannot be measured on."""
    file = tmp_path / "all.jsonl"
    file.write_text('{"question": "1+1", "answer": "2", "split": "train"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="none of them held out"):
        evaluate(Scripted(lambda p, n, b: ""), MODULAR.replace(tasks=(str(file),), levels=1), model="m")


def test_settings_that_contradict_each_other() -> None:
    """A vote over more answers than are drawn, a budget twice, no task."""
    for given, said in (
        ({"samples": 4, "consensus": [8]}, "consensus over 8 answers needs as many samples, and samples = 4"),
        ({"budgets": [3, 3]}, "budgets has the same value twice"),
        ({"tasks": []}, "tasks"),
    ):
        with pytest.raises(UserError, match=said):
            EvaluationSettings.parse({"tasks": ["modular"], **given}, where="eval")
    assert MODULAR.sizes == MODULAR.votes == (1, 2, 4)
    assert MODULAR.replace(samples=7, consensus=(7, 1)).votes == (1, 7)
