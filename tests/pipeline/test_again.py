"""Stages that are finished when a session begins: what is measured again, and what begins anew."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import fathom.evaluate.evaluate as evaluations
import fathom.pipeline.run as pipelines
import fathom.train.sft as sft
from fathom.errors import UserError
from fathom.pipeline.state import read_state
from fathom.train.run import locked
from tests.pipeline.house import run, weights

MORE = ["--evaluation.problems", "6"]


def problems(folder: Path) -> dict[str, int]:
    """By stage, how many problems its measurement is of."""
    states = read_state(folder).items()
    return {name: one.evaluation["measurements"][0]["problems"] for name, one in states if one.evaluation}


def test_another_evaluation_measures_finished_stages_again(file: Path, tmp_path: Path) -> None:
    """Their models stay as they are, all stand in one table of the same problems, and nothing is left to do then."""
    result, _ = run(file, tmp_path)
    before = weights(result.folder)
    result, said = run(file, tmp_path, *MORE)
    assert said.count("finished before") == 3
    assert said.count("measured again") == 2
    assert problems(result.folder) == {"student": 6, "zero": 6}
    for name in ("student", "zero"):
        kept = json.loads((result.folder / name / "evaluation.json").read_text())
        assert kept == read_state(result.folder)[name].evaluation
    assert weights(result.folder) == before
    assert "measured again" not in run(file, tmp_path, *MORE)[1]


def test_only_what_is_measured_otherwise_is_measured_again(file: Path, tmp_path: Path) -> None:
    """A change of one stage's evaluation is that stage's; its seconds are those of the measurement that holds."""
    result, _ = run(file, tmp_path)
    before = read_state(result.folder)
    _, said = run(file, tmp_path, "--zero.evaluation.samples", "3")
    assert [line.split(":")[0] for line in said.splitlines() if "measured again" in line] == ["stage 3 of 3, zero"]
    after = read_state(result.folder)
    assert after["student"] == before["student"]
    old, new = (sum(one["cost"]["seconds"] for one in of["zero"].evaluation["measurements"]) for of in (before, after))
    assert after["zero"].seconds > before["zero"].seconds - old + new


def test_a_stopped_measurement_leaves_the_one_before(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, or an error, while a finished stage is measured again costs nothing that was known, and the next session
    measures it."""
    run(file, tmp_path)
    kept = [tmp_path / "house" / name for name in ("pipeline.json", "student/evaluation.json", "zero/evaluation.json")]
    before = [path.read_bytes() for path in kept]
    grade, graded = evaluations.grade, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        graded.append(grade(*arguments, **options))
        if len(graded) == 3:
            signal.raise_signal(signal.SIGINT)
        return graded[-1]

    def broken(*_: Any, **__: Any) -> None:
        raise UserError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(evaluations, "grade", interrupted)
        result, said = run(file, tmp_path, *MORE)
        assert result.interrupted
        assert "stopped in stage student; to go on, run it again" in said
        patch.setattr(pipelines, "evaluate", broken)
        with pytest.raises(UserError, match="stage student: no memory; what is finished is kept: put that"):
            run(file, tmp_path, *MORE)
    assert [path.read_bytes() for path in kept] == before
    run(file, tmp_path, *MORE)
    assert problems(tmp_path / "house") == {"student": 6, "zero": 6}


def test_what_a_finished_stage_has_learnt_is_not_measured_with(file: Path, tmp_path: Path) -> None:
    """Where another evaluation asks what a stage was taught, nothing is measured, and what to do is said."""
    result, _ = run(file, tmp_path)
    question = json.loads((result.folder / "traces" / "traces.jsonl").read_text().splitlines()[0])["messages"][0]
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"question": question["content"], "answer": "1", "split": "held-out"}) + "\n")
    with pytest.raises(UserError, match=r"stage student: .*traces.jsonl.*put \[evaluation\] back as it was"):
        run(file, tmp_path, "--evaluation.tasks", f'["{task}"]', "--evaluation.problems", "1")


def test_fresh_begins_anew(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages are deleted and made again; stopped, it says how to go on with them."""
    run(file, tmp_path)

    original = sft.update

    def stopping(*arguments: Any) -> dict[str, Any]:
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "update", stopping)
        result, said = run(file, tmp_path, fresh=True)
    assert "finished before" not in said
    assert "stopped in stage student; to go on, run it again without --fresh" in said
    assert not (result.folder / "zero").exists()
    assert run(file, tmp_path)[1].count("finished before") == 1


def test_fresh_deletes_nothing_of_others_nor_before_all_is_right(file: Path, tmp_path: Path) -> None:
    """Files of no pipeline, a pipeline under way, and one that is asked to begin anew with a mistake, all stay."""
    mine = tmp_path / "mine" / "student" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="student: is there and was not made by this pipeline"):
        run(file, tmp_path, "--name", "mine", fresh=True)
    assert mine.read_text() == "mine"
    result, _ = run(file, tmp_path)
    before = weights(result.folder)
    with pytest.raises(UserError, match="unknown task"):
        run(file, tmp_path, "--evaluation.tasks", "modulo", fresh=True)
    with locked(result.folder), pytest.raises(UserError, match="another process"):
        run(file, tmp_path, fresh=True)
    assert weights(result.folder) == before
    (result.folder / "pipeline.json").write_text("[]")
    assert weights(run(file, tmp_path, fresh=True)[0].folder) == before
