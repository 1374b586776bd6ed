"""The data factory end to end, with solutions written by rule and with a model of a few thousand parameters."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from rich.console import Console

import fathom.synth.factory as module
from fathom.config import dump_recipe, read_recipe
from fathom.config.rl import RLRecipe
from fathom.config.synth import SynthRecipe
from fathom.data import Tokenizer, train_bpe
from fathom.data.conversations import read_conversations
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from fathom.model.transformer import Transformer
from fathom.synth.candidates import DrawnFile
from fathom.synth.factory import SynthResult, synthesize
from fathom.synth.plan import dry_run, resolved, shares
from fathom.synth.words import units
from fathom.tasks.catalogue import open_task
from fathom.tasks.task import Problem, judge
from fathom.train.rollout import draw_problems, held_out_problems, seed_of
from tests.train.tiny import MODEL

RULES = '''
from fathom.tasks import Problem, Task


class Odd(Task):
    """Answers of an odd number of bytes are right."""

    levels = 2

    def problem(self, random, level):
        return Problem(f"{random.randrange(10**6)}:{level}", "1", level=level)

    def check(self, problem, answer):
        return float(len(answer.encode()) % 2)


class Never(Odd):
    def check(self, problem, answer):
        return 0.0


class Sloppy(Task):
    """Sums whose questions are spelt in several ways; some solutions are wrong, and some go round in circles."""

    def problem(self, random, level):
        a, b = random.randrange(30), random.randrange(30)
        said = random.choice(("What is {} + {}?", "what is  {}+{}", "WHAT IS {} +{} ?"))
        wrong = a % 5 == 0
        return Problem(said.format(a, b), str(a + b + wrong), level, data={"sum": a + b})

    def check(self, problem, answer):
        return float(answer.strip() == str(problem.data["sum"]))

    def solution(self, problem, random):
        return "so we add them up once more " * (40 if problem.data["sum"] % 7 == 0 else 1) + str(problem.data["sum"])
'''


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny V3 with random weights, its byte tokenizer, and a file of tasks."""
    folder = tmp_path_factory.mktemp("synth")
    plain = train_bpe(["0123456789"], 266)
    # Weights are random: a model that ends its text with one token in four ends it soon.
    ends = (1, *range(10, 266, 4))
    tokenizer = Tokenizer(plain.backend, bos_token_id=0, eos_token_ids=ends, pad_token_id=2, chat_template=None)
    model = Transformer(MODEL.replace(vocab_size=tokenizer.vocab_size))
    model.init_weights(1)
    save_model(model, folder / "model", tokenizer=tokenizer)
    (folder / "rules.py").write_text(RULES)
    return folder


@pytest.fixture(scope="session")
def drawn_recipe(start: Path) -> SynthRecipe:
    """Twenty-four problems, six candidates each of a random model, whose length's parity is right or wrong."""
    return SynthRecipe(
        name="drawn",
        model=str(start / "model"),
        tasks=({"name": f"{start / 'rules.py'}:Odd", "levels": 2},),
        problems=24,
        prompt={"style": "template"},
        layout={"form": "rest", "thoughts": "optional"},
        draw={"samples": 6, "max_tokens": 6, "batch": 6, "repair_rounds": 2, "repair_text": "no {answer}"},
        filters={"layout": False, "finished": False, "language": 0.0},
        decontamination={"held_out": 4},
    )


@pytest.fixture(scope="session")
def worked_recipe(start: Path) -> SynthRecipe:
    """Solutions of two tasks by rule, some wrong, some repetitive, some of held-out sums."""
    return SynthRecipe(
        name="worked",
        source="worked",
        tasks=({"name": f"{start / 'rules.py'}:Sloppy"}, {"name": "bilingual", "levels": 2, "share": 0.25}),
        problems=100,
        draw={"samples": 2},
    )


def run(recipe: SynthRecipe, runs: Path, **options: Any) -> tuple[SynthResult, str]:
    said = io.StringIO()
    result = synthesize(recipe, runs=runs, console=Console(file=said, width=300), **options)
    return result, said.getvalue()


