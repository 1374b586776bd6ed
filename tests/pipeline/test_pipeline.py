"""Pipelines: which stages are made, from what, and what becomes of them when something changes or breaks."""

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fathom.train.sft as sft
from fathom.config.pipeline import Pipeline, read_pipeline
from fathom.data import train_bpe
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from fathom.model.transformer import Transformer
from fathom.pipeline.run import PipelineResult, run_pipeline
from tests.train.tiny import MODEL

FILE = """
name = "house"

[evaluation]
tasks = ["modular"]
levels = 1
problems = 4
samples = 2
max_tokens = 6
prompt = {{ style = "chat", opens_thought = true }}
layout = {{ form = "rest", thoughts = "optional" }}

[[stages]]
name = "traces"
verb = "synth"
set = {{ source = "worked", problems = 12, tasks = [{{ name = "modular", levels = 1 }}] }}

[[stages]]
name = "student"
verb = "sft"
recipe = "sft.toml"
set = {{ model = "{model}", data.files = ["@traces/traces.jsonl"] }}

[[stages]]
name = "zero"
verb = "rl"
[stages.set]
model = "@student"
task = {{ name = "modular" }}
prompt = {{ style = "chat", opens_thought = true }}
rewards = {{ layout = {{ form = "rest", thoughts = "optional" }} }}
rollout = {{ problems = 2, samples = 2, max_tokens = 4 }}
train = {{ steps = 2, precision = "fp32" }}
eval = {{ problems = 2, probe = false }}
"""
SFT = """
name = "anything"
model = "replaced"
[data]
files = ["replaced"]
held_out = 0.0
[train]
epochs = 2.0
batch = 6
precision = "fp32"
[checkpoint]
every = 1
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline over a tiny random model: worked solutions, fine-tuning on them, rewards."""
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = train_bpe(["0123456789"], 266)
    model = Transformer(MODEL.replace(vocab_size=tokenizer.vocab_size))
    model.init_weights(1)
    save_model(model, folder / "model", tokenizer=tokenizer)
    (folder / "house.toml").write_text(FILE.format(model=folder / "model"))
    (folder / "sft.toml").write_text(SFT)
    return folder / "house.toml"


def run(file: Path, runs: Path, *words: str, redo: bool = False) -> tuple[PipelineResult, str]:
    said = io.StringIO()
    console = Console(file=said, width=200)
    return run_pipeline(
        read_pipeline(file, list(words)), file.parent, console=console, runs=runs, redo=redo
    ), said.getvalue()


def weights(folder: Path) -> dict[str, bytes]:
    """Every file of numbers of all stages."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


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
        assert any(line.startswith(name) and "±" in line for line in said.splitlines())
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
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the midst of a stage, and the same command again, give the bytes of the unbroken pipeline."""
    unbroken, _ = run(file, tmp_path / "one")
    original = sft.update

    def stopping(student: sft.Student, *arguments: Any) -> dict[str, Any]:
        if student.progress.step == 1:
            signal.raise_signal(signal.SIGINT)
        return original(student, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "update", stopping)
        stopped, said = run(file, tmp_path / "two")
    assert stopped.interrupted
    assert "stopped in stage student" in said
    assert not (tmp_path / "two" / "house" / "zero").exists()
    resumed, said = run(file, tmp_path / "two")
    assert said.count("finished before") == 1
    assert not resumed.interrupted
    assert weights(resumed.folder) == weights(unbroken.folder)


def test_a_stage_that_fails_keeps_what_was_finished(file: Path, tmp_path: Path, monkeypatch) -> None:
    """An error in a stage ends the pipeline; mended, it goes on behind the stages that were finished."""

    def broken(*_: Any) -> dict[str, Any]:
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(sft, "update", broken)
        with pytest.raises(UserError, match="the disk is full"):
            run(file, tmp_path)
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


def test_stages_are_changed_by_their_names(file: Path) -> None:
    """`--stage.section.field` changes that stage, `--seed` all of them, `--name` the pipeline."""
    words = ["--zero.train.steps", "7", "--seed", "5", "--name", "other", "--student.model=elsewhere"]
    pipeline = read_pipeline(file, words)
    recipes = {stage.name: stage.resolved(Path("runs/other"), pipeline.seed, file.parent) for stage in pipeline.stages}
    assert pipeline.name == "other"
    assert recipes["zero"].train.steps == 7
    assert recipes["student"].model == "elsewhere"
    assert {recipe.seed for recipe in recipes.values()} == {5}
    assert {name: recipe.name for name, recipe in recipes.items()} == {name: name for name in recipes}
    assert recipes["student"].data.files == ("runs/other/traces/traces.jsonl",)


BAD = {
    "no such stage": (["--zero.model", "@studnet"], r"'@studnet' is no earlier stage \(did you mean 'student'\?\)"),
    "a later stage": (["--student.model", "@zero"], "'@zero' is no earlier stage"),
    "a typo in the last": (["--zero.train.stepz", "3"], "stage zero: .*stepz"),
    "a wrong value": (["--zero.train.steps", "0"], "stage zero: .*steps"),
    "no such task": (["--evaluation.tasks", "modulo"], "unknown task 'modulo'"),
    "no field": (["--zero", "3"], "say which field of the stage"),
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


def test_two_stages_of_one_name_are_refused(file: Path) -> None:
    """A name stands for one folder."""
    values = read_pipeline(file, []).model_dump(exclude_unset=True)
    with pytest.raises(UserError, match="two stages are called 'traces'"):
        Pipeline.parse(values | {"stages": [*values["stages"], values["stages"][0]]}, where="here")
