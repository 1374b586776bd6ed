"""An OpenAI-compatible endpoint over HTTP: which models it has, and completions as events, with failures told apart.

What a failure means for whoever asked is decided here, once. `Dropped`: another try may succeed (nobody answered, the
connection ended or fell silent, 408, 429, 500, 502 to 504 and their like, an engine that failed). `Refused`: it will
not (the request, the key, the model or the address is wrong, or what answers is no such endpoint).

The client is httpx, which OpenAI's own library is built on: pooled connections, TLS, proxies, compression and what
servers really send are solved there, and the standard library has none of it for an event loop. Only bytes are taken
from it: its reader of lines would split an event at U+2028, which JSON may hold as it stands. Redirects are not
followed, for the key would go along.
"""

import asyncio
import email.utils
import json
import logging
import os
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fathom.config.section import Section
from fathom.engine.protocol import Fault
from fathom.errors import UserError, nearest

if TYPE_CHECKING:  # an extra
    import httpx

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")
_Model = TypeVar("_Model", bound=BaseModel)
_NO_ADDRESS = "url (in a recipe endpoint): is no address; give one like http://127.0.0.1:8000/v1"
_KEY = re.compile(r"[!-~]+")
_CONNECT_SECONDS = 10.0
_NO_NEWS_SECONDS = 3600.0
"""How long a stream may say nothing but that it is alive."""
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525), 529})
"""Those from 520 on are what proxies say of a server behind them, and 529 what one says that has too much to do."""
_OF_REQUEST = frozenset({400, 413, 422})
_OF_KEY = frozenset({401, 403})
_LONGEST_LINE = 2**24
"""Bytes of one event. The ids of a prompt of a million tokens are half of that."""
_LONGEST_BODY = 2**24
_LONGEST_REASON = 300
_AFTER_THE_END_SECONDS = 1.0

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class RemoteSettings(Section):
    """Where an endpoint is, and how patient to be with it."""

    url: str
    """Its address as OpenAI's clients take it (`http://127.0.0.1:8000/v1`); without a path, `/v1` is added."""
    model: str | None = None
    """What it calls the model; None takes the only one that it has."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key; None sends no key."""
    context: int | None = Field(default=None, ge=2)
    """Longest prompt and output together; None takes what the endpoint says."""
    connections: int = Field(default=256, ge=1)
    """Requests under way at once; more wait. As many as the endpoint computes at once (vLLM: `--max-num-seqs`)."""
    retries: int = Field(default=5, ge=0)
    """Further tries of a request that brought no new token, in a row, before it is given up."""
    backoff_seconds: float = Field(default=0.5, gt=0)
    """Wait before the first further try; doubles with each, up to `longest_wait_seconds`."""
    longest_wait_seconds: float = Field(default=60.0, gt=0)
    """An endpoint that asks for a longer wait than this (`Retry-After`) is given up."""
    stall_seconds: float = Field(default=120.0, gt=0)
    """A stream that brings no whole line for so long counts as dropped, and so does an answer that is no stream and is
    not all there by then. vLLM is silent while a request waits for its turn, and for ever on connections that are open
    when it is told to end."""


class Dropped(Exception):
    """No whole answer came, and another try may bring one."""

    def __init__(self, message: str, *, wait_seconds: float | None = None) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds
        """How long the endpoint asks to be left alone, if it said so."""


class Refused(Exception):
    """No answer will come to this request."""

    def __init__(self, message: str, fault: Fault = "engine") -> None:
        super().__init__(message)
        self.fault: Fault = fault


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


class Logprobs(_Answer):
    """Parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class Choice(_Answer):
    """What an event adds to a completion."""

    token_ids: list[TokenId] | None = None
    prompt_token_ids: list[TokenId] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class PromptDetails(_Answer):
    """Of a prompt's tokens."""

    cached_tokens: int | None = None


class EventUsage(_Answer):
    """What a completion has cost."""

    prompt_tokens_details: PromptDetails | None = None


class _Report(_Answer):
    error: Any = None


class Event(_Report):
    """One event of a stream."""

    choices: list[Choice] = []
    usage: EventUsage | None = None


