"""How a model is asked, and asked again."""

from collections.abc import Callable
from typing import Any

import pytest

from fathom.config.synth import SynthRecipe
from fathom.data import Tokenizer, train_bpe
from fathom.engine.protocol import Chunk, Fault, Request, Usage
from fathom.errors import UserError
from fathom.synth.teachers import Asking, Attempt, Model
from fathom.tasks.catalogue import open_task
from fathom.tasks.task import Problem

PROBLEM = Problem("3+8=", "1")
ATTEMPTS = (Attempt("<think>3+8=2</think>2", "2"), Attempt("<think>3+8=5</think>5 <｜User｜>", "5"))


class Recorder:
    """An engine that says `7`, or what it is told to, to everything, and keeps what it was asked."""

    context = 200

    def __init__(self, tokenizer: Tokenizer, *says: Chunk) -> None:
        self._says = says or (Chunk("answer", "7", tokenizer.encode("7"), None, Usage(), "stop"),)
        self.requests: list[Request] = []

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> Any:
        self.requests.append(request)
        deliver(self._says[min(len(self.requests), len(self._says)) - 1])

    def statistics(self) -> Any: ...

    def close(self, drain_seconds: float = 0.0) -> None: ...


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


def fault(whose: Fault) -> Chunk:
    return Chunk("answer", "", [], None, Usage(), "error", "no such luck", whose)


EMPTY = Chunk("answer", "", [], None, Usage(), "stop")


def solved(attempts: tuple[Attempt, ...], *says: Chunk) -> str:
    """What is said of the failure of a lone candidate."""
    recipe = SynthRecipe(
        name="x", model="m", tasks=({"name": "modular"},), prompt={"style": "template"}, layout={},
        draw={"max_tokens": 9, "retries": 1},
    )  # fmt: skip
    tokenizer = train_bpe(["0123456789"], 300)
    model = Model(recipe, Recorder(tokenizer, *says), tokenizer, lambda: None)
    (candidate,) = model.solve(open_task("modular"), [Asking(PROBLEM, 5, attempts)])
    return candidate.failure


def test_what_a_working_engine_fails_at_does_not_end_the_run() -> None:
    """A lone candidate that is empty, or a repair that is refused, has failed: the run would stop there every time."""
    assert "it has no tokens" in solved((), EMPTY)
    assert "it has no tokens" in solved(ATTEMPTS, EMPTY)
    assert "no such luck" in solved(ATTEMPTS, fault("request"))


@pytest.mark.parametrize(
    ("attempts", "says"),
    [
        ((), (fault("request"),)),
        ((), (fault("engine"),)),
        (ATTEMPTS, (fault("engine"),)),
        (ATTEMPTS, (EMPTY, fault("engine"))),
    ],
)
def test_an_engine_that_does_not_work_ends_the_run(attempts: tuple[Attempt, ...], says: tuple[Chunk, ...]) -> None:
    """Nothing is put down as a teacher's failure that is the engine's, nor where no request is taken."""
    with pytest.raises(UserError, match="no completion could be drawn: no such luck"):
        solved(attempts, *says)
