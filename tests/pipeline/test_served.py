"""A pipeline's folder in the place of a model."""

import json
from pathlib import Path
from typing import Any

import pytest

from fathom.cli import main
from fathom.config.evaluation import EvaluationSettings
from fathom.config.pipeline import Pipeline, dump_pipeline
from fathom.config.rl import PromptSection
from fathom.data import train_bpe
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from fathom.model.transformer import Transformer
from fathom.pipeline.state import RECIPE, StageState, write_state
from fathom.train.run import model_folder
from tests.train.tiny import MODEL

VERBS = {"teacher": "model", "zero": "rl", "traces": "synth", "student": "sft"}
SETTINGS = EvaluationSettings(
    tasks=("modular",),
    levels=2,
    problems=2,
    max_tokens=6,
    prompt=PromptSection(style="template", template="{question}"),
)
EVALUATION = {"settings": SETTINGS.model_dump(mode="json"), "measurements": []}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A pipeline of which every stage is finished, without its recipes."""
    tokenizer = train_bpe(["0123456789"], 266)
    model = Transformer(MODEL.replace(vocab_size=tokenizer.vocab_size))
    model.init_weights(1)
    for name, verb in VERBS.items():
        if verb in ("rl", "sft"):
            save_model(model, tmp_path / "house" / name / "checkpoints" / "step_00000001", tokenizer=tokenizer)
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    finish(tmp_path / "house", *VERBS)
    return tmp_path / "house"


def finish(folder: Path, *names: str) -> None:
    """All of these are finished, the others begun."""
    states = {
        name: StageState(verb, "", name in names, 1.0, EVALUATION if name in names and verb != "synth" else None)
        for name, verb in VERBS.items()
    }
    write_state(folder, states)


def keep_recipe(folder: Path, serves: str | None) -> None:
    """What the pipeline says it serves."""
    stages = [
        {"name": name, "verb": verb, "set": {"model": str(folder.parent / "model")} if verb == "model" else {}}
        for name, verb in VERBS.items()
    ]
    stages[1]["set"] = {"model": "@teacher", "task": {"name": "modular"}}
    stages[2]["set"] = {"model": "@zero", "tasks": [{"name": "modular"}]}
    stages[3]["set"] = {"model": "@teacher", "data": {"files": ["@traces/traces.jsonl"]}}
    values: dict[str, Any] = {"name": "house", "evaluation": {"tasks": ["modular"]}, "stages": stages}
    pipeline = Pipeline.parse(values | ({} if serves is None else {"serves": serves}), where="here")
    (folder / RECIPE).write_text(dump_pipeline(pipeline, folder))


@pytest.mark.parametrize(
    ("serves", "finished", "expected"),
    [
        (None, list(VERBS), "house/student/checkpoints/step_00000001"),
        (None, ["teacher", "zero", "traces"], "house/zero/checkpoints/step_00000001"),
        ("zero", list(VERBS), "house/zero/checkpoints/step_00000001"),
        ("student", ["teacher", "zero"], "house/zero/checkpoints/step_00000001"),
        ("teacher", list(VERBS), "model"),
    ],
)
def test_a_pipeline_stands_for_one_of_its_models(
    serves: str | None, finished: list[str], expected: str, house: Path
) -> None:
    """It is the stage that the file says once that is finished, else the last that has trained a model."""
    finish(house, *finished)
    keep_recipe(house, serves)
    assert model_folder(house) == house.parent / expected


def test_a_pipeline_of_older_times_stands_for_its_last_model(house: Path) -> None:
    """Without pipeline.toml it is the last finished stage that has trained a model."""
    assert model_folder(house) == house / "student" / "checkpoints" / "step_00000001"


def test_a_pipeline_without_a_model_says_so(house: Path) -> None:
    """One line says to run it on, where no stage that trains is finished; a model from elsewhere is no result."""
    keep_recipe(house, None)
    finish(house, "teacher")
    with pytest.raises(UserError, match="no stage of this pipeline has a finished model yet; run the pipeline on"):
        model_folder(house)


def test_a_file_is_no_pipeline(tmp_path: Path) -> None:
    """A file in the place of a model is not looked into as a folder."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert model_folder(tmp_path / "model.gguf") == tmp_path / "model.gguf"


@pytest.mark.parametrize("stage", ["", "student", "traces"])
def test_commands_take_a_pipeline_for_a_model(
    stage: str, house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is loaded and measured like a run, and it and its stages are asked as the pipeline asked that model; a stage
    that has none was not asked."""
    if stage == "traces":
        assert main(["eval", str(house / stage)]) == 2
        assert "which task?" in capsys.readouterr().err
        return
    monkeypatch.chdir(house)
    assert main(["load", stage or "."]) == 0
    assert main(["eval", stage or ".", "--problems", "2", "--samples", "1", "--json", "found.json"]) == 0
    settings = json.loads(Path("found.json").read_text(encoding="utf-8"))["settings"]
    expected = EVALUATION["settings"] | {"problems": 2, "samples": 1, "temperature": 0.6, "top_p": 0.95}
    assert settings == {name: expected[name] for name in settings}
