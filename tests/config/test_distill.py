"""A distillation: what its sections are filled with, which stages it becomes, what is refused; and its student."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from rich.console import Console

import fathom.pipeline.distill as module
from fathom.cli import main
from fathom.config import preset, read_recipe
from fathom.config.distill import DistillRecipe
from fathom.config.rl import PromptSection, RLRecipe
from fathom.data import train_bpe
from fathom.data.shards import MANIFEST, Manifest
from fathom.errors import UserError
from fathom.model.accounting import count_parameters
from fathom.model.checkpoint import save_model
from fathom.model.transformer import Transformer
from fathom.pipeline.state import read_state
from tests.model.configs import build
from tests.train.tiny import MODEL

RECIPES = Path(__file__).parents[2] / "recipes"
TASKS = [{"name": "modular", "levels": 2}]
SMALL = {
    "rollout": {"problems": 2, "samples": 2, "max_tokens": 4},
    "train": {"steps": 2, "precision": "fp32"},
    "eval": {"problems": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one vocabulary, `teacher` and `student`; `zero`, a teacher with its run's recipe; and `foreign`, of
    another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe(["0123456789"], 266)
    for seed, name in enumerate(("teacher", "student", "zero")):
        save_model(
            build(MODEL.replace(vocab_size=266, max_position_embeddings=256), seed), folder / name, tokenizer=tokenizer
        )
    asked = {"style": "template", "template": "Q {question} A", "opens_thought": True}
    run = RLRecipe(
        name="zero", model="base", task={"name": "modular"}, prompt=asked, rewards={"layout": {"form": "line"}}
    )
    (folder / "zero" / "recipe.toml").write_text(tomli_w.dumps(run.model_dump(exclude_none=True)))
    other = train_bpe(["0123456789 sums"] * 3, 267)
    foreign = Transformer(MODEL.replace(vocab_size=other.vocab_size))
    foreign.init_weights(0)
    save_model(foreign, folder / "foreign", tokenizer=other)
    return folder


def recipe(models: Path, **fields: Any) -> DistillRecipe:
    """Of a few tiny steps."""
    values: dict[str, Any] = {
        "name": "d",
        "teacher": str(models / "teacher"),
        "model": str(models / "student"),
        "tasks": TASKS,
        "on_policy": SMALL,
        "rewards_only": SMALL,
        "evaluation": {"problems": 2, "samples": 2, "max_tokens": 4},
    }
    return DistillRecipe.parse(values | fields, where="recipe")


def stages(told: DistillRecipe) -> dict[str, tuple[str, dict[str, Any]]]:
    """Verb and fields of every stage."""
    return {stage.name: (stage.verb, stage.set) for stage in module.pipeline_of(module.resolved(told)).stages}


# ------------------------------------------------------------------------------------------------------ what it is


def test_a_section_keeps_the_defaults_beside_what_is_said(models: Path) -> None:
    """One field of a table changes that field alone, and the others are those of a distillation, not of the command."""
    told = recipe(models, traces={"draw": {"samples": 5}}, sft={"train": {"epochs": 1.0}})
    assert (told.traces.draw.samples, told.traces.draw.max_tokens, told.traces.problems) == (5, 128, 3000)
    assert (told.sft.train.epochs, told.sft.train.batch) == (1.0, 64)
    assert told.sft.data.files == ("@traces/traces.jsonl",)
    assert recipe(models, traces={"format": "parquet"}).sft.data.files == ("@traces/traces.parquet",)


WAYS = {
    "traces": ["teacher", "student", "traces", "distilled"],
    "on-policy": ["teacher", "student", "on-policy"],
    "both": ["teacher", "student", "traces", "distilled", "on-policy"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rewards", [False, True])
def test_every_way_is_its_stages(models: Path, way: str, rewards: bool) -> None:
    """Those of the way, and rewards alone if they are to be compared; the folder stands for what was taught last by the
    teacher."""
    told = recipe(models, way=way, compare_rewards=rewards)
    found = module.pipeline_of(module.resolved(told))
    assert [stage.name for stage in found.stages] == WAYS[way] + ["rewards"] * rewards
    assert found.serves == WAYS[way][-1]
    found.recipes(Path("runs/d"), Path())  # every stage's fields are a recipe


def test_who_learns_from_whom(models: Path) -> None:
    """On-policy, the student that has learnt from traces goes on learning; rewards alone teach the one that has learnt
    nothing, and have no teacher."""
    found = stages(recipe(models, way="both", compare_rewards=True))
    assert found["teacher"] == ("model", {"model": str(models / "teacher")})
    assert found["traces"][1]["model"] == "@teacher"
    assert found["distilled"][1]["model"] == found["rewards"][1]["model"] == "@student"
    assert found["on-policy"][1]["model"] == "@distilled"
    assert found["on-policy"][1]["teacher"] == "@teacher"
    assert found["rewards"][1]["teacher"] is None
    assert stages(recipe(models, way="on-policy"))["on-policy"][1]["model"] == "@student"


def test_everyone_is_asked_as_taught(models: Path) -> None:
    """The teacher as in its own run, the student and rewards alike; as a chat after traces, which the teacher judges
    behind its own prompt."""
    told = recipe(models, teacher=str(models / "zero"), way="both", compare_rewards=True)
    found = module.pipeline_of(module.resolved(told))
    recipes = found.recipes(Path("runs/d"), Path())
    asked = {stage.name: found.settings(stage, recipes[stage.name]) for stage in found.stages if stage.yields_model}
    own = PromptSection(style="template", template="Q {question} A", opens_thought=True)
    chat = PromptSection(style="chat", opens_thought=True)
    assert {name: one.prompt for name, one in asked.items()} == {
        "teacher": own, "student": own, "distilled": chat, "on-policy": chat, "rewards": own,
    }  # fmt: skip
    forms = {name: one.layout.form for name, one in asked.items()}
    assert forms == {"teacher": "line", "student": "line", "distilled": "rest", "on-policy": "rest", "rewards": "line"}
    assert recipes["on-policy"].teacher_prompt == own
    alone = module.resolved(recipe(models, teacher=str(models / "zero"), way="on-policy")).on_policy
    assert (alone.prompt, alone.teacher_prompt) == (own, None)


def test_what_is_said_of_prompts_stands(models: Path) -> None:
    """A prompt or a layout in the file is not replaced by the teacher's."""
    said = {"style": "template", "template": "{question}?"}
    told = recipe(
        models, teacher=str(models / "zero"), way="on-policy", on_policy={"prompt": said}, evaluation={"prompt": said}
    )
    found = module.resolved(told)
    assert found.on_policy.prompt.template == found.evaluation.prompt.template == "{question}?"
    assert found.on_policy.rewards.layout.form == "line"


