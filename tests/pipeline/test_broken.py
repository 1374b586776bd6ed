"""What can go wrong while a pipeline runs: one line that says what to do, nothing finished lost, and it goes on."""

import errno
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import fathom.pipeline.run as pipelines
import fathom.pipeline.state as states
import fathom.synth.factory as factory
import fathom.train.metrics as metrics
import fathom.train.writer as writer
from fathom.config.pipeline import read_pipeline
from fathom.errors import UserError
from fathom.pipeline.plan import plan_pipeline
from fathom.pipeline.state import read_state
from fathom.synth.candidates import DrawnFile
from tests.pipeline.house import run, weights


def run_on_full_disk(owner: Any, name: str, path: str, file: Path, runs: Path, *words: str, redo: bool = False) -> str:
    """What is said where `owner.name` finds the disk full, given something with `path` in it."""
    original = getattr(owner, name)

    def refusing(*arguments: Any, **options: Any) -> Any:
        if path in str(arguments[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, refusing)
        with pytest.raises(UserError) as error:
            run(file, runs, *words, redo=redo)
    return str(error.value)


def test_a_full_disk_costs_nothing(file: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    """Whichever write finds the disk full, one line says so; with room made, the pipeline goes on behind it, and ends
    with the bytes of the unbroken one."""
    for owner, name, path, said in (
        (states, "replace_text", "pipeline.toml", "pipeline.toml: cannot be written"),
        (states, "replace_text", "pipeline.json", "pipeline.json: cannot be written"),
        (DrawnFile, "append", "", "stage traces: .*drawn.jsonl: cannot be written"),
        (factory, "row_file", "", "stage traces: .*traces.jsonl: cannot be written"),
        (writer, "write_checkpoint", "student", "stage student: checkpoint of step 1"),
        (metrics.MetricsLog, "write", "", "stage student: .*No space left"),
        (states, "replace_text", "student/evaluation.json", "stage student: .*evaluation.json: cannot be written"),
        (writer, "write_checkpoint", "zero", "stage zero: checkpoint of step 2"),
    ):
        told = run_on_full_disk(owner, name, path, file, tmp_path)
        assert re.search(said, told)
        assert "No space left on device" in told
        assert "stage" not in told or told.endswith("once mended, run it again")
        assert "\n" not in told
    result, said = run(file, tmp_path)
    assert said.count("finished before") == 2
    assert weights(result.folder) == unbroken


@pytest.mark.parametrize("where", ["inside", "between"])
def test_a_killed_pipeline_goes_on(where: str, file: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    """kill -9 in the midst of a stage, or where one has just begun, costs at most the steps since its last checkpoint:
    run again, the pipeline ends with the bytes of the unbroken one."""
    command = [sys.executable, "-m", "tests.pipeline.killed", str(file), str(tmp_path), where]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert [stage.finished for stage in read_state(tmp_path / "house").values()] == [True, False]
    assert (tmp_path / "house" / "student" / "checkpoints").exists() == (where == "inside")
    result, said = run(file, tmp_path)
    assert said.count("finished before") == 1
    assert weights(result.folder) == unbroken


def test_a_stage_without_rows_ends_the_pipeline(file: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    """A stage whose data come out empty says in one line which filter took them, and no later stage begins. With the
    filter put right, nothing that was drawn is drawn again."""
    with pytest.raises(UserError, match=r"stage traces: .*no row is left of 48 .*short thought 48; lower") as error:
        run(file, tmp_path, "--traces.filters.shortest_thought", "999")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "house" / "student").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(DrawnFile, "append")
        result, _ = run(file, tmp_path)
    assert weights(result.folder) == unbroken


def test_a_begun_stage_cannot_become_another(file: Path, tmp_path: Path) -> None:
    """What was drawn from other problems is not gone on with, but made again on demand."""
    with pytest.raises(UserError):
        run(file, tmp_path, "--traces.filters.shortest_thought", "999")
    with pytest.raises(UserError, match="stage traces was begun by another recipe"):
        run(file, tmp_path, "--traces.problems", "9")
    result, _ = run(file, tmp_path, "--traces.problems", "9", redo=True)
    assert len((result.folder / "traces" / "drawn.jsonl").read_text().splitlines()) == 9


def test_a_teacher_that_never_solves_ends_the_pipeline(file: Path, tmp_path: Path) -> None:
    """One line says how many candidates were wrong, and what to try."""
    asked = {"source": "model", "prompt.style": "chat", "layout.form": "boxed", "draw.max_tokens": "2"}
    words = [f"--traces.{field}={value}" for field, value in asked.items()]
    with pytest.raises(UserError, match=r"stage traces: .*of which wrong 48; take easier levels, a stronger") as error:
        run(file, tmp_path, *words, "--traces.model", str(file.parent / "model"))
    assert "\n" not in str(error.value)
    assert "put that right, in the recipe or behind the command; then run it again" in str(error.value)


def test_held_out_problems_are_not_learnt(file: Path, tmp_path: Path) -> None:
    """Rows from elsewhere that ask a problem which stages are measured with are named before the first stage begins;
    without them the pipeline runs."""
    questions = plan_pipeline(read_pipeline(file, []), file.parent, tmp_path).questions
    asked = ["1 + 1 =", questions[0], "2 + 2 =", f" {questions[1]} "]
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "2"}] for text in asked]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    words = ["--student.data.files", f'["@traces/traces.jsonl", "{mine}"]']
    with pytest.raises(UserError, match=rf"stage student: .*2 training rows .*{mine}:2, {mine}:4; take these rows out"):
        run(file, tmp_path, *words)
    assert not (tmp_path / "house").exists()
    mine.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows[::2]))
    result, _ = run(file, tmp_path, *words)
    assert all(stage.finished for stage in result.stages.values())


