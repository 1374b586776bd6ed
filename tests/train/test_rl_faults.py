"""Reinforcement learning while things go wrong around it: killed, a full disk, an endpoint that dies, a bad check."""

import errno
import functools
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fathom.engine.remote as remote
import fathom.train.rl as module
from fathom.config import dump_recipe
from fathom.config.rl import RLRecipe
from fathom.data import Tokenizer
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from fathom.model.transformer import Transformer
from fathom.tasks import checker, programs
from fathom.tasks.sandbox import Outcome, Sandbox
from fathom.train import state
from fathom.train.run import RunFolder, latest
from tests.tasks.test_sandbox import contained
from tests.train import test_rl
from tests.train.test_rl import changed, lines, run, weights
from tests.train.tiny import MODEL

recipe, start = test_rl.recipe, test_rl.start  # fixtures, of this file too
QUIET = {"eval": {"probe": False, "every": 99}}

MOODY = '''
import math
from pathlib import Path

from fathom.tasks import Problem, Task

HUNG = Path(__file__).with_suffix(".hung")


class Moody(Task):
    """Of answers by their length: some make it raise, some give no number, and one hangs."""

    def problem(self, random, level):
        return Problem(str(random.randrange(10**6)), level=level)

    def check(self, problem, answer):
        length = len(answer.encode())
        if length == 2:
            raise RuntimeError("no idea")
        if length == 3:
            return math.nan
        if length > 4:
            try:
                HUNG.touch(exist_ok=False)
            except FileExistsError:
                return float(length % 2)
            while True:
                pass
        return float(length % 2)
'''


def test_a_killed_run_goes_on_as_if_it_had_not_been(recipe: RLRecipe, tmp_path: Path) -> None:
    """SIGKILL in the midst of the fourth step costs what came after the checkpoint of the second, and nothing else."""
    unbroken, _ = run(recipe, tmp_path / "one")
    file = tmp_path / "recipe.toml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "tests.train.rl_killed", str(file), str(tmp_path / "two"), "4"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    folder = tmp_path / "two" / "run"
    assert [path.name for path in RunFolder(folder).checkpoints.glob("step_*")] == ["step_00000002"]
    resumed, said = run(recipe, tmp_path / "two", resume=True)
    assert "resuming from step 2" in said
    assert weights(resumed) == weights(unbroken)
    assert lines(resumed) == lines(unbroken)


