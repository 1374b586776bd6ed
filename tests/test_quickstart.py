"""The first quarter of an hour, with a few steps to each stage."""

import signal
from pathlib import Path
from typing import Any

import pytest

import fathom.train.sft as sft
from fathom.cli import main
from fathom.config.pipeline import read_pipeline
from fathom.quickstart import shipped_recipe

FEW: dict[str, dict[str, str]] = {
    "pretrain": {
        "data.sources": '["task:modular?levels=2&documents=400"]',
        "data.path": "runs/data/few",
        "train.steps": "4",
        "train.compile": "off",
        "schedule.warmup_steps": "2",
        "eval.tokens": "2048",
    },
    "rl": {
        "train.steps": "1",
        "rollout.problems": "2",
        "rollout.samples": "2",
        "rollout.max_tokens": "8",
        "eval.problems": "2",
        "eval.probe": "false",
        "eval.budgets": "[]",
    },
    # What hardly knows a digit solves nothing, so rules write the solutions that models will.
    "synth": {"source": "worked", "model": "none", "problems": "16"},
    "sft": {"train.epochs": "1", "train.batch": "8", "eval.sample_tokens": "4", "data.held_out": "0"},
    "model": {},
}
MEASURED = {"problems": "2", "samples": "1", "consensus": "[]", "budgets": "[]", "max_tokens": "8"}


def few_steps() -> list[str]:
    """Words that leave every stage of the recipe next to nothing to do."""
    stages = read_pipeline(shipped_recipe("r1"), []).stages
    fields = {stage.name: dict(FEW[stage.verb]) for stage in stages}
    for stage in stages:
        if stage.yields_model:
            fields[stage.name] |= {f"evaluation.{name}": value for name, value in MEASURED.items()}
    return [f"--{stage}.{field}={value}" for stage, own in fields.items() for field, value in own.items()]


@pytest.fixture(scope="module")
def words() -> list[str]:
    """Words for the command line."""
    return few_steps()


def test_quickstart_goes_on_where_it_was_stopped(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C ends it with 130; called again it goes on behind what is finished, and ends with dialogues, results and a
    report of the pipeline, whose folder is then a model. A third time makes nothing again."""
    monkeypatch.chdir(tmp_path)
    original = sft.update

    def stopping(*arguments: Any) -> dict[str, Any]:
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "update", stopping)
        assert main(["quickstart", *words]) == 130
    assert "stopped in stage dev1" in capsys.readouterr().err
    assert main(["quickstart", *words]) == 0
    out, err = capsys.readouterr()
    assert err.count("finished before") == 3
    stages = [stage.name for stage in read_pipeline(shipped_recipe("r1"), []).stages]
    assert f"stage {len(stages)} of {len(stages)}, {stages[-1]}" in err
    for told in ("─── ", "\nbase: ", "results", "took ", "Now try:", "wrote runs/quickstart/report.html"):
        assert told in out
    assert "no report was written" not in err
    page = (tmp_path / "runs" / "quickstart" / "report.html").read_text()
    assert all(name in page for name in stages)
    assert main(["load", "runs/quickstart"]) == 0
    assert main(["quickstart", *words]) == 0
    assert capsys.readouterr().err.count("finished before") == len(stages)


def test_fresh_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--fresh is asked of the pipeline, and nothing else begins anew."""
    monkeypatch.chdir(tmp_path)
    made, stopped = [], type("Result", (), {"interrupted": True})()
    monkeypatch.setattr(
        "fathom.quickstart.run_pipeline",
        lambda pipeline, beside, *, fresh: made.append((pipeline.name, fresh)) or stopped,
    )
    assert main(["quickstart", "--fresh"]) == 130
    assert main(["quickstart", "--name", "mine"]) == 130
    assert made == [("quickstart", True), ("mine", False)]


def test_a_pipeline_is_named_or_is_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`fathom recipe` takes the name of one that is shipped, or a file, alone or behind a name for its run; of other
    recipes it speaks as of none."""
    file = shipped_recipe("r1")
    for words, name in ((["r1"], "r1"), ([str(file)], "r1"), (["mine", str(file)], "mine")):
        assert main(["recipe", *words, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert f"pipeline '{name}' in runs/{name}" in said
        assert "13 stages of 13" in said
    assert main(["recipe", "zero-base"]) == 2
    assert capsys.readouterr().err.endswith("no pipeline 'zero-base'; there are: r1, r1-smollm2\n")
