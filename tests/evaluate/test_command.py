"""`fathom eval` as a person meets it."""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fathom.evaluate.evaluate as module
from fathom.cli import main
from fathom.config.recipe import dump_recipe
from fathom.config.rl import RLRecipe
from fathom.evaluate.answers import EngineAnswers
from fathom.evaluate.command import recipe_of
from fathom.model.checkpoint import save_model
from tests.engine.running import MLA, TAGGED
from tests.model.configs import build

RECIPE = RLRecipe(
    name="run",
    model="somewhere",
    task={"name": "modular", "levels": 3, "check_seconds": 4.0},
    prompt={"style": "template", "template": "{question}", "opens_thought": True},
    rewards={"layout": {"form": "rest", "thoughts": "required"}},
    rollout={"max_tokens": 20},
)
FEW = ("--problems", "6", "--samples", "2", "--dtype", "float32")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of reinforcement learning, with a random model in it."""
    folder = tmp_path_factory.mktemp("runs") / "run [1]"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.toml").write_text(dump_recipe(RECIPE), encoding="utf-8")
    save_model(build(MLA), folder / "checkpoints" / "step_00000001", tokenizer=TAGGED)
    return folder


def test_a_run_is_asked_as_it_has_learnt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a flag, task, levels, prompt, layout and lengths are the recipe's; numbers and charts lie in the run."""
    assert main(["eval", str(run), *FEW, "--budgets", "2", "4", "--consensus", "1", "2"]) == 0
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    settings = found["settings"]
    assert (settings["tasks"], settings["levels"], settings["max_tokens"]) == (["modular"], 3, 20)
    assert settings["prompt"] == RECIPE.prompt.model_dump()
    assert settings["layout"] == RECIPE.rewards.layout.model_dump()
    assert (settings["temperature"], settings["top_p"], settings["check_seconds"]) == (0.6, 0.95, 4.0)
    assert [one["budget"] for one in found["measurements"]] == [None, 2, 4]
    assert list(found["measurements"][0]["pass@k"]) == list(found["measurements"][0]["cons@k"]) == ["1", "2"]
    assert list(found["measurements"][0]["levels"]) == ["1", "2", "3"]
    assert (found["version"], found["complete"], found["model"]) == (2, True, str(run))
    titles = [text.text for text in ElementTree.parse(run / "evaluation.svg").iter() if text.get("class") == "title"]
    assert titles == ["modular: accuracy over thought", "modular: accuracy over samples", "modular: by level"]
    shown = capsys.readouterr().out
    for said in ("modular: 6 held-out problems × 2 samples", "pass@1", "cons@k", "thought at most", "evaluation.json"):
        assert said in shown


def test_which_recipe_is_a_model_s(run: Path) -> None:
    """The run's own, for its models too; one that lies near by chance is not."""
    for path in (run, run / "best", run / "checkpoints" / "step_00000001"):
        assert recipe_of(path) == RECIPE
    for path in (run / "model", run / "models" / "mine", run / "metrics.jsonl"):
        assert recipe_of(path) is None


