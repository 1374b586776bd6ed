"""The report of a run: whole for whatever a run's folder holds."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fathom.cli import main
from fathom.errors import UserError
from fathom.report.page import write_report
from tests.evaluate.scripted import MODULAR
from tests.report.house import COUNTS, evaluation
from tests.report.outline import Outline, references, table_of

PRETRAIN = """
name = "words"
seed = 1
[train]
steps = 4
[optimizer]
lr = 0.5
[from_another_version]
what = "ever"
"""
LEARNS = """
name = "rewards"
seed = 1
model = "runs/base"
[task]
name = "modular"
[train]
steps = 40
[optimizer]
lr = 1e-6
weight_decay = 0.0
"""
CONVERSES = """
name = "talk"
model = "runs/base"
[data]
files = ["a.jsonl", "b.jsonl"]
[train]
epochs = 1.0
"""
DRAWS = """
name = "factory"
model = "runs/zero"
problems = 40
[[tasks]]
name = "modular"
levels = 8
"""
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x1b[31m\x00"


def _run(folder: Path, recipe: str, lines: list[dict[str, Any]], samples: str = "") -> Path:
    folder.mkdir()
    (folder / "recipe.toml").write_text(recipe)
    if lines:
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if samples:
        (folder / "samples.md").write_text(samples)
    return folder


def _train(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "skipped": False, "loss": 8.0 - step, **values}


def _evaluation(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "eval", "step": step, **values}


def _page(run: Path) -> str:
    page = write_report(run).read_text(encoding="utf-8")
    Outline(page)
    return page


def _figures(page: str) -> list[str]:
    return re.findall(r"<h3>([^<]+)</h3><p>", page)


def test_pretraining_is_told(tmp_path: Path) -> None:
    """First, best and last evaluation stand side by side, and every measured thing has its figure."""
    lines = [_train(step, bits_per_byte=2.0, max_vio=0.5, lr=0.1, tokens_per_second=100.0) for step in (1, 2, 3, 4)]
    lines += [_evaluation(2, loss=3.0, mtp_acceptance=0.5), _evaluation(3, loss=1.25), _evaluation(4, loss=2.0)]
    page = _page(_run(tmp_path / "r", PRETRAIN, lines))
    rows = table_of(page, "First, best and last evaluation")
    assert rows[0] == ["held out", "first, step\xa02", "best by loss, step\xa03", "last, step\xa04"]
    assert rows[1] == ["loss, nats per token", "3", "1.25", "2"]
    assert rows[2] == ["drafts accepted", "50.0 %", "–", "–"]
    assert _figures(page) == ["Bits per byte", "Drafts accepted", "Expert load: MaxVio", "Speed", "Learning rate"]


def test_learning_by_reward_is_told(tmp_path: Path) -> None:
    """Accuracy and thought share the first figure; levels, budgets and the probe are shown where they were measured."""
    first = {"pass@1": 0.25, "thought_tokens": 4.0, "probe_thinking": 0.75, "probe_guessing": 0.125}
    last = {"pass@1": 0.5, "thought_tokens": 9.0, "pass@1/level_2": 0.4, "pass@1/level_10": 0.6, "pass@1/budget_8": 0.1}
    lines = [_evaluation(0, **first), _train(1, reward=0.5, accuracy=0.5, entropy=0.1), _evaluation(40, **last)]
    page = _page(_run(tmp_path / "r", LEARNS, lines))
    assert table_of(page, "Accuracy and length of thought") == [
        ["step", "pass@1", "length of thought"], ["0", "25 %", "4"], ["40", "50 %", "9"],
    ]  # fmt: skip
    levels = table_of(page, "pass@1 by level of difficulty, at several steps")
    assert levels == [["level", "step 0", "step 40"], ["2", "–", "40.0 %"], ["10", "–", "60.0 %"]]
    assert {"Before the first step", "Thoughts cut short", "Right answers", "Entropy"} <= set(_figures(page))
    assert "made to think: 75.0 %; made to guess: 12.5 %; left to itself: 25.0 %." in page


def test_fine_tuning_is_told(tmp_path: Path) -> None:
    """Its loss on what it learns and on held-out answers, what it learns from, and nothing that only text has."""
    lines = [
        _evaluation(0, loss=3.0),
        _train(1, entropy=0.5, tokens_per_second=9.0, tokens=70),
        _evaluation(2, loss=1.0),
    ]
    page = _page(_run(tmp_path / "r", CONVERSES, lines))
    assert table_of(page, "Loss") == [["step", "training", "held out"], ["0", "", "3"], ["1", "7", ""], ["2", "", "1"]]
    assert _figures(page) == ["Entropy", "Speed"]
    assert "fine-tuning on conversations" in page
    assert "a.jsonl, b.jsonl" in page
    fields = {row[0]: row for row in table_of(page, "All fields")}
    assert fields["train.epochs"][2] == "2"


def test_a_data_factory_is_told(tmp_path: Path) -> None:
    """The funnel of its candidates, the reasons, the levels; before it has written rows, it says so."""
    run = _run(tmp_path / "r", DRAWS, [])
    assert "Nothing has been written yet." in _page(run)
    (run / "synth.json").write_text(json.dumps(COUNTS))
    page = _page(run)
    assert "40 drawn: 100.0 %; 20 right: 50.0 %; 10 kept: 25.0 %." in page
    assert table_of(page, "Candidates by task and level")[1] == ["modular 1", "40", "20", "10", "25.0 %"]
    fields = {row[0]: row[1] for row in table_of(page, "Fields changed from their defaults")}
    assert fields["tasks"] == "name = modular; levels = 8"
    assert write_report(run, tmp_path / "funnel.svg").read_text().startswith("<svg ")


def test_what_was_measured_by_itself_is_told(tmp_path: Path) -> None:
    """`evaluation.json` in a run's folder: a row for every budget, both curves, and what the model said, as text."""
    run = _run(tmp_path / "a folder of another name", LEARNS, [_train(1, accuracy=0.5)])
    assert "Measured on held-out problems" not in _page(run)
    found = evaluation(3, MODULAR.replace(budgets=(0, 5)))
    for said in found["measurements"][0]["transcripts"]:
        said["thought"] = HOSTILE
    (run / "evaluation.json").write_text(json.dumps(found))
    page = _page(run)
    rows = table_of(page, "Measured on held-out problems")
    assert [row[1] for row in rows[1:]] == ["as many as it takes", "0", "5"]
    assert rows[1][2:4] == ["8 × 4", "75.0 % (57.9–86.7)"]
    assert [row[-1] for row in rows] == ["no answer found", "0.0 %", "0.0 %", "0.0 %"]
    assert {"More thought: modular", "More samples: modular"} <= set(_figures(page))
    assert page.count('<div class="turn ') == 4
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in page
    assert references(page) == []
    assert write_report(run, tmp_path / "x.svg", figure="scaling").exists()


