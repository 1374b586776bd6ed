"""Generation against the definition: argmax of a full recompute, nucleus sets, seeds, contexts."""

import pytest
import torch

from fathom.engine.generate import generate_ids
from fathom.engine.protocol import Sampling
from fathom.errors import UserError
from fathom.model.transformer import Transformer
from tests.model.configs import FAMILIES, V3, build

GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("name", ["v3", "v2-lite", "llama", "qwen3"])
def test_greedy_decode_equals_recomputing(name: str) -> None:
    """Every token drawn through the cache is the argmax of a fresh pass over everything before it."""
    model, ids = build(FAMILIES[name]), [3, 1, 4, 1, 5]
    got = list(generate_ids(model, ids, max_tokens=12, sampling=GREEDY))
    assert len(got) == 12
    for token in got:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)


def test_seed_decides_the_text() -> None:
    """The same seed draws the same tokens, another seed draws others."""
    model = build(V3)

    def draw(seed: int | None) -> list[int]:
        return list(generate_ids(model, [1, 2], max_tokens=16, sampling=Sampling(temperature=1.0, seed=seed)))

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    """A seed that the generator cannot take is a sentence before anything is loaded."""
    with pytest.raises(UserError, match="'seed' = "):
        Sampling.parse({"seed": seed}, where="generate")
    assert Sampling(seed=2**63 - 1).seed == 2**63 - 1


def test_stop_token_ends_the_text() -> None:
    """Generation ends before the first stop token."""
    model = build(V3)
    free = list(generate_ids(model, [3, 1, 4], max_tokens=12, sampling=GREEDY))
    stop = free[5]
    stopped = list(generate_ids(model, [3, 1, 4], max_tokens=12, sampling=GREEDY, stop_ids=(stop,)))
    assert stopped == free[: free.index(stop)]


def test_context_bounds_the_text() -> None:
    """Prompt and continuation never exceed the context; an empty or overlong prompt is refused with a sentence."""
    model: Transformer = build(V3)
    context = V3.max_position_embeddings
    assert len(list(generate_ids(model, [1] * (context - 3), max_tokens=50, sampling=GREEDY))) == 3
    with pytest.raises(UserError, match="shorten it"):
        next(generate_ids(model, [1] * context, max_tokens=1, sampling=GREEDY))
    with pytest.raises(UserError, match="no tokens"):
        next(generate_ids(model, [], max_tokens=1, sampling=GREEDY))
