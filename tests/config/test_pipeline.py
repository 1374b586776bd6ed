"""What the fields of a pipeline's file come to."""

from pathlib import Path

import pytest

from fathom.config.pipeline import Pipeline, read_pipeline
from fathom.config.recipe import read_recipe
from fathom.config.synth import SynthRecipe
from fathom.errors import UserError

TASKS = [{"name": "modular"}]


def test_each_factory_draws_problems_of_its_own() -> None:
    """Stages `synth` have different seeds, which follow from the pipeline's and their names; others have the
    pipeline's, and a seed that is set stays."""
    stages = [
        {"name": "cold", "verb": "synth", "set": {"source": "worked", "tasks": TASKS}},
        {"name": "more", "verb": "synth", "set": {"source": "worked", "tasks": TASKS}},
        {"name": "fixed", "verb": "synth", "set": {"source": "worked", "tasks": TASKS, "seed": 5}},
        {"name": "zero", "verb": "rl", "set": {"model": "m", "task": {"name": "modular"}}},
    ]

    def seeds(seed: int) -> dict[str, int]:
        values = {"name": "p", "seed": seed, "evaluation": {"tasks": ["modular"]}, "stages": stages}
        recipes = Pipeline.parse(values, where="here").recipes(Path("p"), Path())
        return {name: recipe.seed for name, recipe in recipes.items()}

    first, second = seeds(1), seeds(2)
    assert (first["fixed"], first["zero"], second["zero"]) == (5, 1, 2)
    assert len({first["cold"], first["more"], second["cold"], second["more"]}) == 4
    assert first == seeds(1)


STAGE = '[[stages]]\nname = "{name}"\nverb = "synth"\nset = {{ source = "worked", tasks = [{{ name = "modular" }}] }}\n'
HEAD = 'name = "p"\nevaluation = { tasks = ["modular"] }\n'
BAD = {
    "a name with a dot": (HEAD + STAGE.format(name="a.b"), r"stages.0.name' = 'a.b': a stage's name .*'-' and '_'$"),
    "a name of no folder": (HEAD + STAGE.format(name="../a"), "a stage's name .*'-' and '_'$"),
    "no name": (HEAD + '[[stages]]\nverb = "synth"\n', r"'stages.0.name' is missing$"),
    "no such verb": (HEAD + '[[stages]]\nname = "x"\nverb = "fly"\n', r"'pretrain', 'synth', 'sft', 'rl' or 'model'$"),
    "no stages": (HEAD + "stages = []\n", "at least 1 item"),
    "no list": (HEAD + "stages = 3\n", "stages' = 3"),
    "a single run's recipe": ('tasks = [{ name = "modular" }]\n', "is a recipe for 'fathom synth', not a pipeline's"),
    "no TOML": ("stages = [", "not valid TOML"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD.keys())
def test_a_file_that_is_no_pipeline_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    """It says what is wrong, and of a stage that is mistaken nothing else."""
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_pipeline(tmp_path / "p.toml", [])
    assert "\n" not in str(error.value)


def test_files_of_editors_that_mark_utf8_are_read(tmp_path: Path) -> None:
    """A byte order mark before the first line is none of its letters, in a pipeline and in its stages' recipes."""
    (tmp_path / "rows.toml").write_text(
        'name = "r"\nsource = "worked"\ntasks = [{ name = "modular" }]\n', encoding="utf-8-sig"
    )
    stage = '[[stages]]\nname = "rows"\nverb = "synth"\nrecipe = "rows.toml"\n'
    (tmp_path / "p.toml").write_text(HEAD + stage, encoding="utf-8-sig")
    pipeline = read_pipeline(tmp_path / "p.toml", [])
    made = pipeline.recipes(Path("p"), tmp_path)["rows"]
    alone = read_recipe(tmp_path / "rows.toml", [], SynthRecipe)
    assert made.replace(seed=1, name="r") == alone