def test_an_evaluation_that_was_broken_off_is_said_to_be(tmp_path: Path) -> None:
    """With the reason."""
    run = _run(tmp_path / "r", LEARNS, [_train(1, accuracy=0.5)])
    (run / "evaluation.json").write_text(json.dumps(evaluation(3) | {"complete": False, "stopped": "interrupted"}))
    assert "Not complete (interrupted): these are the problems that had ended by then" in _page(run)
    (run / "evaluation.json").write_text(json.dumps(evaluation(3)))
    assert "Not complete" not in _page(run)


def test_an_evaluation_of_another_version_is_shown(tmp_path: Path) -> None:
    """Settings that this one does not know are no reason to refuse numbers that it does."""
    run = _run(tmp_path / "r", LEARNS, [_train(1, accuracy=0.5)])
    found = evaluation(3)
    found["settings"] |= {"of_tomorrow": 1}
    (run / "evaluation.json").write_text(json.dumps(found | {"version": 9}))
    assert table_of(_page(run), "Measured on held-out problems")[1][3] == "75.0 % (57.9–86.7)"


def test_half_characters_and_what_xml_forbids_are_shown(tmp_path: Path) -> None:
    """Surrogates, non-characters and control characters, in the page and in a picture, which stays XML."""
    run, odd = _run(tmp_path / "r", LEARNS, [_train(1, accuracy=0.5)]), "a\ud83d\ufffe\x01\x85\u202e<b>العربية 中文"
    found = evaluation(3, MODULAR.replace(budgets=(0, 5)))
    for measured in found["measurements"]:
        measured["task"] = odd
        measured["transcripts"][0] |= {"thought": odd, "answer": odd}
    (run / "evaluation.json").write_text(json.dumps(found))
    kept = {"step": 1, "question": odd, "completion": f"{odd} wait {odd}", "word": "wait"}
    (run / "first_correction.json").write_text(json.dumps(kept))
    page = _page(run)
    assert page.count("a\ufffd\ufffd␁\ufffd\u202e&lt;b&gt;العربية 中文") > 5
    svg = write_report(run, tmp_path / "x.svg", figure="scaling").read_text(encoding="utf-8")
    ElementTree.fromstring(svg)
    assert write_report(run, tmp_path / "x.png", figure="scaling").read_bytes().startswith(b"\x89PNG")