def test_two_cannot_train_in_one_folder(
    recipe: RLRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second run in the folder is refused, whatever it is asked to do, and the first is none the worse."""
    recipe = changed(recipe, QUIET)
    alone, _ = run(recipe, tmp_path / "alone")
    original = module.update

    def update(*arguments: Any) -> dict[str, Any]:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="another process is training here"):
                run(recipe, tmp_path / "both", **options)
        return original(*arguments)

    monkeypatch.setattr(module, "update", update)
    first, _ = run(recipe, tmp_path / "both")
    assert weights(first) == weights(alone)


def test_a_full_disk_leaves_the_earlier_checkpoint(
    recipe: RLRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that is full at the second checkpoint ends the run in one line that names the first, which is whole; with
    room again the run ends where the unbroken one does."""
    recipe = changed(recipe, QUIET)
    unbroken, _ = run(recipe, tmp_path / "one")
    original = state.sync

    def full(path: Path) -> None:
        if any("step_00000004" in part for part in path.parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(state, "sync", full)
        with pytest.raises(UserError, match=r"step 4: .*No space left on device.*step_00000002 is intact") as error:
            run(recipe, tmp_path / "two")
    assert "\n" not in str(error.value)
    folder = tmp_path / "two" / "run"
    assert [path.name for path in RunFolder(folder).checkpoints.iterdir()] == ["step_00000002"]
    assert latest(folder, pytest.fail) is not None
    resumed, _ = run(recipe, tmp_path / "two", resume=True)
    assert weights(resumed) == weights(unbroken)


def test_a_check_that_hangs_raises_or_gives_no_number(
    recipe: RLRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run survives all of them, learns from the answers that were judged, and counts every fault."""
    monkeypatch.setattr(checker, "_FIRST_SECONDS", 0.5)
    rules = tmp_path / "moody.py"
    rules.write_text(MOODY)
    faults: list[str] = []
    original = module.Roller.score

    def score(*arguments: Any, **named: Any) -> Any:
        scored = original(*arguments, **named)
        faults.extend(one.reward.fault for one in scored if one is not None and one.reward.fault)
        return scored

    monkeypatch.setattr(module.Roller, "score", score)
    task = {"name": f"{rules}:Moody", "levels": 1, "check_seconds": 3}
    result, _ = run(changed(recipe, {**QUIET, "task": task}), tmp_path / "runs")
    assert result.step == 4
    for words in ("no idea", "nan", "took over 3 s"):
        assert any(words in fault for fault in faults), words
    assert sum("took over" in fault for fault in faults) == 1
    found = lines(result)
    assert sum(line["faults"] for line in found) == len(faults)
    assert any(line["loss"] != 0 for line in found if line["kind"] == "train")


@contained
def test_programs_of_a_random_model(
    recipe: RLRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a model writes for the task `programs` runs in the sandbox, earns nothing as it is no program, and is no
    fault of the check."""
    folder = tmp_path / "model"
    tokenizer = Tokenizer.from_folder(recipe.model)
    assert tokenizer is not None
    model = Transformer(MODEL.replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048))
    model.init_weights(1)
    save_model(model, folder, tokenizer=tokenizer)
    outcomes: list[Outcome] = []
    original = Sandbox.run

    def sandboxed(sandbox: Sandbox, check: Any) -> Outcome:
        outcomes.append(original(sandbox, check))
        return outcomes[-1]

    monkeypatch.setattr(Sandbox, "run", sandboxed)
    changes = {**QUIET, "task": {"name": "programs", "levels": 2}, "train": {"steps": 2}}
    try:
        result, _ = run(changed(recipe.replace(model=str(folder)), changes), tmp_path / "runs")
    finally:
        programs.use_sandbox()  # ends the one that was made
    assert result.step == 2
    assert {outcome.status for outcome in outcomes} <= {"ok", "error"}
    assert all((line["faults"], line["accuracy"]) == (0, 0) for line in lines(result))


# ------------------------------------------------------------------------------------------------- another server


@contextmanager
def served(model: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`fathom serve` of `model` in a process of its own, and the port that it listens on."""
    command = [sys.executable, "-m", "fathom.cli", "serve", model, "--port", str(port), "--dtype", "float32"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"serving at http://127\.0\.0\.1:(\d+)", line):
                    break
            else:
                pytest.fail("".join(said))
            yield process, int(found[1])
        finally:
            process.kill()


def test_an_endpoint_that_dies_in_a_step(
    recipe: RLRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server killed in the midst of the third step's requests ends the run in a sentence, with all that was learnt
    in a checkpoint; when it serves again, the run goes on to its end."""
    monkeypatch.setattr(remote, "RemoteSettings", functools.partial(remote.RemoteSettings, backoff_seconds=0.01))
    with served(recipe.model) as (process, port):
        endpoint = {"endpoint": f"http://127.0.0.1:{port}/v1"}
        recipe = changed(recipe, {**QUIET, "rollout": endpoint, "checkpoint": {"every": 99}})
        original, submitted = remote.RemoteEngine.submit, 0

        def submit(*arguments: Any) -> Any:
            nonlocal submitted
            submitted += 1
            if submitted == 6 + 2 * 16 + 8:  # the first evaluation, two steps, and half of another
                process.kill()
                process.wait()
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(remote.RemoteEngine, "submit", submit)
            console = Console(file=io.StringIO(), width=200)
            with pytest.raises(UserError, match=r"no completion could be drawn: .*nobody answers .*start the server"):
                module.train_rl(recipe, runs=tmp_path, console=console)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    made = state.read_checkpoint(checkpoint).progress.step
    assert made in (2, 3)  # what was drawn of the third before may have been learnt from
    assert f"what was learnt up to step {made} is saved" in console.file.getvalue()
    with served(recipe.model, port):
        result, said = run(recipe, tmp_path, resume=True)
    assert f"resuming from step {made}" in said
    assert [line["step"] for line in lines(result) if line["kind"] == "train"] == [1, 2, 3, 4]
