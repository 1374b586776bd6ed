"""Problems out of a JSON Lines file."""

import itertools
import json
import threading
from pathlib import Path

import pytest

from fathom.errors import UserError
from fathom.tasks import Problem, Task, open_task
from fathom.tasks.task import judge
from tests.tasks.hostile import HOSTILE

pytest.importorskip("math_verify")


def _file(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def _task(tmp_path: Path, answer: object) -> tuple[Task, Problem]:
    task = open_task(_file(tmp_path, {"question": "?", "answer": answer, "split": "train"}))
    return task, next(task.problems("train"))


@pytest.mark.parametrize(
    ("right", "answers", "wrong"),
    [
        ("42", ["42", "42.0", "$42$", "\\boxed{42}", "84/2", "\\frac{84}{2}"], ["6*7", "40+2", "41 or 42", "42 42"]),
        (42, ["42", "４２"], ["42 apples", "[42]", "x"]),
        ("7", ["7"], ["\\text{7 or 8}", "7, 8", "3+4", "\\sqrt{49}"]),
        ("She has 48 + 24 = <<48+24=72>>72 clips.\n#### 72", ["72"], ["48", "48 + 24"]),
        ("So it is $\\boxed{\\frac{3}{4}}$.", ["3/4", "0.75", "\\frac{6}{8}"], ["3/5", "4/3"]),
        ("1,234", ["1234", "1,234", "1{,}234"], ["1,23", "1"]),
        ("x^2 + 2x + 1", ["(x+1)^2", "$2x+x^2+1$", "x**2+2*x+1"], ["x^2+2x", "x^2+2x+1 or x", "y^2+2y+1"]),
        ("2\\sqrt{2}", ["\\sqrt{8}", "2\\sqrt2"], ["\\sqrt{2}", "2", "1 2\\sqrt{2}"]),
        ("\\{1, 2\\}", ["\\{2, 1\\}"], ["\\{1\\}", "1"]),
        ("Paris", ["paris", " Paris. "], ["London", "Paris or London", "not Paris"]),
        ("(B)", ["(B)", "(b)"], ["B or C", "(A)", "(A)(B)"]),
        ("北京", ["北京"], ["上海"]),
    ],
)
def test_equal_answers_are_right_and_others_wrong(
    tmp_path: Path, right: object, answers: list[str], wrong: list[str]
) -> None:
    """Numbers compare as numbers, mathematics by value, words as words; an alternative or a sum is no answer."""
    task, problem = _task(tmp_path, right)
    assert [text for text in answers if task.check(problem, text) != 1] == []
    assert [text for text in wrong if judge(task, problem, text).score != 0] == []


@pytest.mark.parametrize("right", ["42", "x^2+1", "Paris"])
def test_hostile_answers_score_nothing(tmp_path: Path, right: str) -> None:
    """No text that is endless, nested, empty or foreign is right, and none stops the run."""
    task, problem = _task(tmp_path, right)
    assert [text[:20] for text in HOSTILE if judge(task, problem, text).score != 0] == []


def test_mathematics_is_compared_in_any_thread(tmp_path: Path) -> None:
    """The comparison needs neither the main thread nor its alarm clock."""
    task, problem = _task(tmp_path, "\\sqrt{8}")
    verdicts = []
    threads = [
        threading.Thread(target=lambda text=text: verdicts.append((text, judge(task, problem, text).score)))
        for text in ("2\\sqrt{2}", "3\\sqrt{2}") * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdicts) == [("2\\sqrt{2}", 1.0)] * 2 + [("3\\sqrt{2}", 0.0)] * 2


def test_endless_mathematics_is_a_fault_and_the_next_answer_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A formula that would take for ever scores 0 and says why; nothing of it is left for the next."""
    monkeypatch.setattr("fathom.tasks.isolation.SECONDS", 1)
    task, problem = _task(tmp_path, "x^2+1")
    verdict = judge(task, problem, "9^{9^{9^{9^{9}}}} + \\sum_{n=1}^{10^{9}} \\sin(n)")
    assert verdict.score == 0
    assert judge(task, problem, "1+x^2").score == 1


def test_rows_say_level_split_and_language(tmp_path: Path) -> None:
    """A row's own level, split and language are those of its problem; `test` is held out."""
    task = open_task(
        _file(
            tmp_path,
            {"question": "a", "answer": "1", "split": "train"},
            {"problem": "b", "answer": "2", "split": "test", "level": 1, "language": "zh"},
            {"question": "c", "answer": "3", "split": "held-out", "level": 2},
            "",
        )
    )
    assert task.levels == 2
    held_out = next(task.problems("held-out"))
    assert (held_out.question, held_out.language, held_out.held_out) == ("b", "zh", True)
    assert {p.question for p in itertools.islice(task.problems("train"), 5)} == {"a"}
    assert next(task.problems("held-out", level=2)).question == "c"
    with pytest.raises(UserError, match="level 2 has too few different problems, none of them for training"):
        next(task.problems("train", level=2))


def test_rows_without_split_are_divided_by_hash(tmp_path: Path) -> None:
    """About a tenth of a file is held out, and never trained on."""
    task = open_task(_file(tmp_path, *({"question": f"{n} + 0?", "answer": n} for n in range(200))))
    train, held_out = (
        {p.question for p in itertools.islice(task.problems(split), 2000)} for split in ("train", "held-out")
    )
    assert not train & held_out
    assert len(train | held_out) > 195
    assert 5 < len(held_out) < 40


def test_questions_that_differ_in_case_or_space_are_never_divided(tmp_path: Path) -> None:
    """The hash puts both on one side, so that no held-out question was trained on in another dress."""
    rows = [
        {"question": form.format(n), "answer": n} for n in range(200) for form in ("What is {}?", " what  IS {}?\n")
    ]
    task = open_task(_file(tmp_path, *rows))
    train, held_out = (
        {" ".join(p.question.split()).lower() for p in itertools.islice(task.problems(split), 4000)}
        for split in ("train", "held-out")
    )
    assert not train & held_out
    assert held_out


def test_no_spelling_of_a_held_out_question_is_learnt(tmp_path: Path) -> None:
    """Where one is held out by its hash, training passes over all; what is held out stays as it was."""
    spellings = ("What is {}+1?", "What is {} + 1", "what is {} +1 ?")
    rows = [{"question": form.format(n), "answer": n + 1} for n in range(100) for form in spellings]
    task = open_task(_file(tmp_path, *rows))
    by_hash = {q for row in rows if Problem(q := row["question"], key=" ".join(q.split()).lower()).held_out}
    leaks = {row["answer"] - 1 for row in rows if row["question"] in by_hash}
    assert len(leaks) > 10
    assert {p.question for p in itertools.islice(task.problems("held-out"), 4000)} == by_hash
    assert {int(p.answer) - 1 for p in itertools.islice(task.problems("train"), 4000)} == set(range(100)) - leaks
    few = [rows[3 * n + place] for n in leaks for place in range(3) if rows[3 * n + place]["question"] not in by_hash]
    both = [next(row for row in rows if row["answer"] == few[0]["answer"] and row["question"] in by_hash), few[0]]
    with pytest.raises(UserError, match="level 1 has nothing for training that is not held out as well"):
        next(open_task(_file(tmp_path, *both)).problems("train"))


def test_a_split_of_somebody_s_own_is_kept_apart_too(tmp_path: Path) -> None:
    """A training row that asks a held-out one with other signs between the words is passed over, and none is refused
    for it: `f'(2)` may be meant to be no `f(2)`."""
    rows = [("What is 2+3?", "test"), ("what is 2 + 3", "train"), ("What is f'(2)?", "train"), ("f(2)", "train")]
    task = open_task(_file(tmp_path, *({"question": q, "answer": "5", "split": split} for q, split in rows)))
    assert {p.question for p in itertools.islice(task.problems("train"), 50)} == {"What is f'(2)?", "f(2)"}
    assert {p.question for p in itertools.islice(task.problems("held-out"), 50)} == {"What is 2+3?"}


def test_other_keys_are_left_alone(tmp_path: Path) -> None:
    """What public files have besides is nobody's mistake."""
    row = {"question": "a", "answer": "1", "level": 1, "levels": 2, "id": 1, "source": "x", "label": 1, "type": "t"}
    assert next(open_task(_file(tmp_path, row | {"subject": "s", "unique_id": "u"})).problems("train")).level == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "rows.jsonl: no rows"),
        (["{"], "rows.jsonl:1: not JSON"),
        (["[" * 100_000], "rows.jsonl:1: not JSON"),
        ([[1]], "rows.jsonl:1: a row is an object with 'question' and 'answer', not list"),
        (
            [{"question": "a", "answer": "1"}, {"q": "b"}],
            "rows.jsonl:2: the row has no 'question' or 'problem'; it has q",
        ),
        ([{"question": "a"}], "rows.jsonl:1: the row has no 'answer'; it has question"),
        ([{"question": "a", "answer": None}], "rows.jsonl:1: 'answer' is null, not a text"),
        ([{"question": "a", "answer": True}], "rows.jsonl:1: 'answer' is true, not a text"),
        ([{"question": "", "answer": "1"}], "rows.jsonl:1: 'question' is empty"),
        ([{"question": "a", "answer": "so ####"}], "rows.jsonl:1: 'answer' is empty"),
        (['{"question": "a", "answer": "\\ud800"}'], r"rows.jsonl:1: '\ud800' is half a character"),
        (
            ['{"question": "a", "answer": "1"}', '{"question": "\\udc00", "answer": "1"}'],
            r"rows.jsonl:2: '\udc00' is half",
        ),
        (['{"question": "a", "answer": 1e400}'], "rows.jsonl:1: 'answer' is larger than any number"),
        (['{"question": "a", "answer": NaN}'], "rows.jsonl:1: not JSON: NaN is no number"),
        (['{"question": "a", "answer": -Infinity}'], "rows.jsonl:1: not JSON: -Infinity is no number"),
        ([{"question": "a", "answer": "1", "level": 0}], "rows.jsonl:1: 'level' = 0"),
        ([{"question": "a", "answer": "1", "level": "hard"}], "rows.jsonl:1: 'level' = 'hard'"),
        ([{"question": "a", "answer": "1", "split": "dev"}], "rows.jsonl:1: 'split' = 'dev'"),
        ([{"question": "a", "answer": "1", "split": ["x"]}], "rows.jsonl:1: 'split' = ['x']"),
        ([{"question": "a", "answer": "1", "language": "fr"}], "rows.jsonl:1: 'language' = 'fr'"),
        (
            [{"question": "a", "answer": "1", "split": "train"}, {"question": "b", "answer": "1"}],
            "some rows have 'split' and some have none",
        ),
        (
            [{"question": "a", "answer": "1", "split": "train"}, {"question": "a", "answer": "1", "split": "test"}],
            "a question is both for training and held out: 'a'",
        ),
        (
            [
                {"question": "Same?\t", "answer": "1", "split": "test"},
                {"question": " same? ", "answer": "1", "split": "train"},
            ],
            "(rows 2 and 1); leave one out",
        ),
        ([{"question": "a", "answer": "1", "splt": "test"}], "rows.jsonl:1: 'splt' is not read (did you mean 'split'?"),
        ([{"question": "a", "answer": "1", "Level": 3}], "rows.jsonl:1: 'Level' is not read (did you mean 'level'?"),
        ([{"question": "a", "answer": "1", "lang": "zh"}], "'lang' is not read (did you mean 'language'?"),
    ],
)
def test_bad_row_is_named_in_one_line(tmp_path: Path, rows: list[object], said: str) -> None:
    """What is wrong with a file is said with the file, the line and the field."""
    with pytest.raises(UserError) as error:
        open_task(_file(tmp_path, *rows))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_file_is_one_line(tmp_path: Path) -> None:
    """A file that is not there, a folder, and bytes that are no text are each said."""
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.jsonl").mkdir()
    for name, said in (("none", "no such file"), ("bytes", "not UTF-8 text"), ("folder", "directory")):
        with pytest.raises(UserError, match=said):
            open_task(str(tmp_path / f"{name}.jsonl"))


def test_level_without_rows_is_one_line(tmp_path: Path) -> None:
    """A gap between levels is said with the levels that there are."""
    task = open_task(_file(tmp_path, {"question": "a", "answer": "1", "level": 3}))
    with pytest.raises(UserError, match="no row has level 2; levels: 3"):
        next(task.problems("train", level=2))
