"""The data factory end to end, with solutions written by rule and with a model of a few thousand parameters."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fathom.config import dump_recipe, read_recipe
from fathom.config.rewards import Layout
from fathom.config.rl import PromptSection, RLRecipe
from fathom.config.synth import SynthRecipe
from fathom.data.conversations import read_conversations
from fathom.errors import UserError
from fathom.synth.candidates import DrawnFile
from fathom.synth.factory import SynthResult
from fathom.synth.plan import dry_run, resolved, shares
from fathom.tasks.catalogue import open_task
from fathom.tasks.task import judge
from fathom.tasks.words import units
from fathom.train.rollout import draw_problems, held_out_problems, seed_of
from tests.synth.runs import counts_of, rows_of, run


def problems_of(recipe: SynthRecipe) -> dict[str, tuple[Any, Any]]:
    """Task and problem by question."""
    found = {}
    for section, count in zip(recipe.tasks, shares(recipe), strict=True):
        task = open_task(section.name)
        seed = seed_of(recipe.seed, "problems", task.called)
        for problem in draw_problems(task, "train", section.levels, count, seed=seed):
            found[problem.question] = (task, problem)
    return found


@pytest.mark.parametrize("name", ["drawn", "worked"])
def test_every_row_is_right_by_its_task(name: str, request: pytest.FixtureRequest) -> None:
    """Each row that was written passes its task's check again, though wrong candidates were drawn."""
    result, recipe = request.getfixturevalue(name), request.getfixturevalue(f"{name}_recipe")
    problems, rows, counts = problems_of(recipe), rows_of(result), counts_of(result)["total"]
    assert 0 < len(rows) == result.rows == counts["kept"] < counts["right"] < counts["drawn"]
    for row in rows:
        task, problem = problems[row["question"]]
        assert judge(task, problem, row["messages"][1]["content"]).score == 1
        assert (row["level"], row["right"], row["score"]) == (problem.level, problem.answer, 1.0)


def test_rows_are_conversations(worked: SynthResult) -> None:
    """What reads conversations reads the file: the question, and an answer with its thought."""
    assert worked.traces is not None
    for conversation, row in zip(read_conversations(worked.traces), rows_of(worked), strict=True):
        assert conversation.question == row["question"]
        assert conversation.messages[1]["reasoning_content"] == row["messages"][1]["reasoning_content"] != ""


def test_no_row_is_held_out_repetitive_or_double(worked: SynthResult, worked_recipe: SynthRecipe) -> None:
    """Sums that are held out in another spelling, loops, and copies are dropped, each counted for its reason."""
    task = open_task(worked_recipe.tasks[0].name)
    count = worked_recipe.decontamination.held_out
    held_out = held_out_problems(task, 1, count, seed=worked_recipe.seed)
    leaks, rows = {tuple(units(problem.question)) for problem in held_out}, rows_of(worked)
    assert all(tuple(units(row["question"])) not in leaks for row in rows)
    texts = [tuple(units(str(row["messages"]))) for row in rows]
    assert len(set(texts)) == len(texts)
    assert not any("once more so we add" in row["messages"][1]["reasoning_content"] for row in rows)
    dropped = counts_of(worked)["total"]["dropped"]
    assert set(dropped) == {"wrong", "held out", "repetition", "duplicate"}


def test_counts_add_up(drawn: SynthResult, worked: SynthResult) -> None:
    """All that was drawn is kept or dropped for one reason; levels, rounds and the whole agree."""
    for result in (drawn, worked):
        counts = counts_of(result)
        for row in (counts["total"], *counts["rounds"], *counts["levels"]):
            assert row["drawn"] == row["kept"] + sum(row["dropped"].values())
        for part in ("rounds", "levels"):
            for name in ("drawn", "right", "kept"):
                assert sum(row[name] for row in counts[part]) == counts["total"][name]


