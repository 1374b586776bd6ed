"""What would stop a later stage is said before the first one begins, by a dry run too."""

import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fathom.config.pipeline import read_pipeline
from fathom.data import train_bpe
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from fathom.model.transformer import Transformer
from fathom.pipeline.dry_run import dry_run
from tests.pipeline.house import run
from tests.train.tiny import MODEL

BAD = {
    "rows for a model": (
        ["--zero.model", "@traces"],
        "stage zero: model = @traces: that stage yields rows and no model",
    ),
    "other rows": (
        ["--student.data.files", '["@traces/rows.jsonl"]'],
        "stage student: data.files: .*the rows of stage traces are @traces/traces.jsonl",
    ),
    "longer than the context": (["--zero.rollout.max_tokens", "9999"], "stage zero: rollout.max_tokens = 9999, but"),
    "no such task": (["--traces.tasks", '[{ name = "modulo" }]'], "stage traces: .*unknown task 'modulo'"),
    "no such held-out file": (["--traces.decontamination.files", '["nowhere.jsonl"]'], "stage traces: .*nowhere.jsonl"),
}


def refusal(told: Callable[[], object]) -> str:
    """The one line."""
    with pytest.raises(UserError) as error:
        told()
    assert "\n" not in str(error.value)
    return str(error.value)


def refusals(file: Path, runs: Path, *words: str) -> list[str]:
    """Of a run, and of a dry one; neither has written anything."""
    said = [
        refusal(lambda: run(file, runs, *words)),
        refusal(
            lambda: dry_run(
                read_pipeline(file, list(words)), file.parent, console=Console(file=io.StringIO()), runs=runs
            )
        ),
    ]
    assert not (runs / "house").exists()
    return said


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD.keys())
def test_later_stages_are_looked_over_first(words: list[str], said: str, file: Path, tmp_path: Path) -> None:
    """One line names the stage and what is wrong with it."""
    for told in refusals(file, tmp_path, *words):
        assert re.search(said, told)


@pytest.mark.parametrize("field", ["student.model", "zero.teacher"])
def test_a_model_that_is_not_there(field: str, file: Path, tmp_path: Path) -> None:
    """Is refused by a run before its first stage; a dry one takes it for one that is still to be made or fetched."""
    words = [f"--{field}", str(tmp_path / "nowhere")]
    assert refusal(lambda: run(file, tmp_path, *words)).startswith(f"stage {field.split('.')[0]}: ")
    dry_run(read_pipeline(file, words), file.parent, console=Console(file=io.StringIO()), runs=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_package_that_a_later_stage_needs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is named before the first."""
    monkeypatch.setitem(sys.modules, "datasketch", None)
    for told in refusals(file, tmp_path, "--traces.filters.duplicates", "0.9"):
        assert told.startswith("stage traces: ")
        assert "pip install" in told


def test_a_teacher_of_another_vocabulary(file: Path, tmp_path: Path) -> None:
    """Cannot judge the tokens of a stage, however early the model of that was begun."""
    tokenizer = train_bpe(["abcdefgh"], 270)
    model = Transformer(MODEL.replace(vocab_size=tokenizer.vocab_size))
    model.init_weights(1)
    save_model(model, tmp_path / "other", tokenizer=tokenizer)
    for told in refusals(file, tmp_path / "runs", "--zero.teacher", str(tmp_path / "other")):
        assert told.startswith("stage zero: ")
        assert "vocabular" in told


def test_a_disk_without_room(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checkpoints of all stages take is known beforehand."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for told in refusals(file, tmp_path):
        assert "the disk has 0.0 GB free" in told
