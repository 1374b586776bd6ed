"""How a model is asked, and asked again."""

from collections.abc import Callable
from typing import Any

import pytest

from fathom.config.synth import SynthRecipe
from fathom.data import Tokenizer, train_bpe
from fathom.engine.protocol import Chunk, Request, Usage
from fathom.errors import UserError
from fathom.synth.teachers import Asking, Attempt, Model
from fathom.tasks.catalogue import open_task
from fathom.tasks.task import Problem

PROBLEM = Problem("3+8=", "1")
ATTEMPTS = (Attempt("<think>3+8=2</think>2", "2"), Attempt("<think>3+8=5</think>5 <｜User｜>", "5"))


class Recorder:
    """An engine that says `7` to everything, and keeps what it was asked."""

    context = 200

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._said = tokenizer.encode("7")
        self.requests: list[Request] = []

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> Any:
        self.requests.append(request)
        deliver(Chunk("answer", "7", self._said, None, Usage(), "stop"))


def asked(attempts: tuple[Attempt, ...], **prompt: Any) -> tuple[str, Any, Tokenizer]:
    """The prompt in text, and what came back."""
    recipe = SynthRecipe(
        name="x", model="m", tasks=({"name": "modular"},), prompt=prompt, layout={}, draw={"max_tokens": 9}
    )
    tokenizer = train_bpe(["0123456789"], 300)
    engine = Recorder(tokenizer)
    (candidate,) = Model(recipe, engine, tokenizer, lambda: None).solve(
        open_task("modular"), [Asking(PROBLEM, 5, attempts)]
    )
    assert engine.requests[0].sampling.seed == 5
    return tokenizer.decode(engine.requests[0].prompt_ids, skip_special=False), candidate, tokenizer


def test_plain_text_shows_the_attempts_and_the_question_again() -> None:
    """A model that continues text reads its completions with their verdicts, and begins as it is used to."""
    bos = "<｜begin▁of▁sentence｜>"
    assert asked((), style="template")[0] == f"{bos}3+8="
    text, candidate, _ = asked(ATTEMPTS[:1], style="template")
    assert text == f"{bos}3+8=<think>3+8=2</think>2\nYour answer 2 is wrong. Try again.\n3+8="
    assert (candidate.text, candidate.round, candidate.finished, candidate.tokens) == ("7", 1, True, 1)


def test_chat_shows_answers_and_verdicts_in_turns() -> None:
    """A chat has the answers without their thoughts and the verdicts as the user's, and no answer forges a turn."""
    text, candidate, tokenizer = asked(ATTEMPTS, style="chat", instruction="Think.", opens_thought=True)
    end = tokenizer.backend.id_to_token(tokenizer.eos_token_ids[0])
    assert text == (
        f"<｜begin▁of▁sentence｜><｜User｜>3+8=\nThink.<｜Assistant｜></think>2{end}"
        f"<｜User｜>Your answer 2 is wrong. Try again.<｜Assistant｜></think>5 <｜User｜>{end}"
        "<｜User｜>Your answer 5 is wrong. Try again.<｜Assistant｜><think>"
    )
    assert candidate.round == 2
    user = tokenizer.backend.token_to_id("<｜User｜>")
    engine = Recorder(tokenizer)
    recipe = SynthRecipe(
        name="x", model="m", tasks=({"name": "modular"},), prompt={"style": "chat"}, layout={}, draw={"max_tokens": 9}
    )
    Model(recipe, engine, tokenizer, lambda: None).solve(open_task("modular"), [Asking(PROBLEM, 5, ATTEMPTS)])
    assert engine.requests[0].prompt_ids.count(user) == 3


def test_prompts_without_room_are_no_candidates() -> None:
    """A conversation that leaves no room for a completion is not drawn, and says so; others are."""
    long = (Attempt("8" * 300, "8"),)
    recipe = SynthRecipe(
        name="x",
        model="m",
        tasks=({"name": "modular"},),
        prompt={"style": "template"},
        layout={},
        draw={"max_tokens": 9},
    )
    tokenizer = train_bpe(["0123456789"], 300)
    model = Model(recipe, Recorder(tokenizer), tokenizer, lambda: None)
    first, second = model.solve(open_task("modular"), [Asking(PROBLEM, 1, long), Asking(PROBLEM, 2)])
    assert "leaves no room" in first.failure
    assert not second.failure
    with pytest.raises(UserError, match=r"draw.max_tokens = 2048, but prompt and completion together have 200"):
        Model(recipe.replace(draw={}), Recorder(tokenizer), tokenizer, lambda: None)
