"""`fathom chat`: a conversation with a model in a terminal, or line by line through a pipe."""

import contextlib
import json
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from pydantic import Field

from fathom.config.section import Section
from fathom.data.tokenizer import Tokenizer
from fathom.engine.protocol import Chunk, Engine, Request, Sampling, Ticket
from fathom.errors import UserError, nearest
from fathom.serve.dial import read_dial
from fathom.serve.errors import ALIKE, ApiError
from fathom.serve.prompt import Prompter
from fathom.serve.requests import engine_requests, room, sampling_of
from fathom.serve.schema import ChatForm, Effort
from fathom.serve.screen import Screen

_EFFORTS: tuple[str, ...] = get_args(Effort)
_HELP = """\
/think on|off    let the model think before it answers, or not
/effort LEVEL    how long it may think: none, minimal, low, medium, high, xhigh, max
/budget N|off    exactly how many tokens it may think
/system [TEXT]   what to tell it before everything else; without a text, nothing
/temperature T   how freely it draws its words: 0 (always the likeliest) to 2
/seed N|off      the same seed and questions give the same answers
/retry           ask the last question again
/reset           begin a new conversation
/save FILE       write the conversation as JSON
/help            this
/quit            end (so does Ctrl-D)
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer, or clears the line; a second one ends."""
_FOREIGN = {"/again": "/retry", "/regenerate": "/retry", "/clear": "/reset", "/new": "/reset", "/exit": "/quit"}
"""What other programs call a command of ours."""


class ChatSettings(Section):
    """What is asked of the model beside the conversation."""

    system: str = ""
    """Told to the model before everything else; empty tells nothing."""
    temperature: float = Field(default=0.6, ge=0, le=2)
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of most likely tokens whose probabilities reach this sum."""
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    """Same seed and questions, same answers; None draws afresh each time."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer, thoughts included; None is what the context leaves."""
    think: bool | None = None
    """On, off, or None: as the model's template has it."""
    effort: Effort | None = None
    """How long to think; see `fathom.serve.dial`."""
    budget: int | None = Field(default=None, ge=1)
    """Exactly after this many tokens of thoughts the answer begins."""


@dataclass
class _Answer:
    text: str = ""
    thoughts: str = ""
    last: Chunk | None = None
    began: float = 0.0
    """When its first token came, and below, its latest; seconds on a clock of no meaning."""
    latest: float = 0.0


