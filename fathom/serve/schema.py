"""The forms of request bodies: OpenAI's, with DeepSeek's and vLLM's additions.

Unknown parameters are refused: one that was silently dropped would be a wrong answer. Some are accepted and have no
effect, because they say nothing about the text: `user`, `safety_identifier`, `metadata`, `store`, `service_tier`,
`prompt_cache_key`, `prompt_cache_retention`, `prediction` (speed only), `parallel_tool_calls` (the model decides),
`modalities` (when it is `["text"]`) and `stream_options.include_obfuscation`.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Item = TypeVar("Item")
# One error is told, and looking for millions more would be a way to keep the server busy.
Many = Annotated[list[Item], Field(fail_fast=True)]
_LARGEST = 2**31 - 1
_MOST_CHOICES = 64
"""Samples of one request, prompts included: `n` × prompts."""


class Form(BaseModel):
    """An object of a request. Types are taken at their word, and unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class TextPart(Form):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _join_parts(content: Any) -> Any:
    """Parts become one text before anything looks at it, so that no marker can be put together from two of them."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('each part must be {"type": "text", "text": "…"}; this model reads text alone')
    return "".join(part["text"] for part in content)


class CalledFunction(Form):
    """A function that the assistant called."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    arguments: str


class ToolCall(Form):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Form):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_join_parts, json_schema_input_type=str | list[TextPart] | None)] = (
        None
    )
    name: str | None = None
    """Accepted for compatibility; templates have no place for it, except for a tool's name."""
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    """The call that a tool's message answers."""
    reasoning_content: str | None = None
    """What the assistant thought: dropped for earlier turns, continued for a last one with `prefix`."""
    prefix: bool = False
    """On the last message, an assistant's: the answer begins with this content."""
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _fits_role(self) -> "Message":
        if self.role != "assistant" and (self.tool_calls or self.prefix or self.reasoning_content):
            raise ValueError("only an assistant's message has tool_calls, reasoning_content or prefix")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.prefix)):
            raise ValueError(f"a message of role '{self.role}' needs content")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool's message needs tool_call_id")
        return self


class Function(Form):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    """A JSON schema of its arguments."""
    strict: bool | None = None
    """Accepted; a call that is required has a JSON object for arguments in any case."""


class Tool(Form):
    """Something that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(Form):
    """A function's name."""

    name: str


class NamedTool(Form):
    """The one tool to be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Form):
    """A named JSON schema."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Form):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', which needs it")
        return self


class StructuredOutputs(Form):
    """vLLM's form of a constraint: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Many[str] | None = Field(default=None, min_length=1, max_length=1000)
    grammar: str | None = None


class StreamOptions(Form):
    """What a stream tells besides the text."""

    include_usage: bool = False
    """A last chunk without choices has the usage."""
    include_obfuscation: bool | None = None


class ThinkingSwitch(Form):
    """DeepSeek's switch."""

    type: Literal["enabled", "disabled"]


class SamplingForm(Form):
    """What chat and plain completions have in common."""

    model: str | None = None
    """A served name; without one, the model that is served."""
    max_tokens: int | None = Field(default=None, ge=1, le=_LARGEST)
    """Longest output, thoughts included; what the context leaves, if that is less."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=_LARGEST)
    """Draw from this many likeliest tokens; 0 and -1 draw from all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    """Token id to a number from -100 to 100."""
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: str | Many[str] | None = None
    """Up to 16 texts; the answer ends before the first that appears."""
    n: int | None = Field(default=None, ge=1, le=_MOST_CHOICES)
    best_of: int | None = Field(default=None, ge=1, le=_MOST_CHOICES)
    """Draw this many and return the `n` that most agree with (consensus of the final answers)."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Many[str] | None = Field(default=None, min_length=1, max_length=1000)
    return_token_ids: bool | None = None
    """As vLLM has it: each choice has `token_ids`, the tokens drawn, and the ids of the prompt come as
    `prompt_token_ids`. In a stream the latter come once, and `token_ids` with the event that brings the tokens."""
    return_tokens_as_token_ids: bool | None = None
    """As vLLM has it: log-probabilities name tokens `token_id:17`, since different tokens can have the same text."""
    thinking_budget: int | None = Field(default=None, ge=0, le=_LARGEST)
    """Exactly after this many tokens of thoughts the answer begins."""
    thinking_token_budget: int | None = Field(default=None, ge=0, le=_LARGEST)
    """vLLM's name for thinking_budget."""
    min_thinking_budget: int | None = Field(default=None, ge=0, le=_LARGEST)
    """Thoughts do not end before this many tokens."""
    cache_salt: str | None = Field(default=None, max_length=256)
    """Prompts share cached prefixes only with those of equal salt (and always of the same key)."""
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingForm":
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 16 or any(not text or len(text) > 1000 for text in stops):
            raise ValueError("stop takes up to 16 texts of 1 to 1000 characters")
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10) or abs(bias) > 100:
                raise ValueError("logit_bias maps token ids to numbers from -100 to 100")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of must be at least n")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("best_of above n cannot be streamed: the best is known only at the end")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class ChatForm(SamplingForm):
    """The body of /v1/chat/completions."""

    messages: Many[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_LARGEST)
    """OpenAI's newer name for max_tokens."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Many[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: Many[Literal["text"]] | None = None
    thinking: ThinkingSwitch | None = None
    """DeepSeek's switch; without any, the template's own default holds."""
    enable_thinking: bool | None = None
    """The same switch as vLLM and Qwen spell it."""
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    """Further variables for the chat template; `enable_thinking` and `thinking` here are the switch."""
    reasoning_effort: Effort | None = None
    """How long to think, as a share of the longest output; see `fathom.serve.dial`."""

    @model_validator(mode="after")
    def _consistent_chat(self) -> "ChatForm":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens contradict each other; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if any(message.prefix for message in self.messages[:-1]):
            raise ValueError("only the last message may have prefix: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self


class CompletionForm(SamplingForm):
    """The body of /v1/completions."""

    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    """Texts or token ids. Control tokens spelled in a text are text; as ids they are themselves."""
    suffix: str | None = None
    """Text behind the gap that is to be filled (FIM)."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """With every token, its log-probability and this many of the likeliest alternatives."""
    echo: bool | None = None
    """Repeat the prompt before the completion."""

    @model_validator(mode="after")
    def _consistent_completion(self) -> "CompletionForm":
        prompts = self.prompts()
        if not 1 <= len(prompts) * (self.best_of or self.n or 1) <= _MOST_CHOICES:
            raise ValueError(f"1 to {_MOST_CHOICES} completions can be asked for at once (prompts × n)")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not served: prompts get no log-probabilities")
        if self.suffix is not None and (self.echo or any(not isinstance(prompt, str) for prompt in prompts)):
            raise ValueError("suffix needs prompts that are texts, and no echo")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one an entry."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]