def rows_of(result: SynthResult) -> list[dict[str, Any]]:
    assert result.traces is not None
    if result.traces.suffix == ".parquet":
        return pyarrow.parquet.read_table(result.traces).to_pylist()
    return [json.loads(line) for line in result.traces.read_text(encoding="utf-8").split("\n")[:-1]]


def counts_of(result: SynthResult) -> dict[str, Any]:
    return json.loads((result.folder / "synth.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def drawn(drawn_recipe: SynthRecipe, tmp_path_factory: pytest.TempPathFactory) -> SynthResult:
    """The run of a model, unbroken. Whoever changes something in it works on a copy."""
    return run(drawn_recipe, tmp_path_factory.mktemp("runs"))[0]


@pytest.fixture(scope="session")
def worked(worked_recipe: SynthRecipe, tmp_path_factory: pytest.TempPathFactory) -> SynthResult:
    """The run of worked solutions, unbroken."""
    return run(worked_recipe, tmp_path_factory.mktemp("runs"))[0]


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


def test_a_write_that_was_cut_anywhere_is_recovered(worked: SynthResult, tmp_path: Path) -> None:
    """Whatever a kill leaves of the file, its whole lines count, and what is behind them is cut away."""
    content = (worked.folder / "drawn.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)[:2]
    known = [(one.task, Problem(one.question)) for one in DrawnFile(worked.folder / "drawn.jsonl")]
    file = DrawnFile(tmp_path / "drawn.jsonl")
    for size in range(len(lines[0]) + len(lines[1]) + 1):
        file.path.write_bytes(content[:size])
        whole = (size >= len(lines[0])) + (size == len(lines[0] + lines[1]))
        assert file.recover(known) == whole
        assert file.path.read_bytes() == b"".join(lines[:whole])
    with pytest.raises(UserError, match=r"drawn.jsonl:1: holds another problem than"):
        file.recover(known[1:])


def test_killed_and_resumed_equals_unbroken(
    drawn: SynthResult, drawn_recipe: SynthRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the midst of a write, then --resume: the files of the unbroken run, and nothing drawn twice."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_recipe(drawn_recipe))
    killed = subprocess.run(
        [sys.executable, "-m", "tests.synth.killed", recipe, tmp_path, "2"], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    torn = (tmp_path / "drawn" / "drawn.jsonl").read_bytes()
    assert torn
    assert not torn.endswith(b"\n")
    whole, asked = module.Factory._solve, []

    def counted(factory: Any, teacher: Any, name: str, problems: Any) -> Any:
        asked.extend(problems)
        return whole(factory, teacher, name, problems)

    monkeypatch.setattr(module.Factory, "_solve", counted)
    result, _ = run(drawn_recipe, tmp_path, resume=True)
    assert len(asked) == 24 - torn.count(b"\n")
    for name in ("drawn.jsonl", "traces.jsonl", "synth.json"):
        assert (result.folder / name).read_bytes() == (drawn.folder / name).read_bytes(), name


def test_stopped_by_a_signal(
    worked: SynthResult, worked_recipe: SynthRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM gives up the batch under way and says how to go on; resumed, the file is that of an unbroken run."""
    recipe, whole, batches = worked_recipe.replace(draw={"samples": 2, "batch": 30}), module.Factory._solve, 0

    def signalled(factory: Any, *arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(factory, *arguments)

    monkeypatch.setattr(module.Factory, "_solve", signalled)
    result, said = run(recipe, tmp_path)
    assert result.interrupted
    assert result.traces is None
    assert f"synth {result.folder / 'recipe.toml'} --resume" in said
    assert len(list(DrawnFile(result.folder / "drawn.jsonl"))) == 30
    result, _ = run(recipe, tmp_path, resume=True)
    assert (result.folder / "traces.jsonl").read_bytes() == (worked.folder / "traces.jsonl").read_bytes()


def test_other_filters_draw_nothing(
    worked: SynthResult, worked_recipe: SynthRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is resumed with other filters and another format without a teacher: Parquet holds the rows of
    JSON Lines; with one row a problem and nothing held out, each question is there once, and more of them are."""
    monkeypatch.setattr(module, "open_teacher", lambda *_: pytest.fail("a teacher was opened"))
    folder = shutil.copytree(worked.folder, tmp_path / "worked")
    before = rows_of(worked)
    same, _ = run(worked_recipe.replace(format="parquet"), tmp_path, resume=True)
    assert not (folder / "traces.jsonl").exists()
    for row, plain in zip(rows_of(same), before, strict=True):
        row["messages"] = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
        assert row == plain
    few = worked_recipe.replace(filters={"per_problem": 1, "choice": "shortest"}, decontamination={"held_out": 0})
    result, _ = run(few, tmp_path, resume=True)
    questions = [row["question"] for row in rows_of(result)]
    assert len(set(questions)) == len(questions)
    assert {row["question"] for row in before} < set(questions)


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


def test_full_disk_keeps_what_was_drawn(
    worked_recipe: SynthRecipe, worked: SynthResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up in the midst of a batch ends in one line; with room again, the run goes on to the same
    file."""
    recipe = worked_recipe.replace(draw={"samples": 2, "batch": 30})
    whole, batches = DrawnFile.append, 0

    def append(file: DrawnFile, solved: Any) -> None:
        nonlocal batches
        batches += 1
        if batches == 2:
            with file.path.open("ab") as torn:
                torn.write(b'{"task": "tor')
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(file, solved)

    monkeypatch.setattr(DrawnFile, "append", append)
    with pytest.raises(UserError, match=r"No space left on device\); all before problem 31 is kept: make room"):
        run(recipe, tmp_path)
    result, _ = run(recipe, tmp_path, resume=True)
    assert (result.folder / "traces.jsonl").read_bytes() == (worked.folder / "traces.jsonl").read_bytes()


def test_held_out_rows_of_the_user_refuse_the_run(worked_recipe: SynthRecipe, tmp_path: Path) -> None:
    """Where rows to be learnt beside ask a held-out question, nothing is drawn and no folder stays."""
    question = next(open_task("modular").problems("held-out", level=1, seed=1)).question
    file = tmp_path / "general.jsonl"
    file.write_text(json.dumps({"prompt": f" {question} ", "completion": "7"}) + "\n")
    recipe = worked_recipe.replace(tasks=({"name": "modular"},), decontamination={"refuse": (str(file),)})
    with pytest.raises(UserError, match=r"contaminated: 1 training row .*general.jsonl:1"):
        run(recipe, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_folders_are_not_taken_from_others(worked: SynthResult, worked_recipe: SynthRecipe, drawn_recipe: Any) -> None:
    """A run that exists is neither replaced nor gone on with under another recipe, nor one of a training."""
    runs = worked.folder.parent
    kept = (worked.folder / "drawn.jsonl").read_bytes()
    with pytest.raises(UserError, match="this run exists; continue it with --resume"):
        run(worked_recipe, runs)
    with pytest.raises(UserError, match="the recipe has changed in seed; change it back"):
        run(worked_recipe.replace(seed=2), runs, resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        run(worked_recipe.replace(name="new"), runs, resume=True)
    trained = runs / "trained"
    (trained / "checkpoints").mkdir(parents=True)
    (trained / "recipe.toml").write_text("")
    with pytest.raises(UserError, match="holds a model's training"):
        run(worked_recipe.replace(name="trained"), runs, overwrite=True)
    assert (worked.folder / "drawn.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ({"name": "modular", "levels": 99},)}, "task modular: levels = 99, but it has 12"),
        ({"tasks": ({"name": "modulo"},)}, "unknown task 'modulo' (did you mean 'modular'?)"),
        ({"tasks": ({"name": "RULES:Odd"},)}, "task Odd: it writes no worked solution; draw from a model"),
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
    """A teacher that `fathom rl` trained is asked and read as it was trained, unless the recipe says how."""
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