ODD = {
    "evaluation.json": ['{"version": 2, "mod', "[]", "{}", '{"settings": {}, "measurements": [{"task": "t"}]}'],
    "first_correction.json": ["{}", '{"step": null, "question": "", "completion": "", "word": ""}', "7"],
    "synth.json": ["{}", '{"total": 5}', '{"total": {"drawn": 1, "right": 1, "kept": 1}, "rounds": [], "levels": []}'],
    "metrics.jsonl": [None, "[]\n", "null\n", '{"kind": "train", "step": 1.5}\n'],
    "samples.md": [None],
    "recipe.toml": [None, "name = "],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all in ODD.items() for content in all])
def test_odd_files_are_named_in_a_line(tmp_path: Path, name: str, content: str | None) -> None:
    """Truncated, of another kind, or a folder (None) in a file's place: what is wrong with which file."""
    run = _run(tmp_path / "r", DRAWS if name == "synth.json" else LEARNS, [_train(1, accuracy=0.5)])
    if content is None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
    else:
        (run / name).write_text(content)
    with pytest.raises(UserError) as said:
        write_report(run)
    assert name.partition(".")[0] in str(said.value)
    assert "\n" not in str(said.value)


def test_odd_values_do_no_harm(tmp_path: Path) -> None:
    """A recipe whose fields are of other kinds, and metrics that are no numbers or no shares."""
    for number, recipe in enumerate(
        ("tasks = 5", 'tasks = "x"', "data.files = 5", 'data.files = "some.jsonl"', "task = 1")
    ):
        page = _page(_run(tmp_path / f"r{number}", f'name = ["x"]\ntrain = 5\n{recipe}\n', [_train(1, loss="a")]))
        assert "s, o, m, e" not in page
    lines = [_train(1, accuracy=7.0, completion_tokens=-4.0, thought_tokens=None), _evaluation(2, **{"pass@1": "x"})]
    _page(_run(tmp_path / "m", LEARNS, [*lines, _evaluation(3, **{"pass@1": -0.5, "pass@1/level_a": 0.5})]))


def test_no_candidate_is_no_division(tmp_path: Path) -> None:
    """Where nothing was drawn, shares are not known."""
    nothing = {"drawn": 0, "right": 0, "kept": 0}
    counts = {"total": nothing | {"dropped": {"not drawn": 3}}, "rounds": [], "levels": []}
    run = _run(tmp_path / "r", DRAWS, [])
    (run / "synth.json").write_text(json.dumps(counts))
    assert table_of(_page(run), "Why candidates were not kept")[1] == ["not drawn", "3", "–"]


def test_what_the_model_writes_is_only_text(tmp_path: Path) -> None:
    """Tags in samples and in the recipe do nothing, control characters are shown, and the page allows no script."""
    samples = f"## Step 1\n\n    <old>\n\n## Step 20\n\n    {HOSTILE}\n\n"
    page = _page(_run(tmp_path / "r", LEARNS.replace("runs/base", "<script>"), [], samples))
    assert not {"script", "img", "old"} & set(Outline(page).tags)
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in page
    assert "&amp;amp;␛[31m␀" in page
    assert "default-src 'none'" in page
    assert references(page) == []


def test_the_last_samples_are_shown(tmp_path: Path) -> None:
    """Six at most, of the newest steps; a heading inside a sample begins no other."""
    samples = "".join(f"## Step {step}\n\n    text {step}\n    ## Step 99\n\n" for step in range(1, 10))
    page = _page(_run(tmp_path / "r", PRETRAIN, [], samples))
    assert re.findall(r"<h3>Step (\d+)</h3>", page) == ["4", "5", "6", "7", "8", "9"]
    assert "text 9\n## Step 99</bdi>" in page


def test_the_parts_of_a_sample_are_told_apart(tmp_path: Path) -> None:
    """Prompt and completion stand under their names, and what they hold behind a margin that names have not."""
    samples = "## Step 3\n\nPrompt:\n\n    1+1=\n\nCompletion:\n\n    2\n    Reward:\n\nReward:\n\n    accuracy 1\n\n"
    page = _page(_run(tmp_path / "r", LEARNS, [], samples))
    assert "Prompt:\n\n    1+1=\n\nCompletion:\n\n    2\n    Reward:\n\nReward:\n\n    accuracy 1</bdi>" in page


