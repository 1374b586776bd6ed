"""Checks in processes of their own, whatever they do."""

import os
import pickle
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from fathom.config.rewards import Rewards
from fathom.errors import UserError
from fathom.tasks import checker as checker_module
from fathom.tasks.check_worker import Chunk
from fathom.tasks.checker import Checker, Sample
from fathom.tasks.programs import Programs
from fathom.tasks.rewards import score
from fathom.tasks.task import Problem, Verdict
from tests.tasks.broken import Broken

PROBLEM = Problem("?", "42")


@pytest.fixture(autouse=True)
def _no_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported by a first check here, so it needs no more time than others."""
    monkeypatch.setattr(checker_module, "_FIRST_SECONDS", 0.0)


@pytest.fixture(scope="module")
def shared() -> Iterator[Checker]:
    with Checker(Broken(), seconds=1.0, workers=2) as checker:
        yield checker


def scores(checker: Checker, answers: list[str | None]) -> list[float]:
    return [verdict.score for verdict in checker.check_all([(PROBLEM, answer) for answer in answers])]


def test_order_is_kept(shared: Checker) -> None:
    """A batch far larger than a chunk comes back in its order, answers that were not found among it."""
    answers = ["42" if place % 3 else "41" for place in range(500)]
    answers[7] = None
    assert scores(shared, answers) == [float(answer == "42") for answer in answers]
    assert shared.check_all([]) == []


def test_rewards_are_those_of_score(shared: Checker) -> None:
    """A batch earns what its completions earn one by one, faults included."""
    settings = Rewards(language=1.0, overlong=1.0)
    samples = [
        Sample(PROBLEM, f"<think>it is {word}</think><answer>{answer}</answer>", tokens, finished)
        for answer in ("42", "41", "raise", "nan", "", "</answer>")
        for word, tokens, finished in (("so", 10, True), ("六", 95, True), ("so", 100, False))
    ]
    assert shared.score_all(samples, max_tokens=100, starts_thinking=False, settings=settings) == [
        score(
            Broken(),
            sample.problem,
            sample.completion,
            tokens=sample.tokens,
            max_tokens=100,
            finished=sample.finished,
            starts_thinking=False,
            settings=settings,
        )
        for sample in samples
    ]


@pytest.mark.parametrize("bad", ["hang", "hang in C", "deaf"])
def test_a_hung_check_is_stopped(shared: Checker, bad: str) -> None:
    """It scores 0, is named and counted; neighbours in its chunk keep their scores, and so does a next batch."""
    hung = shared.hung
    verdicts = shared.check_all([(PROBLEM, bad if place == 5 else "42") for place in range(40)])
    assert [verdict.score for verdict in verdicts] == [float(place != 5) for place in range(40)]
    assert verdicts[5].fault == "broken: its check took over 1 s"
    assert shared.hung == hung + 1
    assert scores(shared, ["42", "41"]) == [1.0, 0.0]


@pytest.mark.parametrize("bad", ["exit", "leave", "crash"])
def test_a_check_that_ends_its_process_is_to_blame_alone(shared: Checker, bad: str) -> None:
    """It is tried twice, scores 0 and is named; no other answer loses by it."""
    lost = shared.lost
    verdicts = shared.check_all([(PROBLEM, bad if place == 5 else "42") for place in range(40)])
    assert [verdict.score for verdict in verdicts] == [float(place != 5) for place in range(40)]
    assert verdicts[5].fault == "broken: its check ended its process"
    assert shared.lost == lost + 2


def test_a_killed_process_costs_no_answer(shared: Checker, tmp_path: Path) -> None:
    """A process killed once, in the midst of a check or between batches, is replaced, and the check is done again."""
    assert scores(shared, [f"once {tmp_path / 'flag'}", "42"]) == [1.0, 1.0]
    for worker in shared._workers:
        worker._process.kill()
    assert scores(shared, ["42"] * 50) == [1.0] * 50


def test_output_of_a_check_harms_nobody(shared: Checker, capfd: pytest.CaptureFixture[str]) -> None:
    """What checks print is neither a verdict nor on the terminal; a closed output is their own loss."""
    assert scores(shared, ["print", "42", "close", "print", "42"]) == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert capfd.readouterr() == ("", "")


def test_what_a_hung_check_started_dies_with_it(shared: Checker, tmp_path: Path) -> None:
    """No process is left behind by a check that started one."""
    flag = tmp_path / "child"
    assert scores(shared, [f"child {flag}"]) == [0.0]
    child = int(flag.read_text())
    for _ in range(100):  # whoever inherits it has to take note of its end
        if not _runs(child):
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_is_left_after_closing() -> None:
    """Leaving the `with` ends every process."""
    with Checker(Broken(), workers=2) as checker:
        processes = [worker._process.pid for worker in checker._workers]
    assert not any(_runs(process) for process in processes)


def test_a_process_that_nobody_stops_ends_itself() -> None:
    """A check that hangs after its checker was killed does not run for ever, though it never lets go of Python."""
    worker = checker_module._Worker("broken", pickle.dumps(Broken()))
    worker.await_ready()
    worker.connection.send(Chunk([(PROBLEM, "hang in C")], 0.2))
    assert worker._process.wait(timeout=60) == 1
    worker.kill()


def test_checks_that_always_hang_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many in a row are the task's fault: the run is told so instead of waiting for all of them."""
    monkeypatch.setattr(checker_module, "_HUNG_IN_A_ROW", 3)
    with (
        Checker(Broken(), seconds=0.1, workers=2) as checker,
        pytest.raises(UserError, match=r"task broken: 3 checks in a row took over 0\.1 s"),
    ):
        scores(checker, ["hang"] * 1000)


