"""A teacher behind an endpoint."""

from pathlib import Path

from fathom.config.synth import SynthRecipe
from fathom.engine.engine import Engine, EngineSettings
from fathom.model.checkpoint import load
from fathom.synth.factory import SynthResult
from tests.serve.test_server import running
from tests.synth.runs import rows_of, run


def test_a_served_model_teaches_the_same(
    drawn: SynthResult, drawn_recipe: SynthRecipe, start: Path, tmp_path: Path
) -> None:
    """Behind `fathom serve`, the same model with the same seeds gives the same rows, but for where they come
    from."""
    model, tokenizer = load(start / "model", dtype="float32")
    with Engine(model, tokenizer, EngineSettings()) as engine, running(engine, tokenizer) as (url, _):
        served = drawn_recipe.replace(draw=drawn_recipe.draw.model_dump() | {"endpoint": url})
        result, _ = run(served, tmp_path)
    found = rows_of(result)
    assert {row.pop("source") for row in found} == {f"endpoint:{url}"}
    assert found == [{key: value for key, value in row.items() if key != "source"} for row in rows_of(drawn)]
