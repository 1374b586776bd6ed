"""Thinking as a dial: what a request says about thoughts, in every dialect, as bounds for the engine.

| parameter | meaning |
|---|---|
| `thinking: {"type": "enabled" \\| "disabled"}` (DeepSeek), `enable_thinking` (vLLM, Qwen; also in `chat_template_kwargs`) | on, off |
| `thinking_budget` (vLLM: `thinking_token_budget`) | thoughts end after exactly this many tokens; 0 is off |
| `min_thinking_budget` | thoughts do not end before this many |
| `reasoning_effort` | `none` is off; else a budget as a share of the longest output: `minimal` 0.1, `low` 0.2, `medium` 0.5, `high` 0.8, `xhigh` 0.95, `max` no bound |

An explicit budget goes before that of an effort. With none of these the template's own default holds. Plain
completions, whose prompt is the client's, have the two budgets alone.
"""  # noqa: E501

from dataclasses import dataclass

from fathom.engine.protocol import Thinking
from fathom.serve.errors import ApiError
from fathom.serve.schema import ChatForm, CompletionForm, SamplingForm

EFFORT_SHARES: dict[str, float | None] = {
    "minimal": 0.1,
    "low": 0.2,
    "medium": 0.5,
    "high": 0.8,
    "xhigh": 0.95,
    "max": None,
}
"""Of the longest output, what thoughts may take; None is no bound."""


@dataclass(frozen=True)
class Dial:
    """What a request asked of thinking."""

    wanted: bool | None
    """On, off, or None: as the template has it."""
    budget: int | None
    effort: str | None
    minimum: int

    def template_variables(self) -> dict[str, bool]:
        """The switch, under the names that templates give it."""
        return {} if self.wanted is None else {"thinking": self.wanted, "enable_thinking": self.wanted}

    def bounds(self, max_tokens: int) -> Thinking | None:
        """Bounds for an output of at most `max_tokens`; None where nothing was asked for.

        "Off" is a budget of 0: whatever the template or the model opens is closed at once.
        """
        if self.wanted is False:
            return Thinking(budget=0)
        share = EFFORT_SHARES.get(self.effort or "max")
        budget = self.budget if self.budget is not None or share is None else int(share * max_tokens)
        if self.minimum >= max_tokens or (budget is not None and self.minimum > budget):
            bound = "the longest output" if self.minimum >= max_tokens else f"the thinking budget of {budget}"
            raise _refusal("min_thinking_budget", f"{self.minimum} does not fit into {bound}")
        return None if budget is None and not self.minimum else Thinking(budget=budget, minimum=self.minimum)


def read_dial(form: ChatForm, *, thinks: bool) -> Dial:
    """The dial of a request. Raises `ApiError` for contradictions, and for thoughts of a model that has none."""
    budget = _budget(form)
    minimum = form.min_thinking_budget or 0
    said = {name: on for name, on in _switches(form, budget, minimum).items() if on is not None}
    if len(set(said.values())) > 1:
        on, off = (next(name for name, value in said.items() if value is state) for state in (True, False))
        raise _refusal(off, f"it turns thinking off while '{on}' turns it on")
    wanted = next(iter(said.values()), None)
    if wanted and not thinks:
        message = "this model has no think tags in its chat template, so it cannot think visibly; leave it out"
        raise _refusal(next(iter(said)), message)
    # An off switch that nothing can be meant by needs no bounds either.
    return Dial(wanted if thinks else None, budget if thinks else None, form.reasoning_effort, minimum)


def completion_bounds(form: CompletionForm, max_tokens: int) -> Thinking | None:
    """Bounds on the thoughts of a plain completion; None where nothing was asked for. Raises `ApiError`."""
    return Dial(None, _budget(form), None, form.min_thinking_budget or 0).bounds(max_tokens)


def _budget(form: SamplingForm) -> int | None:
    budgets = {value for value in (form.thinking_budget, form.thinking_token_budget) if value is not None}
    if len(budgets) > 1:
        raise _refusal("thinking_budget", "it and thinking_token_budget contradict each other; give one")
    return next(iter(budgets), None)


def _switches(form: ChatForm, budget: int | None, minimum: int) -> dict[str, bool | None]:
    """What each parameter says: on, off, or nothing."""
    kwargs = form.chat_template_kwargs or {}
    last = form.messages[-1]
    return {
        "thinking": None if form.thinking is None else form.thinking.type == "enabled",
        "enable_thinking": form.enable_thinking,
        "chat_template_kwargs.enable_thinking": _flag(kwargs.get("enable_thinking")),
        "chat_template_kwargs.thinking": _flag(kwargs.get("thinking")),
        "thinking_budget": None if budget is None else budget > 0,
        "min_thinking_budget": True if minimum else None,
        "reasoning_effort": None if form.reasoning_effort is None else form.reasoning_effort != "none",
        "messages[-1].reasoning_content": True if last.prefix and last.reasoning_content is not None else None,
    }


def _flag(value: object) -> bool | None:
    return None if value is None else bool(value)


def _refusal(param: str, reason: str) -> ApiError:
    return ApiError(422, f"'{param}': {reason}", code="invalid_parameter", param=param)