def test_a_task_by_its_name(tmp_path: Path) -> None:
    """A built-in task and one out of a file are opened anew in the processes."""
    with Checker("arithmetic", workers=1) as checker:
        problems = list(islice(checker.task.problems("train"), 8))
        assert [verdict.score for verdict in checker.check_all([(p, p.answer) for p in problems])] == [1.0] * 8
    file = tmp_path / "mine.py"
    file.write_text(
        "from fathom.tasks import Problem, Task\n"
        "class Mine(Task):\n"
        "    def problem(self, random, level):\n        return Problem('?', 'yes')\n"
        "    def check(self, problem, answer):\n        return float(answer == problem.answer)\n"
    )
    with Checker(f"{file}:Mine", workers=1) as checker:
        assert checker.check_all([(Problem("?", "yes"), "yes")]) == [Verdict(1.0)]
        with pytest.raises(UserError, match="name the task instead"), Checker(checker.task, workers=1):
            pass


def test_what_cannot_be_sent_is_said() -> None:
    """A task that cannot be pickled, and a problem that cannot, are one line each."""

    class Local(Broken):
        pass

    with pytest.raises(UserError, match="give its name"):
        Checker(Local())
    with Checker(Broken(), workers=1) as checker, pytest.raises(UserError, match="cannot be sent to its check"):
        checker.check_all([(Problem("?", data={"rule": lambda: 1}), "42")])


def test_programs_are_checked_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task with a sandbox of its own is asked in this process, in order, and what it raises is a fault."""
    monkeypatch.setattr(Programs, "check", lambda task, problem, answer: float(int(answer) == os.getpid()))
    with Checker("programs", workers=3) as checker:
        verdicts = checker.check_all([(PROBLEM, str(os.getpid())), (PROBLEM, "x"), (PROBLEM, None), (PROBLEM, "1")])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0]
    assert [bool(verdict.fault) for verdict in verdicts] == [False, True, False, False]


@pytest.mark.parametrize("base", ["Task", "Programs"])
def test_a_task_cannot_claim_a_sandbox(tmp_path: Path, base: str) -> None:
    """A user's task is stopped when its check hangs, whatever it says of itself and whatever it is derived from."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import time\n"
        "from fathom.tasks import Problem, Task\n"
        "from fathom.tasks.programs import Programs\n"
        f"class Mine({base}):\n"
        "    name = 'programs'\n    runs_programs = in_sandbox = True\n"
        "    def problem(self, random, level):\n        return Problem('?')\n"
        "    def check(self, problem, answer):\n        time.sleep(5 * (answer == 'hang'))\n        return 1.0\n"
    )
    with Checker(f"{file}:Mine", seconds=1.0, workers=1) as checker:
        verdicts = checker.check_all([(PROBLEM, "hang"), (PROBLEM, "42")])
    assert [verdict.score for verdict in verdicts] == [0.0, 1.0]
    assert "its check took over 1 s" in verdicts[0].fault