class ServedModel(_Answer):
    """A model that an endpoint has."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None

    @property
    def of_fathom(self) -> bool:
        """Whether `fathom serve` serves it, which understands more than vLLM in some places."""
        return self.owned_by == "fathom"


class _ModelList(_Answer):
    data: list[ServedModel]


class Endpoint:
    """One endpoint. Its methods belong to one event loop."""

    def __init__(self, settings: RemoteSettings) -> None:
        """Raises `UserError` for an address or key that cannot be meant, and without the extra `remote`."""
        self._settings = settings
        self.url = _base(settings.url)
        """Without a slash at the end."""
        self._key = _key(settings.api_key_env)
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise UserError(
                f"a remote engine needs the package {error.name}: pip install 'fathom-lm[remote]'"
            ) from None
        try:
            _ = httpx.URL(self.url).host
        except (httpx.InvalidURL, UnicodeError):
            raise UserError(_NO_ADDRESS) from None
        self._httpx = httpx
        self._in_trouble = False  # said once, until something succeeds again
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(
                settings.stall_seconds, connect=min(_CONNECT_SECONDS, settings.stall_seconds), pool=None
            ),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.connections),
        )

    def without_key(self, message: str) -> str:
        """`message` as it may be shown: some endpoints repeat a key that they do not know."""
        return message.replace(self._key, "***") if self._key else message

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def served(self) -> ServedModel:
        """The model to ask. Raises `UserError` where there is none of that name, or no endpoint."""
        where = f"{self.url}/models"

        async def ask() -> list[ServedModel]:
            return (await self._whole("GET", where, None, _ModelList)).data

        try:
            models = await self.patiently(ask)
        except (Dropped, Refused) as error:
            raise UserError(self.without_key(str(error))) from None
        names = [model.id for model in models]
        wanted = self._settings.model
        if wanted is None and len(models) == 1:
            return models[0]
        listed = ", ".join(f"'{name}'" for name in names[:10]) or "none"
        if wanted is None:
            raise UserError(
                f"{where}: say which model is meant (model, --model-name, in a recipe endpoint_model); it has {listed}"
            )
        if wanted not in names:
            raise UserError(f"{where}: there is no model '{wanted}'{nearest(wanted, names)}; it has {listed}")
        return models[names.index(wanted)]

    async def completion(self, body: dict[str, Any]) -> AsyncIterator[Event]:
        """The events of a completion, up to the end that the endpoint declares or where the stream just ends.

        Raises `Dropped` and `Refused`.
        """
        where = f"{self.url}/completions"
        async with self._answer("POST", where, body) as answer:
            kind = answer.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise Refused(
                    f"{where}: answered with '{kind[:60]}' where a stream of events was asked for; check the address, "
                    "which must be an OpenAI-compatible server's"
                )
            async with aclosing(_lines(answer, where, self._settings.stall_seconds)) as lines:
                news = time.monotonic()
                async for line in lines:
                    if line.startswith(b"data:"):
                        news = time.monotonic()
                        data = line.removeprefix(b"data:").strip()
                        if data == b"[DONE]":
                            await _rest(lines)
                            return
                        yield self._event(data, where)
                    elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                        raise Refused(f"{where}: sent what is no stream of events: {_quoted(line)}")
                    elif time.monotonic() - news > _NO_NEWS_SECONDS:
                        raise Dropped(
                            f"{where}: says that it is alive, and for {_NO_NEWS_SECONDS:g} s nothing else; look what "
                            "the server waits for"
                        )

    async def whole(self, path: str, body: dict[str, Any], kind: type[_Model]) -> _Model:
        """What `path` answers to `body`, all at once. Raises `Dropped` and `Refused`."""
        return await self._whole("POST", f"{self.url}/{path}", body, kind)

    async def _whole(self, method: str, where: str, body: dict[str, Any] | None, kind: type[_Model]) -> _Model:
        async with _within(self._settings.stall_seconds, where), self._answer(method, where, body) as answer:
            data = await _body(answer, where)
            if error := _parsed(_Report, data, where).error:  # by some servers with a status of 200
                raise self._reported(error, data, where)
            return _parsed(kind, data, where)

    async def patiently(
        self, attempt: Callable[[], Awaitable[_Value]], progress: Callable[[], int] = lambda: 0
    ) -> _Value:
        """The result of `attempt`, which is made again while it raises `Dropped`, with growing waits.

        `progress` grows with what attempts bring: only those in a row that bring nothing new are counted. Raises
        `Dropped` after the last, and `Refused` at once.
        """
        failures = 0
        while True:
            known = progress()
            try:
                result = await attempt()
                self._in_trouble = False
                return result
            except Dropped as drop:
                failures = 1 if progress() > known else failures + 1
                wait = self._wait(drop, failures)
                if not self._in_trouble:
                    self._in_trouble = True
                    _log.warning("%s; trying again", self.without_key(str(drop)))
            await asyncio.sleep(wait)

    def _wait(self, drop: Dropped, failures: int) -> float:
        """Seconds before the next try after so many that failed in a row. Raises `Dropped` if there shall be none."""
        most = self._settings.longest_wait_seconds
        if failures > self._settings.retries:
            raise Dropped(f"{drop} (tried {failures} times)") from None
        if drop.wait_seconds is None:
            # Drawn, so that requests which failed together do not all come back together.
            return min(self._settings.backoff_seconds * 2 ** (failures - 1), most) * random.uniform(0.5, 1.0)
        if drop.wait_seconds > most:
            raise Dropped(f"{drop} (it asks for a wait of {drop.wait_seconds:.0f} s)") from None
        return drop.wait_seconds

    @asynccontextmanager
    async def _answer(
        self, method: str, where: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator["httpx.Response"]:
        """An answer of status 200, to be read as it comes. Raises `Dropped` and `Refused`, also while it is read."""
        try:
            async with AsyncExitStack() as stack:
                async with _within(self._settings.stall_seconds, where):
                    answer = await stack.enter_async_context(self._client.stream(method, where, json=body))
                    if answer.status_code != 200:
                        raise self._failure(where, answer, await _body(answer, where))
                yield answer
        except self._httpx.RequestError as error:
            if reason := _insecure(error):
                raise Refused(
                    f"{where}: no secure connection ({reason}); put the address right (http:// or https://), or the "
                    "server's certificate"
                ) from None
            raise Dropped(f"{where}: {self._what_happened(error)}") from None

    def _what_happened(self, error: "httpx.RequestError") -> str:
        if isinstance(error, self._httpx.ConnectError | self._httpx.ConnectTimeout):
            reason = _one_line(str(error)) or type(error).__name__
            return f"nobody answers there ({reason}); start the server, or put the address right"
        if isinstance(error, self._httpx.TimeoutException):
            return _silent(self._settings.stall_seconds)
        return f"the connection broke off ({_one_line(str(error)) or type(error).__name__})"

    def _failure(self, where: str, answer: "httpx.Response", body: bytes) -> Dropped | Refused:
        """What an answer of another status than 200 means."""
        status = answer.status_code
        told = f"{where}: HTTP {status} {answer.reason_phrase}".rstrip()
        if 300 <= status < 400:
            place = _one_line(answer.headers.get("location", "another place"))
            return Refused(f"{told}: it redirects to {place}, which is not followed; give the address itself")
        if reason := _reason(body):
            told = f"{told}: {reason}"
        if status in _OF_KEY:
            told = f"{told}; give the server's key (api_key_env, --key-env, in a recipe endpoint_key_env)"
        if status in _RETRIED:
            return Dropped(told, wait_seconds=_retry_after(answer.headers.get("retry-after", "")))
        return Refused(told, "request" if status in _OF_REQUEST else "engine")

    def _event(self, data: bytes, where: str) -> Event:
        event = _parsed(Event, data, where)
        if event.error is not None:
            raise self._reported(event.error, data, where)
        return event

    def _reported(self, error: Any, data: bytes, where: str) -> Dropped | Refused:
        """What an error means that stands in an answer, `data`."""
        told = f"{where}: {_reason(data) or 'it reports an error without a message'}"
        known = error if isinstance(error, dict) else {}
        if known.get("type") == "invalid_request_error" or known.get("code") in _OF_REQUEST:
            return Refused(told, "request")
        return Dropped(told)


def _base(url: str) -> str:
    try:
        parts = urlsplit(url)
        meant = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        meant = False
    if not meant or parts.query or parts.fragment or not url.isascii() or re.search(r"\s", url):
        raise UserError(_NO_ADDRESS)
    if parts.username or parts.password:
        raise UserError(
            "url (in a recipe endpoint): has a name or password in it; put the key into an environment "
            "variable, and give that one's name (api_key_env, --key-env, in a recipe endpoint_key_env)"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def _key(variable: str | None) -> str | None:
    """The key, of which no message tells, nor of `variable`: some will give the key in its place."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            "api_key_env (--key-env, in a recipe endpoint_key_env): there is no such environment variable, or "
            "it is empty; give its name, not the key"
        )
    if not _KEY.fullmatch(key):
        raise UserError(
            "api_key_env (--key-env, in a recipe endpoint_key_env): the key in this environment variable has "
            "white space in it or is not ASCII; put the key alone there"
        )
    return key


