"""What is under way when somebody asks to stop, and what a crash leaves."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.cli import main
from fathom.config import dump_recipe
from fathom.config.rl import RLRecipe
from fathom.data import train_bpe
from fathom.engine.protocol import Chunk, Request, Usage
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from fathom.model.transformer import Transformer
from fathom.report.measurements import Measurements
from fathom.tasks.checker import Checker
from fathom.tasks.programs import Programs
from fathom.tasks.task import Problem
from fathom.train.metrics import MetricsLog, read_metrics
from fathom.train.rollout import draw
from fathom.train.run import RunFolder, RunResult
from fathom.train.signals import Stopped
from tests.tasks.broken import Broken
from tests.train.tiny import MODEL

ROOT = Path(__file__).parents[2]
SLOW = """
import time
from fathom.tasks import Problem, Task


class Slow(Task):
    def problem(self, random, level):
        return Problem(str(random.random()))

    def check(self, problem, answer):
        open(f"{__file__}.checking", "w").close()
        time.sleep(600)
"""


def after(calls: int) -> Callable[[], None]:
    """Heeds a stop from the call of that number on."""
    counter = itertools.count(1)

    def heed() -> None:
        if next(counter) >= calls:
            raise Stopped

    return heed


class Endless:
    """An engine whose completions end by being cancelled, and in no other way."""

    context = 100

    def __init__(self) -> None:
        self.cancelled = 0

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> "Endless._Ticket":
        return self._Ticket(self, deliver)

    class _Ticket:
        def __init__(self, engine: "Endless", deliver: Callable[[Chunk], None]) -> None:
            self._engine, self._deliver = engine, deliver

        def cancel(self) -> None:
            self._engine.cancelled += 1
            self._deliver(Chunk("answer", "", [], None, Usage(), "cancelled"))


def test_completions_under_way_are_cancelled() -> None:
    """A rollout that is to stop cancels every request and waits for no other end of theirs."""
    engine = Endless()
    with pytest.raises(Stopped):
        draw(engine, [Request([1], 4)] * 3, retries=2, heed=after(3))
    assert engine.cancelled == 3


def test_checks_under_way_are_ended() -> None:
    """Checks that would hang for a minute are ended with their processes."""
    with Checker(Broken(), seconds=60.0, workers=2, heed=after(5)) as checker:
        processes = [worker._process for worker in checker._workers]
        with pytest.raises(Stopped):
            checker.check_all([(Problem("?", "42"), "hang")] * 8)
        assert all(process.returncode is not None for process in processes)


def test_no_program_is_begun_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the programs that wait to be run none is run any more."""
    made: list[str] = []
    monkeypatch.setattr(Programs, "check", lambda task, problem, answer: float(made.append(answer) or 0))
    with Checker("programs", workers=1, heed=after(3)) as checker, pytest.raises(Stopped):
        checker.check_all([(Problem("?"), "1")] * 50)
    assert len(made) == 2


@pytest.fixture
def recipe(tmp_path: Path) -> RLRecipe:
    """A run whose first check takes ten minutes."""
    tokenizer = train_bpe(["0123456789"], 266)
    model = Transformer(MODEL.replace(vocab_size=tokenizer.vocab_size))
    model.init_weights(1)
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "slow.py").write_text(SLOW)
    return RLRecipe(
        name="run",
        model=str(tmp_path / "model"),
        task={"name": f"{tmp_path / 'slow.py'}:Slow", "check_seconds": 600},
        prompt={"style": "template"},
        rewards={"layout": {"form": "rest", "thoughts": "optional"}},
        rollout={"problems": 2, "samples": 2, "max_tokens": 4},
        eval={"problems": 2},
    )


def test_ctrl_c_ends_the_command_and_leaves_a_report(recipe: RLRecipe, tmp_path: Path) -> None:
    """The command, told to stop within a check, waits for nothing, says how to go on, names the report, and exits 130,
    so that nothing joined to it by `&&` begins."""
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "fathom.cli", "rl", "recipe.toml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "slow.py.checking").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert re.search(r"stopped at step 0; go on with: .*rl runs/run/recipe\.toml --resume", said)
    assert said.splitlines()[-1] == "wrote runs/run/report.html"
    assert (tmp_path / "runs/run/report.html").is_file()


@pytest.mark.parametrize("failure", [UserError("no room"), KeyError("loss")])
def test_a_report_that_fails_fails_no_run(
    recipe: RLRecipe,
    failure: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever keeps the report from being written is said in one line, and the command has succeeded."""

    def fails(_: Path) -> Path:
        raise failure

    monkeypatch.setattr("fathom.train.rl.train_rl", lambda *_, **__: RunResult(tmp_path, 1, None))
    monkeypatch.setattr("fathom.report.page.write_report", fails)
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    assert main(["rl", str(tmp_path / "recipe.toml")]) == 0
    assert capsys.readouterr().err == f"fathom: no report was written: {failure}\n"


def test_a_line_cut_short_is_left_out_with_a_note(tmp_path: Path) -> None:
    """What a crash leaves of the last line of metrics is passed over alike by whoever reads them and by resuming, each
    with a note; a line that is wrong and whole is refused with its number."""
    run = RunFolder(tmp_path)
    with MetricsLog(run, step=0) as log:
        log.write("train", 1, {"loss": 0.5})
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole + b'{"kind": "train", "step": 2, "lo')
    for read in (read_metrics, Measurements.of):
        with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 2, the last, is cut short"):
            found = read(run.metrics)
        assert [line["step"] for line in (found if isinstance(found, list) else found.train)] == [1]
    with pytest.warns(UserWarning, match="line 2, the last, is cut short"), MetricsLog(run, step=1):
        pass
    assert run.metrics.read_bytes() == whole
    run.metrics.write_bytes(whole + b'{"kind": "train", "step": 2, "lo\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a line of metrics"):
        read_metrics(run.metrics)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a line of metrics"):
        MetricsLog(run, step=1)