def test_several_tasks_are_one_mixture_for_rewards(models: Path) -> None:
    """Each with its own levels, in training as in measuring."""
    tasks = [{"name": "modular", "levels": 2}, {"name": "arithmetic", "levels": 1}]
    told = recipe(models, tasks=tasks)
    assert told.on_policy.task.name == "modular?levels=2 + arithmetic?levels=1"
    assert told.on_policy.task.levels == 2
    assert told.evaluation.tasks == ("modular?levels=2", "arithmetic?levels=1")
    assert [task.name for task in told.traces.tasks] == ["modular", "arithmetic"]


def test_flags_reach_every_section(tmp_path: Path) -> None:
    """`--sft.train.epochs 3` and its like have the types of their fields; `--teacher` and `--model` name others."""
    words = "--teacher t --model s --sft.train.epochs 3 --on-policy.eval.budgets 8 --traces.filters.per_problem none"
    told = read_recipe(RECIPES / "distill-arithmetic.toml", words.split(), DistillRecipe)
    assert (told.teacher, told.model, told.sft.train.epochs) == ("t", "s", 3.0)
    assert (told.on_policy.eval.budgets, told.traces.filters.per_problem) == ((8,), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sft": {"train": {"epoch": 1.0}}},
            r"unknown key 'sft\.train\.epoch' \(did you mean 'sft\.train\.epochs'\?\)",
        ),
        (
            {"tasks": [{"nmae": "modular"}]},
            r"^recipe: 'tasks\.0\.name' is missing; unknown key 'tasks\.0\.nmae'(?!.*traces)",
        ),
        ({"tasks": []}, r"^recipe: 'tasks'[^;]*$"),
        ({"sft": 3}, "'sft' is a table, not 3"),
        ({"sft": {"model": "other"}}, r"sft\.model follows from the fields above"),
        ({"on_policy": {"task": {"name": "countdown"}}}, r"on_policy\.task\.name follows"),
        ({"rewards_only": {"teacher": "t"}}, r"rewards_only\.teacher follows"),
        ({"on_policy": {"rollout": {"resample": 1}}}, r"rollout\.resample = 1 with a teacher"),
        ({"model": "t/"}, "teacher and model are both t/"),
        ({"way": "off-policy"}, "'way' = 'off-policy'"),
    ],
)
def test_a_mistake_is_one_line(models: Path, fields: dict[str, Any], message: str) -> None:
    """Named by its place in the file, and once."""
    with pytest.raises(UserError, match=message) as error:
        recipe(models, **{"teacher": "t"} | fields)
    assert "\n" not in str(error.value)


def test_a_distillation_is_not_taken_for_another_recipe(capsys: pytest.CaptureFixture) -> None:
    """`fathom synth` of it says which command it is for, and a plain recipe is told from it."""
    file = str(RECIPES / "distill-arithmetic.toml")
    assert main(["synth", file, "--dry-run"]) == 2
    assert "is a recipe for 'fathom distill'" in capsys.readouterr().err
    assert main(["distill", str(RECIPES / "zero-arithmetic.toml")]) == 2
    assert "is a recipe for 'fathom rl'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ what it does