def test_wrong_answers_are_asked_again(drawn: SynthResult, drawn_recipe: SynthRecipe) -> None:
    """A round is as large as the wrong answers of the one before it, and rows say of which they are."""
    counts = counts_of(drawn)
    first, second, third = counts["rounds"]
    assert first["drawn"] == 144
    # An answer that is empty is none, so that there is nothing to say is wrong.
    solved = list(DrawnFile(drawn.folder / "drawn.jsonl"))
    layout = drawn_recipe.layout
    assert layout is not None
    for before, after in ((0, second), (1, third)):
        asked = [c for one in solved for c in one.candidates if c.round == before and not c.right]
        assert after["drawn"] == sum(c.reading(layout, starts_thinking=False).answer is not None for c in asked) > 0
    assert {row["round"] for row in rows_of(drawn)} >= {0, 1}


def test_rewritten_rows_are_checked_again(worked_recipe: SynthRecipe, tmp_path: Path) -> None:
    """A template's answer is found where `form` says, and a row in which it cannot be found is not written."""
    small = worked_recipe.replace(tasks=({"name": "modular", "levels": 3},), problems=20, draw={"samples": 1})
    boxed = {"thought_template": "Step by step: {thought}.", "answer_template": "The answer is \\boxed{{answer}}."}
    result, _ = run(small.replace(rewrite=boxed | {"form": "boxed", "instruction": "Use a box."}), tmp_path)
    for row in rows_of(result):
        asked, said = row["messages"]
        assert asked["content"] == f"{row['question']}\nUse a box."
        assert said["reasoning_content"].startswith("Step by step: ")
        assert said["content"] == f"The answer is \\boxed{{{row['right']}}}."
    with pytest.raises(UserError, match="rewriting 20; see whether"):
        run(small.replace(rewrite=boxed | {"form": "tags"}), tmp_path, resume=True)


def test_teacher_that_never_solves(worked_recipe: SynthRecipe, start: Path, drawn_recipe: SynthRecipe) -> None:
    """An empty result ends in one line with the yield and what to change; the candidates stay on disk."""
    runs = start / "empty"
    never = drawn_recipe.replace(tasks=({"name": f"{start / 'rules.py'}:Never"},), problems=2)
    with pytest.raises(UserError) as refused:
        run(never, runs)
    assert "wrong" in str(refused.value)
    assert "take easier levels" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(list(DrawnFile(runs / "drawn" / "drawn.jsonl"))) == 2
    assert not (runs / "drawn" / "traces.jsonl").exists()


