"""The path of a request: who asks, what for, of which model, in which form the answer goes back."""

import asyncio
import time
from typing import Any

from fastapi import Request

from fathom.data.tokenizer import Tokenizer
from fathom.engine.protocol import Constraint, Engine, Sampling
from fathom.engine.protocol import Request as EngineRequest
from fathom.errors import nearest
from fathom.serve.body import Form, read_body
from fathom.serve.delivery import Delivery
from fathom.serve.dial import completion_bounds, read_dial
from fathom.serve.errors import ApiError
from fathom.serve.job import Job
from fathom.serve.limits import Client, Gate
from fathom.serve.logprobs import TokenSpelling
from fathom.serve.metrics import Metrics
from fathom.serve.prompt import Prompter
from fathom.serve.replies import ChatReply, CompletionReply, Reply
from fathom.serve.requests import constraint_of, engine_requests, room, sampling_of
from fathom.serve.schema import ChatForm, CompletionForm, NamedTool, SamplingForm
from fathom.serve.settings import ServiceSettings
from fathom.serve.tools import ToolReader, call_grammar, tool_form


class Service:
    """One engine behind the API."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: ServiceSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine)
        self.gate = Gate(settings)
        self.draining = False
        """New requests are refused."""
        self._jobs: set[Job] = set()
        self._tokenizer = tokenizer
        self._prompter = Prompter(tokenizer)
        self._tool_form = tool_form(tokenizer.chat_template or "")
        added = tokenizer.backend.get_added_tokens_decoder()
        self._markers = {token.content: number for number, token in added.items()}
        self._started_at = int(time.time())

    @property
    def running(self) -> int:
        """Answers under way."""
        return len(self._jobs)

    def cut_short(self) -> None:
        """End every answer where it is: clients get what there is, and the reason."""
        for job in self._jobs:
            job.close()

    def models(self) -> dict[str, Any]:
        """The served names, with what this model can do."""
        about = {
            "object": "model",
            "created": self._started_at,
            "owned_by": "fathom",
            "context": self.engine.context,
            "max_model_len": self.engine.context,
            "thinking": self._prompter.thinks,
            "tools": self._prompter.takes_tools,
            "chat": self._tokenizer.chat_template is not None,
            "fim": self._tokenizer.fim is not None,
        }
        return {"object": "list", "data": [{"id": name, **about} for name in self.settings.names]}

    def identify(self, request: Request) -> Client:
        """Who asks. Raises `ApiError` (401)."""
        return self.gate.identify(request.headers.getlist("authorization"))

    async def chat(self, request: Request) -> Delivery:
        """/v1/chat/completions."""
        return await self._answer(request, ChatForm, self._prepare_chat)

    async def complete(self, request: Request) -> Delivery:
        """/v1/completions."""
        return await self._answer(request, CompletionForm, self._prepare_completion)

    async def _answer(self, request: Request, form: type[Form], make: Any) -> Delivery:
        client = self.identify(request)
        if self.draining:
            headers = {"Retry-After": str(self.settings.retry_after_seconds), "Connection": "close"}
            raise ApiError(503, "the server is shutting down; ask again later", code="draining", headers=headers)
        leave = self.gate.enter(client)
        try:
            body = await read_body(request, form, self.settings)
            assert isinstance(body, SamplingForm)
            self._check_model(body.model)
            # Templates and tokenizers take their time with long prompts, which other clients should not wait for.
            requests, reply = await asyncio.to_thread(make, body, client)
            job = Job(self.engine, requests)
            await job.start(retry_after=self.settings.retry_after_seconds)
        except BaseException:
            leave()
            raise
        self._jobs.add(job)

        def end() -> None:
            self._jobs.discard(job)
            leave()

        return Delivery(
            job,
            reply,
            metrics=self.metrics,
            stream=bool(body.stream),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            keep_alive_seconds=self.settings.keep_alive_seconds,
            on_end=end,
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.settings.names:
            message = f"there is no model '{name[:100]}' here{nearest(name[:100], self.settings.names)}"
            served = ", ".join(f"'{known}'" for known in self.settings.names)
            raise ApiError(404, f"{message}; served: {served}", code="model_not_found", param="model")

    def _prepare_chat(self, form: ChatForm, client: Client) -> tuple[list[EngineRequest], Reply]:
        dial = read_dial(form, thinks=self._prompter.thinks)
        names, constraint = self._tools(form)
        tools = [tool.model_dump(exclude_none=True) for tool in form.tools or []] if names else None
        prompt = self._prompter.chat(form, variables=dial.template_variables(), tools=tools)
        max_tokens = room(form, [prompt], context=self.engine.context)
        requests = engine_requests(
            form,
            [prompt],
            max_tokens=max_tokens,
            sampling=self._sampling(form),
            constraint=constraint,
            thinking=dial.bounds(max_tokens),
            salt=_salt(client, form),
        )
        known = self._tool_form if names else None
        reply = ChatReply(
            form.model or self.settings.names[0],
            self._spelling(form),
            samples=len(requests),
            keep=form.n or 1 if form.best_of else len(requests),
            readers=[ToolReader(known, names) if known else None for _ in requests],
            with_usage=form.stream_options is not None and form.stream_options.include_usage,
            prompt_ids=prompt.ids if form.return_token_ids else None,
        )
        return requests, reply

    def _spelling(self, form: SamplingForm) -> TokenSpelling:
        return TokenSpelling(self._tokenizer, as_ids=bool(form.return_tokens_as_token_ids))

    def _sampling(self, form: SamplingForm) -> Sampling:
        return sampling_of(form, vocab_size=self._tokenizer.vocab_size, defaults=self.settings.sampling)

    def _tools(self, form: ChatForm) -> tuple[list[str], Constraint | None]:
        """Names of the functions that may be called, and what the answer must look like."""
        constraint = constraint_of(form)
        if not form.tools or form.tool_choice == "none":
            return [], constraint
        if not self._prompter.takes_tools:
            raise _refusal("tools", "this model's chat template does not show tools to the model; leave them out")
        names = [tool.function.name for tool in form.tools]
        if form.tool_choice in (None, "auto"):
            return names, constraint
        if constraint is not None:
            raise _refusal("tool_choice", "a call that must be made leaves no room for an answer of another form")
        if self._tool_form is None:
            raise _refusal("tool_choice", "the form of this model's calls is not known, so none can be required")
        if isinstance(form.tool_choice, NamedTool):
            wanted = form.tool_choice.function.name
            if wanted not in names:
                raise _refusal("tool_choice", f"'{wanted[:64]}' is not one of the tools{nearest(wanted[:64], names)}")
            names = [wanted]
        functions = [tool.function.model_dump() for tool in form.tools if tool.function.name in names]
        return names, call_grammar(self._tool_form, functions, self._markers)

    def _prepare_completion(self, form: CompletionForm, client: Client) -> tuple[list[EngineRequest], Reply]:
        given = form.prompts()
        if form.suffix is None:
            prompts = [self._prompter.text(prompt) for prompt in given]
        else:
            prompts = [self._prompter.fill(str(prompt), form.suffix) for prompt in given]
        max_tokens = room(form, prompts, context=self.engine.context)
        requests = engine_requests(
            form,
            prompts,
            max_tokens=max_tokens,
            sampling=self._sampling(form),
            constraint=constraint_of(form),
            thinking=completion_bounds(form, max_tokens),
            salt=_salt(client, form),
        )
        samples = len(requests) // len(prompts)
        reply = CompletionReply(
            form.model or self.settings.names[0],
            self._spelling(form),
            echoes=[self._echo(prompt) if form.echo else "" for prompt in given],
            inside=[prompt.starts_thinking for prompt in prompts],
            tags=self._prompter.tags,
            samples=samples,
            keep=form.n or 1 if form.best_of else samples,
            with_usage=form.stream_options is not None and form.stream_options.include_usage,
            prompt_ids=[prompt.ids for prompt in prompts] if form.return_token_ids else None,
        )
        return requests, reply

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)


def _salt(client: Client, form: SamplingForm) -> str:
    return f"{client.cache_salt}:{form.cache_salt}" if form.cache_salt else client.cache_salt


def _refusal(param: str, reason: str) -> ApiError:
    return ApiError(422, f"'{param}': {reason}", code="invalid_parameter", param=param)
