"""`Engine.generate` as a person calls it: what is likely mistaken gets a sentence, and a block closes the engine."""

import re

import pytest
import torch

import fathom
from fathom.engine.engine import Engine, EngineSettings
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from tests.engine.running import GQA, PLAIN, engine_of
from tests.model.configs import build


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("text", "prompts is one text; give a list: ['text']"),
        ([{"role": "user", "content": "hi"}], "prompts are texts or token ids, not messages"),
        ([[{"role": "user", "content": "hi"}]], "prompts are texts or token ids, not messages"),
        ([1, 2], "prompts is one list of token ids; give a list of them"),
    ],
)
def test_what_is_no_list_of_prompts(prompts: object, said: str) -> None:
    """One text is not taken for a list of letters, nor a conversation or one list of ids for prompts."""
    with engine_of(build(GQA), PLAIN) as engine, pytest.raises(UserError, match=re.escape(said)):
        engine.generate(prompts)


@pytest.mark.parametrize(("name", "meant"), [("max_token", "max_tokens"), ("temprature", "temperature")])
def test_unknown_parameter_names_the_nearest(name: str, meant: str) -> None:
    """Parameters of the method and of sampling alike; other prompts' iterators still work."""
    with engine_of(build(GQA), PLAIN) as engine:
        with pytest.raises(UserError, match=f"unknown parameter '{name}' .did you mean '{meant}'"):
            engine.generate(["a"], **{name: 1})
        assert len(engine.generate(iter(["a", [98]]), max_tokens=2)) == 2


def test_block_closes_the_engine() -> None:
    """Behind the block, the thread has ended, and using the engine says why not."""
    engine = Engine(build(GQA), PLAIN, EngineSettings(cache_memory=2**22))
    with engine as entered:
        assert entered is engine
    assert not engine._thread.is_alive()
    with pytest.raises(UserError, match="this engine is closed"):
        engine.generate(["a"])


def test_too_little_memory_names_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """The option is named, and with the gigabytes that the sentence gives the engine starts."""
    with pytest.raises(UserError, match="--cache-memory") as refusal:
        Engine(build(GQA), PLAIN, EngineSettings(cache_memory=1))
    gigabytes = float(re.search(r"at least ([\d.]+) GB", str(refusal.value))[1])
    Engine(build(GQA), PLAIN, EngineSettings(cache_memory=int(gigabytes * 1e9))).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_takes_torch_s_dtypes(dtype: torch.dtype, tmp_path) -> None:
    """They mean what their names mean, and one that is not held is refused by its name."""
    save_model(build(GQA), tmp_path / "model")
    assert fathom.load(tmp_path / "model", dtype=dtype)[0].lm_head.weight.dtype == dtype
    with pytest.raises(UserError, match="dtype 'float16' is not supported"):
        fathom.load(tmp_path / "model", dtype=torch.float16)