@asynccontextmanager
async def _within(seconds: float, where: str) -> AsyncIterator[None]:
    """Raises `Dropped` where the block takes longer: bytes may come one by one, and every one of them in time."""
    try:
        # The client, which waits for so long for each byte, says first what is missing.
        async with asyncio.timeout(_CONNECT_SECONDS + seconds):
            yield
    except TimeoutError:
        raise Dropped(f"{where}: {_silent(seconds)}") from None


def _silent(seconds: float) -> str:
    return (
        f"silent for {seconds:g} s, or not done by then; look whether the server still works, or be more patient with "
        "it (stall_seconds, --patience)"
    )


def _insecure(error: BaseException | None) -> str:
    """What is wrong with the encryption, where that is why there is no connection."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return _one_line(str(error)) or type(error).__name__
        error = error.__cause__ or error.__context__
    return ""


async def _lines(answer: "httpx.Response", where: str, patience: float) -> AsyncIterator[bytes]:
    """Whole lines as they come, each within so many seconds; one that the end of the answer cuts off is none."""
    rest, begun = b"", time.monotonic()
    async for data in answer.aiter_bytes():
        *whole, rest = (rest + data).split(b"\n")
        if whole:
            begun = time.monotonic()
        elif time.monotonic() - begun > patience:
            raise Dropped(f"{where}: {_silent(patience)}")
        for line in whole:
            yield line.rstrip(b"\r")
        if len(rest) > _LONGEST_LINE:
            raise Refused(f"{where}: sent a line of more than {_LONGEST_LINE} bytes")


async def _rest(lines: AsyncIterator[bytes]) -> None:
    """Read on to the end, so that the connection can be used again; one that has not come soon is not worth it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_AFTER_THE_END_SECONDS):
            async for _ in lines:
                pass