def test_gaps_and_strange_values_do_not_break_it(tmp_path: Path) -> None:
    """Nulls, words, infinities and numbers beyond floats are gaps; a series of nothing else has no figure."""
    strange = [None, "much", float("nan"), 10**400, True, [1]]
    lines = [_train(step, loss=value, grad_norm=None) for step, value in enumerate(strange, start=1)]
    lines += [_train(7, loss=1.5, skipped=True), _evaluation(7, loss=None)]
    page = _page(_run(tmp_path / "r", PRETRAIN, lines))
    assert [row[1] for row in table_of(page, "Loss")[1:]] == [""] * 6 + ["1.5"]
    assert "Gradient" not in _figures(page)
    assert "1 steps" not in page
    assert "skipped, not finite" in page


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    """Without metrics, evaluations and samples there is a page that says so, of both kinds of runs."""
    for name, recipe in (("a", PRETRAIN), ("b", LEARNS)):
        page = _page(_run(tmp_path / name, recipe, []))
        assert "This run has not been evaluated yet." in page
        assert "Nothing has been measured yet." in page
        assert "No samples yet." in page
    assert "Length" in _figures(_page(_run(tmp_path / "c", LEARNS, [_train(1, accuracy=0.5, thought_tokens=3.0)])))


def test_a_long_run_is_thinned_to_means(tmp_path: Path) -> None:
    """A thousand steps become at most 240 points, each the mean of its steps, and the page says so."""
    page = _page(_run(tmp_path / "r", PRETRAIN, [_train(step, loss=float(step % 5)) for step in range(1, 1001)]))
    rows = table_of(page, "Loss")[1:]
    assert len(rows) == 200
    assert rows[0] == ["5", "2"]
    assert "the mean of 5 steps" in page


def test_the_recipe_names_what_was_changed(tmp_path: Path) -> None:
    """What differs from the defaults comes first; a section's own default counts, and an unknown field is shown."""
    page = _page(_run(tmp_path / "r", LEARNS, []))
    changed = {row[0] for row in table_of(page, "Fields changed from their defaults")}
    assert {"name", "model", "task.name", "train.steps"} <= changed
    assert not {"seed", "optimizer.lr", "optimizer.weight_decay"} & changed
    assert {"optimizer.lr", "seed"} <= {row[0] for row in table_of(page, "All fields")}
    assert "<code>modular</code>" in page
    assert "`" not in page
    rows = {row[0]: row for row in table_of(_page(_run(tmp_path / "p", PRETRAIN, [])), "All fields")}
    assert rows["optimizer.lr"] == ["optimizer.lr", "0.5", "0.00022", "Peak learning rate."]
    assert rows["from_another_version.what"][:2] == ["from_another_version.what", "ever"]


def test_identifiers_are_unique(tmp_path: Path) -> None:
    """No two elements of a page have the same id, and every reference to one finds it."""
    values = {
        "pass@1": 0.5,
        "thought_tokens": 3.0,
        "probe_thinking": 0.5,
        "probe_guessing": 0.1,
        "pass@1/budget_8": 0.1,
    }
    lines = [_evaluation(0, **values), _train(1, reward=0.5, accuracy=0.5, kl_sampler=1e-6), _evaluation(40, **values)]
    page = _page(_run(tmp_path / "r", LEARNS, lines))
    named = re.findall(r' id="([^"]+)"', page)
    assert len(named) == len(set(named))
    assert set(re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', page)) <= set(named)


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path is printed; `--out` is a page anywhere, and the headline figure alone where it ends in .svg."""
    run = _run(tmp_path / "r", PRETRAIN, [_train(1), _train(2)])
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run}/report.html\n"
    assert main(["report", str(run), "--out", str(tmp_path / "loss.svg")]) == 0
    assert (tmp_path / "loss.svg").read_text().startswith("<svg ")
    assert main(["report", str(run), "--out", str(tmp_path / "LOSS.SVG")]) == 0
    assert (tmp_path / "LOSS.SVG").read_text() == (tmp_path / "loss.svg").read_text()
    assert main(["report", str(run), "--out", str(tmp_path / "loss.jpg")]) == 2
    assert "loss.jpg: a page's name ends in .html, a figure's in .svg or .png" in capsys.readouterr().err
    assert not (tmp_path / "loss.jpg").exists()
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "no/page.html: cannot be written (No such file or directory)" in capsys.readouterr().err


def test_mistakes_are_said_in_a_line(tmp_path: Path) -> None:
    """A folder that is no run, a broken line of metrics, a broken recipe and a figure of nothing are named."""
    with pytest.raises(UserError, match="is not a run, it has no recipe"):
        write_report(tmp_path)
    run = _run(tmp_path / "r", PRETRAIN, [_train(1)])
    with pytest.raises(UserError, match="has measured nothing yet"):
        write_report(_run(tmp_path / "empty", PRETRAIN, []), tmp_path / "x.svg")
    (run / "metrics.jsonl").write_text('{"kind": "train"}\n')
    with pytest.raises(UserError, match="line 1 is not a line of metrics"):
        write_report(run)
    (run / "recipe.toml").write_text("name = ")
    with pytest.raises(UserError, match="not valid TOML"):
        write_report(run)
