"""The report of a run: whole for whatever a run's folder holds."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fathom.cli import main
from fathom.errors import UserError
from fathom.report.page import write_report

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


class _Outline(HTMLParser):
    """Elements and their text; fails for one that is closed in another's place."""

    EMPTY = {"meta", "link", "br", "img"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _page(run: Path) -> str:
    page = write_report(run).read_text(encoding="utf-8")
    _Outline(page)
    return page


def _figures(page: str) -> list[str]:
    return re.findall(r"<h3>([^<]+)</h3><p>", page)


def _table(page: str, caption: str) -> list[list[str]]:
    body = re.search(rf"<caption[^>]*>{re.escape(caption)}</caption>(.*?)</table>", page, re.DOTALL)
    assert body is not None
    rows = re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL)
    return [
        [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows
    ]


def test_pretraining_is_told(tmp_path: Path) -> None:
    """First, best and last evaluation stand side by side, and every measured thing has its figure."""
    lines = [_train(step, bits_per_byte=2.0, max_vio=0.5, lr=0.1, tokens_per_second=100.0) for step in (1, 2, 3, 4)]
    lines += [_evaluation(2, loss=3.0, mtp_acceptance=0.5), _evaluation(3, loss=1.25), _evaluation(4, loss=2.0)]
    page = _page(_run(tmp_path / "r", PRETRAIN, lines))
    rows = _table(page, "First, best and last evaluation")
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
    assert _table(page, "Accuracy and length of thought") == [
        ["step", "pass@1", "length of thought"], ["0", "25 %", "4"], ["40", "50 %", "9"],
    ]  # fmt: skip
    levels = _table(page, "pass@1 by level of difficulty, at several steps")
    assert levels == [["level", "step 0", "step 40"], ["2", "–", "40.0 %"], ["10", "–", "60.0 %"]]
    assert {"Before the first step", "Thoughts cut short", "Right answers", "Entropy"} <= set(_figures(page))
    assert "made to think: 75 %; made to guess: 12.5 %; left to itself: 25 %." in page


def test_what_the_model_writes_is_only_text(tmp_path: Path) -> None:
    """Tags in samples and in the recipe do nothing, control characters are shown, and the page allows no script."""
    samples = f"## Step 1\n\n    <old>\n\n## Step 20\n\n    {HOSTILE}\n\n"
    page = _page(_run(tmp_path / "r", LEARNS.replace("runs/base", "<script>"), [], samples))
    assert not {"script", "img", "old"} & set(_Outline(page).tags)
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in page
    assert "&amp;amp;␛[31m␀" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=|url\(|@import", re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL))


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
    assert [row[1] for row in _table(page, "Loss")[1:]] == [""] * 6 + ["1.5"]
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
    rows = _table(page, "Loss")[1:]
    assert len(rows) == 200
    assert rows[0] == ["5", "2"]
    assert "the mean of 5 steps" in page


def test_the_recipe_names_what_was_changed(tmp_path: Path) -> None:
    """What differs from the defaults comes first; a section's own default counts, and an unknown field is shown."""
    page = _page(_run(tmp_path / "r", LEARNS, []))
    changed = {row[0] for row in _table(page, "Fields changed from their defaults")}
    assert {"name", "model", "task.name", "train.steps"} <= changed
    assert not {"seed", "optimizer.lr", "optimizer.weight_decay"} & changed
    assert {"optimizer.lr", "seed"} <= {row[0] for row in _table(page, "All fields")}
    assert "<code>modular</code>" in page
    assert "`" not in page
    rows = {row[0]: row for row in _table(_page(_run(tmp_path / "p", PRETRAIN, [])), "All fields")}
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
