"""From what a request says to the token ids that the model reads."""

import re
from dataclasses import dataclass
from typing import Any

from fathom.data.template_encoding import TemplateEncoder
from fathom.data.tokenizer import Tokenizer
from fathom.engine.thinking import CLOSING, OPENING, find_think_tags
from fathom.errors import UserError
from fathom.serve.body import strict_json
from fathom.serve.errors import ApiError, refused
from fathom.serve.schema import ChatForm, Message

_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token"}


@dataclass(frozen=True)
class Prompt:
    """What the model reads."""

    ids: list[int]
    starts_thinking: bool = False
    """It ends inside an open think tag."""


class Prompter:
    """Makes prompts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encoder = TemplateEncoder(tokenizer)
        self._template = tokenizer.chat_template or ""
        self.tags = (OPENING, CLOSING) if find_think_tags(tokenizer, tokenizer.vocab_size) else None
        """The tags around thoughts, or None."""
        self._tag_ids = tuple(tokenizer.backend.token_to_id(tag) for tag in self.tags or ())
        self.thinks = self.tags is not None and CLOSING in self._template
        """The chat template knows of thoughts, so they can be asked for."""
        # Some templates write a call's arguments with `tojson` or go through them, and need an object; others, a text.
        self._arguments_are_objects = bool(re.search(r"arguments\s*(\||\.items|is mapping)", self._template))
        self.takes_tools = bool(re.search(r"\btools\b", self._template))
        """The chat template shows tools to the model."""

    def chat(self, form: ChatForm, *, variables: dict[str, Any], tools: list[dict[str, Any]] | None) -> Prompt:
        """The conversation in the model's own format, ready for its next words. Raises `ApiError`."""
        last = form.messages[-1] if form.messages[-1].prefix else None
        messages = form.messages[:-1] if last else form.messages
        if not messages:
            raise ApiError(422, "a prefix needs a message before it", code="invalid_parameter", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                self._plain(messages),
                tools=self._encoder.protect(tools) if tools else None,
                **{**self._variables(form.chat_template_kwargs or {}), **variables},
            )
            thinking = self.tags is not None and text.rstrip().endswith(OPENING)
            if last:
                text += self._continuation(last, thinking=thinking)
                thinking = not last.content and (thinking or last.reasoning_content is not None)
            ids = self._encoder.encode(text)
        except UserError as error:
            raise refused(UserError(self._encoder.reveal(str(error))), "messages") from None
        return Prompt(ids, starts_thinking=thinking)

    def text(self, prompt: str | list[int]) -> Prompt:
        """A text to be continued, behind the token that begins one; token ids are taken as they are."""
        if isinstance(prompt, str):
            return Prompt([*self._start(), *self._tokenizer.encode(prompt)])
        outside = next((number for number in prompt if not 0 <= number < self._tokenizer.vocab_size), None)
        if outside is not None:
            message = f"token id {outside} is not in the vocabulary of {self._tokenizer.vocab_size}"
            raise ApiError(422, message, code="invalid_parameter", param="prompt")
        tag = next((number for number in reversed(prompt) if number in self._tag_ids), None)
        return Prompt(prompt, starts_thinking=tag is not None and tag == self._tag_ids[0])

    def fill(self, prefix: str, suffix: str) -> Prompt:
        """A gap between two texts, in the model's fill-in-the-middle format."""
        if self._tokenizer.fim is None:
            message = "this model's vocabulary has no fill-in-the-middle markers, so it takes no suffix"
            raise ApiError(422, message, code="invalid_parameter", param="suffix")
        begin, hole, end = self._tokenizer.fim
        encode = self._tokenizer.encode
        return Prompt([*self._start(), begin, *encode(prefix), hole, *encode(suffix), end])

    def _start(self) -> list[int]:
        return [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]

    def _variables(self, given: dict[str, Any]) -> dict[str, Any]:
        if taken := next((name for name in given if name in _RESERVED), None):
            message = f"chat_template_kwargs cannot set '{taken}'"
            raise ApiError(422, message, code="invalid_parameter", param="chat_template_kwargs")
        return {
            name: self._encoder.protect(v) for name, v in given.items() if name not in ("thinking", "enable_thinking")
        }

    def _plain(self, messages: list[Message]) -> list[dict[str, Any]]:
        """Messages as templates expect them, with every text of the client protected."""
        users = [place for place, message in enumerate(messages) if message.role == "user"]
        last_user = users[-1] if users else -1
        return [self._message(message, earlier=place < last_user) for place, message in enumerate(messages)]

    def _message(self, message: Message, *, earlier: bool) -> dict[str, Any]:
        protect = self._encoder.protect
        plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        if message.role == "assistant":
            # Thoughts count only within a turn that is still calling tools.
            if message.reasoning_content is not None and not earlier:
                plain["reasoning_content"] = protect(message.reasoning_content)
            plain["content"] = self._without_thoughts(message.content or "")
            if message.tool_calls:
                plain["tool_calls"] = [self._call(call.model_dump(exclude={"index"})) for call in message.tool_calls]
            return plain
        plain["content"] = protect(message.content or "")
        if message.role == "tool":
            plain["tool_call_id"] = protect(message.tool_call_id)
            if message.name is not None:
                plain["name"] = protect(message.name)
        return plain

    def _without_thoughts(self, content: str) -> str:
        """An assistant's earlier answer as a template should see it: what it thought is no part of it."""
        if not self.thinks or CLOSING not in content:
            return self._encoder.protect(content)
        answer = self._encoder.protect(content.rpartition(CLOSING)[2])
        # A template that cuts there itself may trim as well, and must find the tag in order to.
        cuts = any(f"split({quote}{CLOSING}{quote})" in self._template for quote in "'\"")
        return CLOSING + answer if cuts else answer

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if self._arguments_are_objects:
            try:
                arguments = strict_json(arguments)
            except (ValueError, RecursionError) as error:
                reason = str(error) if type(error) is ValueError else "it cannot be read"
                raise UserError(f"a tool call's arguments are not valid JSON: {reason}") from None
            if not isinstance(arguments, dict):
                raise UserError("a tool call's arguments are JSON, but not an object")
        call["function"]["arguments"] = arguments
        return self._encoder.protect(call)

    def _continuation(self, last: Message, *, thinking: bool) -> str:
        """What the assistant has already thought and said."""
        said = self._encoder.protect(last.content or "")
        if last.reasoning_content is None:
            return CLOSING + said if thinking and said else said
        thoughts = self._encoder.protect(last.reasoning_content)
        return ("" if thinking else OPENING) + thoughts + (CLOSING + said if said else "")