def run(told: DistillRecipe, runs: Path, **options: Any) -> str:
    said = io.StringIO()
    module.distill(told, console=Console(file=said, width=200), runs=runs, **options)
    return said.getvalue()


def test_a_student_is_judged_and_measured(models: Path, tmp_path: Path) -> None:
    """On-policy and by rewards alone: every model is measured, nothing is done twice, and a changed section needs
    `redo`, which leaves what does not build on it."""
    told = recipe(models, way="on-policy", compare_rewards=True)
    said = run(told, tmp_path)
    state = read_state(tmp_path / "d")
    assert [(name, one.finished, one.evaluation is not None) for name, one in state.items()] == [
        (name, True, True) for name in ("teacher", "student", "on-policy", "rewards")
    ]
    assert f"taught by {models / 'teacher'}, " in said
    assert run(told, tmp_path).count("finished before") == 4
    other = recipe(models, way="on-policy", compare_rewards=True, on_policy={**SMALL, "optimizer": {"lr": 2e-3}})
    with pytest.raises(UserError, match="stage on-policy was made by another recipe"):
        run(other, tmp_path)
    assert run(other, tmp_path, redo=True).count("finished before") == 3


def test_a_teacher_that_never_solves_stops_before_anything_is_learnt(models: Path, tmp_path: Path) -> None:
    """Nothing is kept of what it wrote: one line says so and what to do, and the student is not touched."""
    told = recipe(models, traces={"problems": 4, "draw": {"samples": 1, "max_tokens": 4}})
    with pytest.raises(UserError, match=r"^stage traces: .* no row is left of 4 candidates, of which .*; .*") as error:
        run(told, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "d" / "distilled").exists()
    assert not read_state(tmp_path / "d")["traces"].finished


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": "nobody"}, "nobody: no such model folder"),
        ({"teacher": "data"}, "data: holds tokens to train on, not a model"),
        ({"teacher": "foreign", "way": "on-policy"}, 'another vocabulary .* way = "traces"'),
        ({"teacher": "again"}, "teacher and model are both"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_at_once(
    models: Path, tmp_path: Path, fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first stage, with nothing written."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / MANIFEST).write_text(json.dumps({"format": Manifest.model_fields["format"].default}))
    for name, other in (("student", "student"), ("again", "student"), ("foreign", "foreign")):
        (tmp_path / name).symlink_to(models / other)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(recipe(models, **{"model": "student"} | fields), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_teacher_elsewhere_writes_but_does_not_judge(models: Path) -> None:
    """With an endpoint there is no model to be measured, and none to judge tokens."""
    far = {"draw": {"endpoint": "http://127.0.0.1:1/v1"}}
    found = stages(recipe(models, traces=far))
    assert list(found) == ["student", "traces", "distilled"]
    assert found["traces"][1]["model"] == str(models / "teacher")
    with pytest.raises(UserError, match=r"must be on this machine; take way = \"traces\""):
        stages(recipe(models, traces=far, way="on-policy"))


def test_a_dry_run_tells_how_everyone_is_asked(models: Path, tmp_path: Path) -> None:
    """Prompts as they will be, and every stage in a line, though the student is not there yet; nothing is written."""
    said = io.StringIO()
    told = recipe(models, teacher=str(models / "zero"), model=str(tmp_path / "nobody"), way="both")
    module.dry_run(told, console=Console(file=said, width=400, soft_wrap=True), runs=tmp_path / "runs")
    assert 'template = "Q {question} A"' in said.getvalue()
    assert all(f"\n{name} " in said.getvalue() for name in WAYS["both"])
    assert "2 steps of 2 × 2 of modular" in said.getvalue()
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------ its student


def test_the_students_preset_is_a_smaller_llama_of_the_same_tokens() -> None:
    """Fewer parameters than a token meets in fathom-nano; the same vocabulary and context; grouped queries."""
    student, teacher = preset("llama-nano"), preset("fathom-nano")
    assert count_parameters(student).total < count_parameters(teacher).active
    assert (student.vocab_size, student.max_position_embeddings) == (
        teacher.vocab_size,
        teacher.max_position_embeddings,
    )
    assert student.model_type == "llama"
    assert student.num_key_value_heads < student.num_attention_heads


def test_the_student_opens_in_transformers(tmp_path: Path) -> None:
    """A folder of it gives the same logits there."""
    transformers = pytest.importorskip("transformers")
    model = build(preset("llama-nano"))
    save_model(model, tmp_path / "student", tokenizer=train_bpe(["0123456789"], 266))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    ids = torch.randint(266, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs.eval()(ids).logits, model(ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["distill-arithmetic", "student-base"])
def test_the_recipes_can_be_read(name: str) -> None:
    """Both files are whole, and are about each other."""
    if name == "student-base":
        assert read_recipe(RECIPES / f"{name}.toml", []).model == preset("llama-nano")
    else:
        assert read_recipe(RECIPES / f"{name}.toml", [], DistillRecipe).model == "runs/student-base"
