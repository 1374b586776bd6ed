"""The verb `fathom tasks` as a person meets it."""

import io
import re

import pytest

from fathom.cli import main
from fathom.tasks import open_task
from fathom.tasks.catalogue import BUILT_IN


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_list_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    """Every built-in task has its row with levels and a problem; reasoning-gym's datasets are named."""
    pytest.importorskip("reasoning_gym")
    code, out, err = _run(capsys, "tasks", "list")
    assert (code, err) == (0, "")
    for name in BUILT_IN:
        assert re.search(rf"^{name} +{open_task(name).levels} +\S", out, re.MULTILINE), name
    assert "chain_sum, " in out
    assert "gym:NAME" in out


def test_show_prints_question_thought_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Problems are those that `problems` makes, with what is worked out and the answer."""
    code, out, _ = _run(capsys, "tasks", "show", "modular?corrections=0", "--level", "2", "--seed", "3", "--count", "2")
    source = open_task("modular").problems("train", level=2, seed=3)
    assert code == 0
    for number in (1, 2):
        problem = next(source)
        assert f"\n{number}. {problem.question}\nworked: {problem.question[0]}" in out
        assert f"\nanswer: {problem.answer}\n" in out


def test_same_command_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Corrections in worked solutions come from the seed too."""
    first, second = (_run(capsys, "tasks", "show", "modular?corrections=0.5", "--level", "9") for _ in range(2))
    assert first == second
    assert "!" in first[1]


def test_try_says_what_is_right(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are read from standard input; its end is the end, with the count of right ones."""
    source = open_task("arithmetic").problems("held-out", seed=1)
    first, second = next(source), next(source)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{first.answer}\nno idea\n"))
    code, out, err = _run(capsys, "tasks", "try", "arithmetic", "--seed", "1", "--split", "held-out")
    assert (code, err) == (0, "")
    assert f"{first.question}\nright\n" in out
    assert f"{second.question}\nwrong: {second.answer}\n" in out
    assert out.endswith("\n1 of 2 right\n")


def test_try_ends_after_count(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No more problems are asked than were wanted."""
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n" * 10))
    assert _run(capsys, "tasks", "try", "arithmetic", "--count", "2")[1].endswith("\n0 of 2 right\n")


def test_interrupt_ends_politely(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a question waits ends with the score and exit code 0."""

    class Interrupted(io.StringIO):
        def readline(self, *_: int) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    code, out, err = _run(capsys, "tasks", "try", "arithmetic")
    assert (code, err) == (0, "")
    assert out.endswith("\n0 of 0 right\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks", "shwo"], "unknown command 'shwo' (did you mean 'show'?)"),
        (["tasks", "show"], "required: NAME"),
        (["tasks", "show", "modulr"], "did you mean 'modular'?"),
        (["tasks", "show", "modular", "--level", "99"], "level 99 is not among 1 to 12"),
        (["tasks", "show", "modular", "--level", "0"], "not a whole number of at least 1"),
        (["tasks", "show", "modular", "--split", "dev"], "invalid choice: 'dev'"),
        (["tasks", "try", "modular?x=1"], "unknown option 'x'"),
    ],
)
def test_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is mistyped is said in one line with exit code 2."""
    code, out, err = _run(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
