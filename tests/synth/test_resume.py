"""A run of the data factory that was broken off, or is gone on with in another way."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fathom.synth.factory as module
from fathom.config import dump_recipe, read_recipe
from fathom.config.synth import SynthRecipe
from fathom.errors import UserError
from fathom.synth.candidates import DrawnFile
from fathom.synth.factory import SynthResult
from fathom.tasks.task import Problem
from tests.synth.runs import rows_of, run


def test_a_write_that_was_cut_anywhere_is_recovered(worked: SynthResult, tmp_path: Path) -> None:
    """Whatever a kill leaves of the file, its whole lines count, and what is behind them is cut away."""
    content = (worked.folder / "drawn.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)[:2]
    known = [(one.task, Problem(one.question)) for one in DrawnFile(worked.folder / "drawn.jsonl")]
    file = DrawnFile(tmp_path / "drawn.jsonl")
    for size in range(len(lines[0]) + len(lines[1]) + 1):
        file.path.write_bytes(content[:size])
        whole = (size >= len(lines[0])) + (size == len(lines[0] + lines[1]))
        assert file.recover(known) == whole
        assert file.path.read_bytes() == b"".join(lines[:whole])
    with pytest.raises(UserError, match=r"drawn.jsonl:1: holds another problem than"):
        file.recover(known[1:])
    for damage in (b"\xff", b"[]", b'{"task": "x"}', b"[" * 100_000):
        file.path.write_bytes(lines[0] + damage + b"\n")
        with pytest.raises(UserError, match=r"drawn.jsonl:2: damaged; delete this line and all below it"):
            file.recover(known)
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(UserError, match=r"drawn.jsonl: cannot be read and written \(Is a directory\)"):
        file.recover(known)


def test_killed_and_resumed_equals_unbroken(
    drawn: SynthResult, drawn_recipe: SynthRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the midst of a write, then --resume: the files of the unbroken run, and nothing drawn twice."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_recipe(drawn_recipe))
    killed = subprocess.run(
        [sys.executable, "-m", "tests.synth.killed", recipe, tmp_path, "2"], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    torn = (tmp_path / "drawn" / "drawn.jsonl").read_bytes()
    assert torn
    assert not torn.endswith(b"\n")
    whole, asked = module.Factory._solve, []

    def counted(factory: Any, teacher: Any, name: str, problems: Any) -> Any:
        asked.extend(problems)
        return whole(factory, teacher, name, problems)

    monkeypatch.setattr(module.Factory, "_solve", counted)
    result, _ = run(drawn_recipe, tmp_path, resume=True)
    assert len(asked) == 24 - torn.count(b"\n")
    for name in ("drawn.jsonl", "traces.jsonl", "synth.json"):
        assert (result.folder / name).read_bytes() == (drawn.folder / name).read_bytes(), name


def test_stopped_by_a_signal(
    worked: SynthResult, worked_recipe: SynthRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM gives up the batch under way and says how to go on; resumed, the file is that of an unbroken run."""
    recipe, whole, batches = worked_recipe.replace(draw={"samples": 2, "batch": 30}), module.Factory._solve, 0

    def signalled(factory: Any, *arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(factory, *arguments)

    monkeypatch.setattr(module.Factory, "_solve", signalled)
    result, said = run(recipe, tmp_path)
    assert result.interrupted
    assert result.traces is None
    assert f"synth {result.folder / 'recipe.toml'} --resume" in said
    assert len(list(DrawnFile(result.folder / "drawn.jsonl"))) == 30
    result, _ = run(recipe, tmp_path, resume=True)
    assert (result.folder / "traces.jsonl").read_bytes() == (worked.folder / "traces.jsonl").read_bytes()


def test_other_filters_draw_nothing(
    worked: SynthResult, worked_recipe: SynthRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is resumed with other filters and another format without a teacher: Parquet holds the rows of
    JSON Lines; with one row a problem and nothing held out, each question is there once, and more of them are."""
    monkeypatch.setattr(module, "open_teacher", lambda *_: pytest.fail("a teacher was opened"))
    folder = shutil.copytree(worked.folder, tmp_path / "worked")
    before = rows_of(worked)
    same, _ = run(worked_recipe.replace(format="parquet"), tmp_path, resume=True)
    assert not (folder / "traces.jsonl").exists()
    for row, plain in zip(rows_of(same), before, strict=True):
        row["messages"] = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
        assert row == plain
    few = worked_recipe.replace(filters={"per_problem": 1, "choice": "shortest"}, decontamination={"held_out": 0})
    result, _ = run(few, tmp_path, resume=True)
    questions = [row["question"] for row in rows_of(result)]
    assert len(set(questions)) == len(questions)
    assert {row["question"] for row in before} < set(questions)


def test_a_resumed_run_keeps_the_recipe_that_its_rows_are_of(
    worked: SynthResult, worked_recipe: SynthRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder says what its rows were made with: other filters take its recipe's place, and until there are rows of
    theirs, there are none; what was drawn stays, and gives the first recipe's rows again."""
    folder = shutil.copytree(worked.folder, tmp_path / "worked")
    nothing = worked_recipe.replace(filters={"shortest_thought": 10**6})
    with pytest.raises(UserError, match="no row is left"):
        run(nothing, tmp_path, resume=True)
    assert read_recipe(folder / "recipe.toml", [], SynthRecipe) == nothing
    assert not (folder / "traces.jsonl").exists()
    run(worked_recipe, tmp_path, resume=True)
    assert read_recipe(folder / "recipe.toml", [], SynthRecipe) == worked_recipe
    kept = (folder / "traces.jsonl").read_bytes()
    assert kept == (worked.folder / "traces.jsonl").read_bytes()
    monkeypatch.setattr(module.Factory, "start_checks", lambda *_: None)
    monkeypatch.setattr(module.Factory, "write", lambda *_: pytest.fail("stopped before it writes"))
    with pytest.raises(pytest.fail.Exception):
        run(worked_recipe, tmp_path, resume=True)
    assert (folder / "traces.jsonl").read_bytes() == kept


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_disk_that_is_full_of_rows(
    format: str, worked: SynthResult, worked_recipe: SynthRecipe, tmp_path: Path
) -> None:
    """Where rows find no room, one line says so, and the draws are kept."""
    recipe = worked_recipe.replace(format=format)
    folder = shutil.copytree(worked.folder, tmp_path / "worked")
    (folder / f".traces.{format}.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"traces.*No space left on device.*all that was drawn is kept: make room"):
        run(recipe, tmp_path, resume=True)
    assert not (folder / f".traces.{format}.partial").is_symlink()
    assert (folder / "traces.jsonl").exists() == (format == "jsonl")  # those of this very recipe
    assert (folder / "drawn.jsonl").read_bytes() == (worked.folder / "drawn.jsonl").read_bytes()


def test_full_disk_keeps_what_was_drawn(
    worked_recipe: SynthRecipe, worked: SynthResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up in the midst of a batch ends in one line; with room again, the run goes on to the same
    file."""
    recipe = worked_recipe.replace(draw={"samples": 2, "batch": 30})
    whole, batches = DrawnFile.append, 0

    def append(file: DrawnFile, solved: Any) -> None:
        nonlocal batches
        batches += 1
        if batches == 2:
            with file.path.open("ab") as torn:
                torn.write(b'{"task": "tor')
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(file, solved)

    monkeypatch.setattr(DrawnFile, "append", append)
    with pytest.raises(UserError, match=r"No space left on device\); all before problem 31 is kept: make room"):
        run(recipe, tmp_path)
    result, _ = run(recipe, tmp_path, resume=True)
    assert (result.folder / "traces.jsonl").read_bytes() == (worked.folder / "traces.jsonl").read_bytes()


def test_folders_are_not_taken_from_others(worked: SynthResult, worked_recipe: SynthRecipe, drawn_recipe: Any) -> None:
    """A run that exists is neither replaced nor gone on with under another recipe, nor one of a training."""
    runs = worked.folder.parent
    kept = (worked.folder / "drawn.jsonl").read_bytes()
    with pytest.raises(UserError, match="this run exists; continue it with --resume"):
        run(worked_recipe, runs)
    with pytest.raises(UserError, match="the recipe has changed in seed; change it back"):
        run(worked_recipe.replace(seed=2), runs, resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        run(worked_recipe.replace(name="new"), runs, resume=True)
    trained = runs / "trained"
    (trained / "checkpoints").mkdir(parents=True)
    (trained / "recipe.toml").write_text("")
    with pytest.raises(UserError, match="holds a model's training"):
        run(worked_recipe.replace(name="trained"), runs, overwrite=True)
    assert (worked.folder / "drawn.jsonl").read_bytes() == kept
