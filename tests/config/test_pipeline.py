"""What the fields of a pipeline's file come to."""

from pathlib import Path

from fathom.config.pipeline import Pipeline

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