def test_flags_go_before_the_recipe(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another task has its own levels; prompt and layout change field by field; nothing is written beside `--json`."""
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    target = tmp_path / "found.json"
    words = ["--task", "modular", "--task", "equations", "--layout", "line", "--max-tokens", "5", "--json", str(target)]
    assert main(["eval", str(run), *FEW, *words, "--style", "zero"]) == 0
    settings = json.loads(target.read_text(encoding="utf-8"))["settings"]
    assert (settings["tasks"], settings["levels"], settings["max_tokens"]) == (["modular", "equations"], None, 5)
    assert settings["prompt"] == RECIPE.prompt.model_dump() | {"style": "zero"}
    assert settings["layout"] == {"form": "line", "thoughts": "required"}
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_ctrl_c_leaves_what_was_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After two problems: numbers of two, in the file too, a sentence that says so, and a shell's exit code."""
    grade, count = module.grade, iter(range(9))

    def interrupted(*arguments: object) -> object:
        if next(count) == 2:
            raise KeyboardInterrupt
        return grade(*arguments)

    monkeypatch.setattr(module, "grade", interrupted)
    target = tmp_path / "found.json"
    assert main(["eval", str(run), *FEW, "--json", str(target)]) == 130
    found = json.loads(target.read_text(encoding="utf-8"))
    assert (found["complete"], found["measurements"][0]["problems"]) == (False, 2)
    out, err = capsys.readouterr()
    assert "2 held-out problems" in out
    assert "interrupted; above is what 2 problems gave until then" in err


def _asked(run: Path, *words: str) -> int:
    return main(["eval", str(run), "--samples", "2", "--dtype", "float32", *words])


def _problems(file: Path) -> list[int]:
    return [one["problems"] for one in json.loads(file.read_text(encoding="utf-8"))["measurements"]]


@pytest.fixture
def own(run: Path) -> Iterator[Path]:
    """The run, without an evaluation before and after."""
    left = [run / f"{name}.{kind}" for name in ("evaluation", "evaluation-smaller") for kind in ("json", "svg")]
    for file in left:
        file.unlink(missing_ok=True)
    yield run
    for file in left:
        file.unlink(missing_ok=True)


def test_a_smaller_measurement_does_not_replace_a_run_s_own(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer problems go beside it, with a sentence; more replace it, and so does whatever goes to `--json`."""
    kept, beside = own / "evaluation.json", own / "evaluation-smaller.json"
    assert _asked(own, "--problems", "6") == 0
    assert _asked(own, "--problems", "3") == 0
    out, err = capsys.readouterr()
    assert f"{kept} holds what these numbers do not, and stays" in err
    assert f"wrote {beside} and" in out
    assert (_problems(kept), _problems(beside)) == ([6], [3])
    assert _asked(own, "--problems", "7") == 0
    assert _problems(kept) == [7]
    assert _asked(own, "--problems", "3", "--json", str(kept)) == 0
    assert _problems(kept) == [3]


def test_what_was_broken_off_does_not_replace_what_is_whole(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after the last problem of a longer evaluation: the run keeps the shorter one that was complete."""
    assert _asked(own, "--problems", "3") == 0
    grade, count = module.grade, iter(range(9))

    def interrupted(*arguments: object) -> object:
        if next(count) == 4:
            raise KeyboardInterrupt
        return grade(*arguments)

    monkeypatch.setattr(module, "grade", interrupted)
    assert _asked(own, "--problems", "6", "--levels", "3") == 130
    assert _problems(own / "evaluation.json") == [3]
    assert _problems(own / "evaluation-smaller.json") == [4]
    assert "holds what these numbers do not, and stays" in capsys.readouterr().err


BAD = {
    "nothing": ([], "give either MODEL or --endpoint"),
    "both": (["RUN", "--endpoint", "http://h"], "give either MODEL or --endpoint"),
    "no task": (["MODEL"], "which task? give --task NAME"),
    "unknown task": (["RUN", "--task", "modullar"], "unknown task 'modullar'"),
    "level": (["RUN", "--levels", "99"], "levels = 99, but task modular has 12; lower it"),
    "consensus": (["RUN", "--samples", "2", "--consensus", "4"], "consensus over 4 answers needs as many samples"),
    "budget": (["RUN", "--budgets", "-1"], "'budgets.0' = -1"),
    "name without endpoint": (["RUN", "--model-name", "m"], "--model-name is about --endpoint"),
    "one price": (["RUN", "--price-input", "1"], "go together"),
    "no template": (["MODEL", "--task", "modular"], "no chat template"),
    "folder": (["RUN", "--json", "."], "is a folder"),
    "the chart's name": (["RUN", "--json", "x.svg"], "the chart goes there"),
    "nowhere": (["RUN", "--json", "no/where.json"], "no: no such folder"),
    "not to be written": (["RUN", "--json", f"{'x' * 245}.json"], "cannot be written (File name too long)"),
    "dtype of a server": (["--endpoint", "http://h", "--dtype", "float32"], "--dtype is about MODEL"),
    "no key": (["--endpoint", "http://h", "--task", "modular", "--key-env", "NO_SUCH_KEY"], "no such environment"),
    "no model": (["no-such-model", "--task", "modular"], "no-such-model"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line(
    name: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, one line on standard error that names the mistake before anything is measured, nothing on standard
    output."""
    words, said = BAD[name]
    monkeypatch.setattr(EngineAnswers, "replies", None)
    places = {"RUN": str(run), "MODEL": str(_away(run))}
    assert main(["eval", *(places.get(word, word) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)


def _away(run: Path) -> Path:
    """The run's model, far from its recipe."""
    place = run.parent / "model"
    if not place.exists():
        place.symlink_to(run / "checkpoints" / "step_00000001")
    return place