class TerminalChat:
    """One conversation. `run` reads lines until they end; the engine stays the caller's to close."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, screen: Screen, settings: ChatSettings) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prompter = Prompter(tokenizer)
        self._screen = screen
        if settings.effort not in (None, "none"):
            self._needs_tags("--effort")
        # No effort is the switch, which /think may turn on again.
        self._settings = settings.replace(think=False, effort=None) if settings.effort == "none" else settings
        self._turns: list[dict[str, str]] = []
        self._failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/think": self._set_think,
            "/effort": self._set_effort,
            "/budget": self._set_budget,
            "/system": self._set_system,
            "/temperature": self._set_temperature,
            "/seed": self._set_seed,
            "/retry": self._retry,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: self._screen.say(_HELP),
        }

    def run(self, lines: Iterator[str]) -> int:
        """Answer `lines` until they end or one says `/quit`. The exit code: 2 when a pipe's line was in error.

        Raises `KeyboardInterrupt` for the Ctrl-C that is meant to end.
        """
        for line in _joined(lines):
            words = line.strip()
            if words == "/quit":
                break
            try:
                _check_text(line)
                if words.startswith("/"):
                    self._command(words)
                elif words:
                    self._ask(line)
            except (UserError, ApiError) as error:
                self._failed = True
                self._screen.say(f"fathom: {error}")
        return 2 if self._failed and not self._screen.interactive else 0

    def _command(self, words: str) -> None:
        name, _, rest = words.partition(" ")
        if name not in self._commands:
            guess = nearest(name, [*self._commands, "/quit"], cutoff=ALIKE)
            guess = f" (did you mean '{_FOREIGN[name]}'?)" if name in _FOREIGN else guess
            raise UserError(f"unknown command '{name}'{guess}; see /help")
        self._commands[name](rest.strip())

    def _ask(self, question: str) -> None:
        """Put the question and show the answer; a question that got none is no part of the conversation."""
        self._turns.append({"role": "user", "content": question})
        answer = None
        try:
            answer = self._answer(self._request())
        finally:
            if answer is None or not answer.text:
                self._turns.pop()
        if answer.text:
            thoughts = {"reasoning_content": answer.thoughts} if answer.thoughts else {}
            self._turns.append({"role": "assistant", "content": answer.text, **thoughts})

    def _request(self) -> Request:
        """The conversation as the service would put it to the engine."""
        settings = self._settings
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in self._turns]
        values: dict[str, Any] = {
            name: getattr(settings, name) for name in ("temperature", "top_p", "seed", "max_tokens")
        }
        if settings.think is not None:
            values["thinking"] = {"type": "enabled" if settings.think else "disabled"}
        if settings.think is not False:
            values |= {"reasoning_effort": settings.effort, "thinking_budget": settings.budget}
        form = ChatForm.model_validate({"model": "chat", "messages": [*system, *turns], **values})
        dial = read_dial(form, thinks=self._prompter.thinks)
        prompt = self._prompter.chat(form, variables=dial.template_variables(), tools=None)
        max_tokens = room(form, [prompt], context=self._engine.context)
        (request,) = engine_requests(
            form,
            [prompt],
            max_tokens=max_tokens,
            sampling=sampling_of(form, vocab_size=self._tokenizer.vocab_size, defaults=Sampling()),
            thinking=dial.bounds(max_tokens),
        )
        return request

    def _answer(self, request: Request) -> _Answer:
        """Show the answer as it comes. The first Ctrl-C stops it, the second raises `KeyboardInterrupt`."""
        arrived: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        answer = _Answer()
        with _interrupts_into(arrived):
            ticket = self._engine.submit(request, arrived.put)
            try:
                self._show(answer, arrived, ticket)
            except BaseException:
                ticket.cancel()
                raise
        if answer.thoughts and not answer.text:
            self._note_thoughts(answer)
        self._note_figures(answer)
        return answer

    def _show(self, answer: _Answer, arrived: "queue.SimpleQueue[Chunk | None]", ticket: Ticket) -> None:
        while answer.last is None or answer.last.finish_reason is None:
            try:
                # Not without end: a signal that comes just before the wait would only be seen after it.
                chunk = arrived.get(timeout=0.2)
            except queue.Empty:
                continue
            if chunk is None:
                ticket.cancel()
                continue
            answer.last = chunk
            if chunk.token_ids:
                answer.latest = time.monotonic()
                answer.began = answer.began or answer.latest
            if chunk.text:
                self._show_text(answer, chunk)
        if answer.last.finish_reason == "error":
            raise UserError(f"the engine failed: {answer.last.message or 'no reason given'}; try /retry or /reset")

    def _show_text(self, answer: _Answer, chunk: Chunk) -> None:
        """Templates leave empty lines at the beginning of thoughts and answers, which nobody needs to see."""
        if chunk.part == "thinking":
            self._screen.thought(chunk.text if answer.thoughts.strip() else chunk.text.lstrip("\n"))
            answer.thoughts += chunk.text
            return
        if answer.thoughts and not answer.text:
            self._note_thoughts(answer)
        self._screen.answer(chunk.text if answer.text.strip() else chunk.text.lstrip("\n"))
        answer.text += chunk.text

    def _note_thoughts(self, answer: _Answer) -> None:
        self._screen.note(f"thought for {answer.latest - answer.began:.1f} s")

    def _note_figures(self, answer: _Answer) -> None:
        assert answer.last is not None
        usage, seconds = answer.last.usage, answer.latest - answer.began
        endings = {"length": ["reached the longest answer"], "cancelled": ["stopped"]}
        words = endings.get(answer.last.finish_reason or "", [])
        tokens = f"{usage.completion} token{'' if usage.completion == 1 else 's'}"
        words = [*words, tokens + (f", {usage.reasoning} of thought" if usage.reasoning else "")]
        # The first token's time is the prompt's, so it is not in the rate.
        if usage.completion > 1 and seconds > 0:
            words.append(f"{(usage.completion - 1) / seconds:.1f} tokens/s")
        self._screen.note(" · ".join(words))

    def _set_think(self, word: str) -> None:
        if word not in ("on", "off"):
            raise UserError(f"/think takes 'on' or 'off', not '{word}'")
        if word == "on":
            self._needs_tags("/think on")
        self._settings = self._settings.replace(think=word == "on")
        self._screen.note(f"thinking {word}")

    def _set_effort(self, word: str) -> None:
        if word not in _EFFORTS:
            raise UserError(f"/effort takes one of {', '.join(_EFFORTS)}, not '{word}'{nearest(word, _EFFORTS)}")
        self._needs_tags("/effort")
        effort = None if word == "none" else word
        self._settings = self._settings.replace(think=effort is not None, effort=effort, budget=None)
        self._screen.note(f"effort {word}")

    def _set_budget(self, word: str) -> None:
        if word == "off":
            self._settings = self._settings.replace(budget=None)
        elif word.isascii() and word.isdecimal() and len(word) < 10:
            self._needs_tags("/budget")
            # No budget for thoughts is the same as no thoughts.
            self._settings = self._settings.replace(think=int(word) > 0, budget=int(word) or None)
        else:
            raise UserError(f"/budget takes a number of tokens or 'off', not '{word}'")
        self._screen.note(f"thinking budget {word}")

    def _set_temperature(self, word: str) -> None:
        try:
            self._settings = self._settings.replace(temperature=float(word))
        except ValueError:  # not a number, or out of range
            raise UserError(f"/temperature takes a number from 0 to 2, not '{word}'") from None
        self._screen.note(f"temperature {self._settings.temperature:g}")

    def _set_seed(self, word: str) -> None:
        if word != "off" and not (word.isascii() and word.isdecimal() and len(word) < 19):
            raise UserError(f"/seed takes a whole number or 'off', not '{word}'")
        self._settings = self._settings.replace(seed=None if word == "off" else int(word))
        self._screen.note(f"seed {word}")

    def _needs_tags(self, command: str) -> None:
        if not self._prompter.thinks:
            raise UserError(f"{command}: this model has no think tags in its chat template, so it cannot think visibly")

    def _set_system(self, text: str) -> None:
        self._settings = self._settings.replace(system=text)
        self._screen.note("system prompt set" if text else "no system prompt")

    def _retry(self, _: str) -> None:
        before = self._turns
        asked = [place for place, turn in enumerate(before) if turn["role"] == "user"]
        if not asked:
            raise UserError("/retry: nothing has been asked yet")
        self._turns = before[: asked[-1]]
        try:
            self._ask(before[asked[-1]]["content"])
        finally:
            if len(self._turns) < len(before):  # it got no answer this time: what there was stays
                self._turns = before

    def _reset(self, _: str) -> None:
        self._turns = []
        self._screen.note("a new conversation")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file's name")
        system = [{"role": "system", "content": self._settings.system}] if self._settings.system else []
        text = json.dumps({"messages": [*system, *self._turns]}, ensure_ascii=False, indent=2)
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError:
            raise UserError(f"/save: {name} exists already; give another name") from None
        except OSError as error:
            raise UserError(f"/save: {name}: {error.strerror or error}") from None
        self._screen.note(f"saved {len(self._turns)} messages to {name}")


@contextlib.contextmanager
def _interrupts_into(arrived: "queue.SimpleQueue[Chunk | None]") -> Iterator[None]:
    """Meanwhile the first Ctrl-C is a None in the queue, wherever the program stands, and the second an exception."""
    pressed = False

    def press(_: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        arrived.put(None)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _check_text(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:
        raise UserError("the line is not valid UTF-8 text") from None


def _joined(lines: Iterator[str]) -> Iterator[str]:
    """Lines of which one that ends with a backslash goes on in the next."""
    parts: list[str] = []
    for line in lines:
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts = []
    if parts:
        yield "\n".join(parts)


def terminal_lines(*, interactive: bool) -> Iterator[str]:
    """Lines of standard input until it ends; at a terminal with a prompt, history and editing.

    There Ctrl-C clears what has been typed; where nothing has, the first one says how to end and the second raises
    `KeyboardInterrupt`. Raises `UserError` for what is no text.
    """
    editor = _line_editor() if interactive else None
    warned = False
    while True:
        try:
            yield input("> " if interactive else "")
            warned = False
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("standard input is not valid UTF-8 text") from None
        except KeyboardInterrupt:
            typed = editor.get_line_buffer() if editor else ""
            if editor is None or (warned and not typed):
                raise
            print("" if typed else "\nonce more, or Ctrl-D, ends")
            warned = not typed


def _line_editor() -> ModuleType | None:
    """Python's readline, whose import is what gives `input` its editing; None where there is none."""
    with contextlib.suppress(ImportError):
        import readline

        return readline
    return None


def chat(engine: Engine, tokenizer: Tokenizer, settings: ChatSettings) -> int:
    """Talk on standard input and output until it ends; the exit code.

    Raises `UserError` for a model without a chat template, and `KeyboardInterrupt` for the Ctrl-C that is meant to end.
    """
    if tokenizer.chat_template is None:
        raise UserError("chat: this model's folder has no chat template; use 'fathom generate' to continue plain text")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(sys.stdout, sys.stderr, interactive=interactive)
    if interactive:
        screen.note("/help lists the commands, Ctrl-D ends")
    return TerminalChat(engine, tokenizer, screen, settings).run(terminal_lines(interactive=interactive))