async def _body(answer: "httpx.Response", where: str) -> bytes:
    data = bytearray()
    async for part in answer.aiter_bytes():
        data += part
        if len(data) > _LONGEST_BODY:
            raise Refused(f"{where}: answered with more than {_LONGEST_BODY} bytes")
    return bytes(data)


def _parsed(kind: type[_Model], data: bytes, where: str) -> _Model:
    try:
        return kind.model_validate_json(_without_halves(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = _one_line(f"{place}: {first['msg']}" if place else first["msg"])
        raise Refused(f"{where}: sent what cannot be read ({reason}): {_quoted(data)}") from None


def _without_halves(data: bytes) -> bytes:
    """JSON that spells halves of characters, as Python writes a text that was cut in one, with marks in their place."""
    if _HALF.search(data) is None:
        return data
    try:
        text = json.dumps(json.loads(data), ensure_ascii=False)
    except (ValueError, RecursionError):
        return data
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _reason(body: bytes) -> str:
    """What an error object says, in one line; nothing where the body is none (a proxy's page)."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return _one_line(value if isinstance(value, str) else json.dumps(value))


def _retry_after(value: str) -> float | None:
    """Seconds, from a number of them or a date (RFC 9110, 10.2.3); None for anything else."""
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return float(value)
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _quoted(data: bytes) -> str:
    return repr(_one_line(data[:80].decode("utf-8", errors="replace")))


def _one_line(text: str) -> str:
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"
