"""The verb `fathom tasks` as a person meets it."""

import io
import json
import re
from pathlib import Path

import pytest

from fathom.cli import main
from fathom.errors import UserError
from fathom.tasks import Problem, open_task, programs
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


def test_list_prints_what_is_in_brackets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that installs the extra, a dataset and a question are shown as they are written."""

    def missing() -> list[str]:
        raise UserError("tasks of reasoning-gym need the package x: pip install 'fathom-lm[tasks]'")

    question = "Sort [b], [a] :smile:"
    monkeypatch.setattr("fathom.tasks.arithmetic.Modular.problem", lambda task, random, level: Problem(question))
    monkeypatch.setattr("fathom.tasks.gym.dataset_names", missing)
    code, out, _ = _run(capsys, "tasks", "list")
    assert code == 0
    assert out.endswith("pip install 'fathom-lm[tasks]'\n")
    assert question in out
    monkeypatch.setattr("fathom.tasks.gym.dataset_names", lambda: ["a[red]b[/]"])
    assert _run(capsys, "tasks", "list")[1].endswith("\na[red]b[/]\n")


def test_show_prints_question_thought_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Problems are those that `problems` makes, with what is worked out and the answer."""
    code, out, _ = _run(capsys, "tasks", "show", "modular?corrections=0", "--level", "2", "--seed", "3", "--count", "2")
    source = open_task("modular").problems("train", level=2, seed=3)
    assert code == 0
    for number in (1, 2):
        problem = next(source)
        assert f"\n{number}. {problem.question}\nworked: {problem.question[0]}" in out
        assert f"\nanswer: {problem.answer}\n" in out


def test_show_prints_no_row_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file with fewer rows than are wanted every row is shown, once."""
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"[{n}]?", "answer": n, "split": "train"} for n in range(3)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = _run(capsys, "tasks", "show", "q.jsonl", "--count", "9")
    assert code == 0
    assert sorted(re.findall(r"^\d\. (.*)$", out, re.MULTILINE)) == ["[0]?", "[1]?", "[2]?"]


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


def test_try_runs_programs_where_it_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sandbox a program is refused before a question is asked; `--sandbox none` runs it."""

    def ask(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("def f(x): return 2 * x\n"))
        return _run(capsys, "tasks", "try", "programs", "--count", "1", *words)

    data = {"function": "f", "inputs": [(1,), (2,)], "expected": [2, 4]}
    monkeypatch.setattr(programs.Programs, "problem", lambda *_: Problem("Double it.", split="train", data=data))
    monkeypatch.setattr("fathom.tasks.sandbox.launch.shutil.which", lambda _: None)
    try:
        code, out, err = ask()
        assert (code, out) == (2, "")
        assert "fathom tasks try … --sandbox none" in err
        assert err.count("\n") == 1
        code, out, err = ask("--sandbox", "none")
        assert code == 0
        assert "programs run unprotected" in err
        assert out.endswith("\nDouble it.\nright\n1 of 1 right\n")
    finally:
        programs.use_sandbox()  # ends the one that was made


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