def test_held_out_rows_of_the_user_refuse_the_run(worked_recipe: SynthRecipe, tmp_path: Path) -> None:
    """Where rows to be learnt beside ask a held-out question, nothing is drawn and no folder stays."""
    question = next(open_task("modular").problems("held-out", level=1, seed=1)).question
    file = tmp_path / "general.jsonl"
    file.write_text(json.dumps({"prompt": f" {question} ", "completion": "7"}) + "\n")
    recipe = worked_recipe.replace(tasks=({"name": "modular"},), decontamination={"refuse": (str(file),)})
    with pytest.raises(UserError, match=r"contaminated: 1 training row .*general.jsonl:1"):
        run(recipe, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ({"name": "modular", "levels": 99},)}, "task modular: levels = 99, but it has 12"),
        ({"tasks": ({"name": "modulo"},)}, "unknown task 'modulo' (did you mean 'modular'?)"),
        ({"tasks": ({"name": "RULES:Odd"},)}, "task Odd: it writes no worked solution; draw from a model"),
        ({"tasks": ({"name": "RULES:Halved"},)}, r"task Halved: its solution() holds '\ud83d', half a character"),
        ({"tasks": ({"name": "RULES:HalfAsked"},)}, r"its problem() raised ValueError: a problem's question holds"),
        ({"source": "model", "model": "nowhere/at-all", "tasks": ({"name": "modular"},)}, "nowhere/at-all"),
        ({"decontamination": {"files": ("none.jsonl",)}}, "none.jsonl: no such file"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    changes: dict[str, Any], said: str, worked_recipe: SynthRecipe, start: Path, tmp_path: Path
) -> None:
    """A task, level, solution, model or file that there is not is named in one line."""
    if "tasks" in changes:
        tasks = tuple(t | {"name": t["name"].replace("RULES", str(start / "rules.py"))} for t in changes["tasks"])
        changes = changes | {"tasks": tasks}
    with pytest.raises(UserError) as refused:
        run(worked_recipe.replace(problems=2, draw={"samples": 1}, **changes), tmp_path / "runs")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_prompt_of_a_run_is_its_recipes(drawn_recipe: SynthRecipe, start: Path, tmp_path: Path) -> None:
    """A teacher that `fathom rl` trained is asked and read as it was trained, unless the recipe says how; of
    a prompt or layout that it changes in part, the rest stays, but for one of another kind."""
    trained = RLRecipe(
        name="zero",
        model="base",
        task={"name": "modular"},
        prompt={"style": "template", "template": "Q: {question}\nA:"},
        rewards={"layout": {"form": "line"}},
    )
    (tmp_path / "recipe.toml").write_text(dump_recipe(trained))
    plain = drawn_recipe.replace(prompt=None, layout=None)
    for model in (tmp_path, tmp_path / "best"):
        found = resolved(plain.replace(model=str(model)))
        assert (found.prompt, found.layout) == (trained.prompt, trained.rewards.layout)
    assert resolved(drawn_recipe.replace(model=str(tmp_path))).prompt == drawn_recipe.prompt
    values = plain.model_dump(exclude_none=True) | {"model": str(tmp_path), "prompt": {"opens_thought": True}}
    partly = resolved(SynthRecipe.parse(values | {"layout": {"thoughts": "optional"}}, where="here"))
    assert partly.prompt == trained.prompt.replace(opens_thought=True)
    assert partly.layout == trained.rewards.layout.replace(thoughts="optional")
    values |= {"prompt": {"style": "zero"}, "layout": {"form": "rest"}}
    other = resolved(SynthRecipe.parse(values, where="here"))
    assert (other.prompt, other.layout) == (PromptSection(style="zero"), Layout(form="rest"))
    other = resolved(plain)
    assert other.prompt is not None
    assert other.prompt.style == "chat"


def test_dry_run_prints_every_field_and_draws_nothing(drawn_recipe: SynthRecipe, tmp_path: Path) -> None:
    """The resolved recipe is TOML that reads back as itself, tasks included, followed by what would be drawn."""
    recipe, said = drawn_recipe.replace(model="not/here"), io.StringIO()
    dry_run(recipe, Console(file=said, width=400))
    printed, _, rows = said.getvalue().partition("\nrun 'drawn'")
    file = tmp_path / "printed.toml"
    file.write_text(printed, encoding="utf-8")
    assert read_recipe(file, [], SynthRecipe) == recipe
    assert "432 with all repair rounds" in rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'model' is missing"),
        ("modle = 'x'", "unknown key 'modle' (did you mean 'model'?)"),
        ("source = 'worked'\nmodel = 'x'", "source = worked asks no model"),
        ("model = 'x'\nfilters.langauge = 1.0", "unknown key 'filters.langauge'"),
        ("model = 'x'\nrewrite.answer_template = 'x'", "answer_template must have {answer} in it, once"),
        ("model = 'x'\ndraw.repair_rounds = 3", "draw.repair_rounds"),
        ("model = 'x'\nproblems = 1", "less than one for each of 2 tasks"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(text: str, said: str, tmp_path: Path) -> None:
    """An unknown or senseless field is refused with its name."""
    file = tmp_path / "recipe.toml"
    file.write_text(f"name = 'x'\n{text}\n[[tasks]]\nname = 'modular'\n[[tasks]]\nname = 'logic'\n")
    with pytest.raises(UserError) as refused:
        read_recipe(file, [], SynthRecipe)
    assert said in str(refused.value)
