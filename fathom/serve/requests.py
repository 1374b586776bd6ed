"""From a request's form to the engine's requests: sampling, bounds and constraints."""

import json
from collections.abc import Sequence

from fathom.engine.protocol import Constraint, Request, Sampling, Thinking
from fathom.serve.errors import ApiError
from fathom.serve.prompt import Prompt
from fathom.serve.schema import ChatForm, CompletionForm, SamplingForm

_SEEDS = 2**63
_OPENAI_MAX_TOKENS = 16
"""What /v1/completions draws when nothing is said, as OpenAI has it."""


def sampling_of(form: SamplingForm, *, vocab_size: int, defaults: Sampling) -> Sampling:
    """How tokens are drawn, by `defaults` where the form does not say.

    Raises `ApiError` for a bias on a token that there is none of.
    """
    bias = {int(token): value for token, value in (form.logit_bias or {}).items()}
    if outside := next((token for token in bias if token >= vocab_size), None):
        message = f"'logit_bias': token id {outside} is not in the vocabulary of {vocab_size}"
        raise ApiError(422, message, code="invalid_parameter", param="logit_bias")
    given = {
        "temperature": form.temperature,
        "top_p": form.top_p,
        "top_k": None if form.top_k is None else max(form.top_k, 0),
        "min_p": form.min_p,
        "presence_penalty": form.presence_penalty,
        "frequency_penalty": form.frequency_penalty,
        "repetition_penalty": form.repetition_penalty,
        "seed": None if form.seed is None else form.seed % _SEEDS,
    }
    return defaults.replace(logit_bias=bias, **{name: value for name, value in given.items() if value is not None})


def constraint_of(form: SamplingForm) -> Constraint | None:
    """What the answer must look like, in whichever dialect it is said. Raises `ApiError` for more than one."""
    found: list[Constraint] = []
    wanted = form.response_format
    if wanted is not None and wanted.type == "json_object":
        found.append(Constraint(kind="json_object"))
    if wanted is not None and wanted.json_schema is not None:
        found.append(Constraint(kind="json_schema", text=_schema_text(wanted.json_schema.schema_)))
    found += _constraints(form.guided_json, form.guided_regex, form.guided_grammar, form.guided_choice)
    if (outputs := form.structured_outputs) is not None:
        found += _constraints(outputs.json_, outputs.regex, outputs.grammar, outputs.choice)
        found += [Constraint(kind="json_object")] if outputs.json_object else []
    if len(found) > 1:
        raise ApiError(422, "the answer can have one form only; give one of its descriptions", code="invalid_parameter")
    return found[0] if found else None


def room(form: SamplingForm, prompts: Sequence[Prompt], *, context: int) -> int:
    """The longest output. Raises `ApiError` (400) when a prompt leaves no room, or holds nothing."""
    longest = max(len(prompt.ids) for prompt in prompts)
    param = "messages" if isinstance(form, ChatForm) else "prompt"
    if any(not prompt.ids for prompt in prompts):
        message = "a prompt has no tokens; give some text to continue"
        raise ApiError(422, message, code="invalid_parameter", param=param)
    if longest >= context:
        message = f"the prompt has {longest} tokens, but prompt and answer together may have {context}; shorten it"
        raise ApiError(400, message, code="context_length_exceeded", param=param)
    asked = form.max_tokens
    if isinstance(form, ChatForm):
        asked = asked or form.max_completion_tokens
    elif asked is None:
        asked = _OPENAI_MAX_TOKENS
    return min(asked or context, context - longest)


def engine_requests(
    form: SamplingForm,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    sampling: Sampling,
    constraint: Constraint | None = None,
    thinking: Thinking | None = None,
    salt: str = "",
) -> list[Request]:
    """One request for each sample, prompt by prompt; with a seed, sample `i` has seed + i."""
    if isinstance(form, ChatForm):
        logprobs = (form.top_logprobs or 0) if form.logprobs else None
    else:
        assert isinstance(form, CompletionForm)
        logprobs = form.logprobs
    samples = form.best_of or form.n or 1
    return [
        Request(
            prompt_ids=prompt.ids,
            max_tokens=max_tokens,
            sampling=sampling.of_sample(sample),
            stop=(form.stop,) if isinstance(form.stop, str) else tuple(form.stop or ()),
            ignore_eos=bool(form.ignore_eos),
            logprobs=logprobs,
            thinking=thinking,
            starts_thinking=prompt.starts_thinking,
            constraint=constraint,
            cache_salt=salt,
        )
        for prompt in prompts
        for sample in range(samples)
    ]


def _constraints(
    schema: dict | str | None, regex: str | None, grammar: str | None, choice: Sequence[str] | None
) -> list[Constraint]:
    found = []
    if schema is not None:
        found.append(Constraint(kind="json_schema", text=schema if isinstance(schema, str) else _schema_text(schema)))
    if regex is not None:
        found.append(Constraint(kind="regex", text=regex))
    if grammar is not None:
        found.append(Constraint(kind="grammar", text=grammar))
    if choice is not None:
        words = " | ".join(json.dumps(word, ensure_ascii=False) for word in choice)
        found.append(Constraint(kind="grammar", text=f"start: {words}\n"))
    return found


def _schema_text(schema: dict) -> str:
    return json.dumps(schema, ensure_ascii=False)