def test_rows_of_a_stage_are_looked_over_too(file: Path, tmp_path: Path) -> None:
    """Where a held-out problem is found in what an earlier stage wrote, the stage that would learn from it refuses."""
    run(file, tmp_path)
    traces = tmp_path / "house" / "traces" / "traces.jsonl"
    question = json.loads((tmp_path / "house" / "held-out.jsonl").read_text().splitlines()[0])["question"]
    row = [{"role": "user", "content": question}, {"role": "assistant", "content": "2"}]
    added = len(traces.read_text().splitlines()) + 1
    with traces.open("a") as lines:
        lines.write(json.dumps({"messages": row}) + "\n")
    with pytest.raises(UserError, match=rf"stage student: .*{traces}:{added}; take these rows out"):
        run(file, tmp_path, "--student.train.epochs", "1", redo=True)


def test_a_half_redone_pipeline_goes_on(file: Path, tmp_path: Path) -> None:
    """What was built on a stage that is made again goes with it, and whoever goes on makes all of it."""
    run(file, tmp_path)
    words = ["--student.optimizer.lr", "1e-3"]
    run_on_full_disk(metrics.MetricsLog, "write", "", file, tmp_path, *words, redo=True)
    assert list(read_state(tmp_path / "house")) == ["traces", "student"]
    assert not (tmp_path / "house" / "zero").exists()
    result, _ = run(file, tmp_path, *words)
    assert weights(result.folder) == weights(run(file, tmp_path / "fresh", *words)[0].folder)


def test_a_stage_begun_to_be_longer_is_not_the_one_that_was(file: Path, tmp_path: Path) -> None:
    """A stage that is stopped while it is made again, longer, does not pass for what it was, nor do those built on what
    is no more there."""
    values = tomllib.loads(file.read_text())
    traces, student, zero = values["stages"]
    zero["set"]["model"], student["set"]["model"] = student["set"]["model"], "@zero"
    other = file.with_name("other.toml")
    other.write_text(tomli_w.dumps(values | {"stages": [traces, zero, student]}))
    result, _ = run(other, tmp_path)
    before = weights(result.folder)
    words = ["--zero.train.steps", "4", "--zero.checkpoint.every", "1"]
    run_on_full_disk(states, "replace_text", "zero/evaluation.json", other, tmp_path, *words, redo=True)
    assert list(read_state(result.folder)) == ["traces", "zero"]
    with pytest.raises(UserError, match="stage zero was begun by another recipe"):
        run(other, tmp_path)
    run(other, tmp_path, redo=True)
    assert weights(result.folder) == before


def test_a_kill_while_stages_are_deleted_leaves_nothing_that_looks_whole(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the deleting has come, none of them is believed to be finished."""
    run(file, tmp_path)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            run(file, tmp_path, "--student.optimizer.lr", "1e-3", redo=True)
    assert {name: stage.finished for name, stage in read_state(tmp_path / "house").items()} == {
        "traces": True,
        "student": False,
        "zero": False,
    }
    with pytest.raises(UserError, match="stage student was begun by another recipe"):
        run(file, tmp_path)


def test_a_begun_stage_is_not_gone_on_with_on_other_rows(file: Path, tmp_path: Path) -> None:
    """A stage that had begun on rows which are made again is made again too, though its own recipe is the same."""
    run_on_full_disk(states, "replace_text", "student/evaluation.json", file, tmp_path)
    words = ["--traces.problems", "9"]
    with pytest.raises(UserError, match="stage traces was made by another recipe"):
        run(file, tmp_path, *words)
    result, _ = run(file, tmp_path, *words, redo=True)
    fresh, _ = run(file, tmp_path / "fresh", *words)
    assert weights(result.folder) == weights(fresh.folder)
