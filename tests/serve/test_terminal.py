"""`fathom chat` against a scripted engine."""

import io
import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fathom.data import Tokenizer
from fathom.errors import UserError
from fathom.serve.screen import Screen
from fathom.serve.terminal import ChatSettings, TerminalChat, chat, terminal_lines
from tests.serve.fake_engine import STALL, FakeEngine
from tests.serve.templates import LLAMA, with_template


class Terminal:
    """A conversation with everything that was printed."""

    def __init__(self, engine: FakeEngine, tokenizer: Tokenizer, *, interactive: bool = False) -> None:
        self.out, self.notes = io.StringIO(), io.StringIO()
        self.engine, self.tokenizer = engine, tokenizer
        self.chat = TerminalChat(
            engine, tokenizer, Screen(self.out, self.notes, interactive=interactive), ChatSettings(temperature=0)
        )

    def run(self, *lines: str) -> int:
        return self.chat.run(iter(lines))

    def prompt(self, place: int = -1) -> str:
        """What the model was given."""
        return self.tokenizer.decode(self.engine.requests[place].prompt_ids, skip_special=False)


def talk(tokenizer: Tokenizer, *scripts: Sequence[object], interactive: bool = False, **engine) -> Terminal:
    return Terminal(FakeEngine(scripts=scripts or (("fine",),), **engine), tokenizer, interactive=interactive)


def test_pipe_gets_answers_alone(tokenizer: Tokenizer) -> None:
    """Standard output has one answer after another; thoughts, seconds and figures are on standard error."""
    terminal = talk(tokenizer, (("thinking", "hmm"), "one", " two"), ("three\n",))
    assert terminal.run("a", "", "b") == 0
    assert terminal.out.getvalue() == "one two\nthree\n"
    assert re.fullmatch(
        r"hmm\n\[thought for \d+\.\d s\]\n\[3 tokens, 1 of thought · [\d.]+ tokens/s\]\n\[1 token\]\n",
        terminal.notes.getvalue(),
    )


def test_terminal_gets_thoughts_dimmed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal everything is in one place, thoughts and notes between dimming escapes, the answer without."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = talk(tokenizer, (("thinking", "\nhmm"), "\n\nyes"), interactive=True)
    terminal.run("a")
    assert re.fullmatch(
        r"\x1b\[2mhmm\x1b\[0m\n\x1b\[2m\[thought for [\d.]+ s\]\x1b\[0m\nyes\n\x1b\[2m\[2 tokens.*\]\x1b\[0m\n",
        terminal.out.getvalue(),
    )
    assert terminal.notes.getvalue() == ""


def test_control_characters_are_not_passed_on(tokenizer: Tokenizer) -> None:
    """A model cannot write escape sequences to the terminal, neither in thoughts nor in answers, nor split in two."""
    script = (("thinking", "\x1b]0;owned\x07"), "a\x1b", "[2Jb\rc\x9b31m\td\n")
    terminal = talk(tokenizer, script)
    terminal.run("go")
    assert terminal.out.getvalue() == "a[2Jbc31m\td\n"
    assert "\x1b" not in terminal.notes.getvalue()


def test_conversation_goes_on_without_thoughts(tokenizer: Tokenizer) -> None:
    """The second prompt holds the first question and answer, but not what was thought."""
    terminal = talk(tokenizer, (("thinking", "secret"), "visible"))
    terminal.run("first", "second")
    assert all(words in terminal.prompt() for words in ("first", "visible", "second"))
    assert "secret" not in terminal.prompt()


def test_dial_reaches_the_engine(tokenizer: Tokenizer) -> None:
    """/think, /effort and /budget become the bounds on thoughts that the service would give."""
    terminal = talk(tokenizer)
    code = terminal.run("a", "/think off", "b", "/effort low", "c", "/budget 7", "d", "/budget off", "/think on", "e")
    bounds = [request.thinking for request in terminal.engine.requests]
    assert code == 0
    assert bounds[0] is None
    assert bounds[1].budget == 0
    assert bounds[2].budget == int(0.2 * terminal.engine.requests[2].max_tokens)
    assert bounds[3].budget == 7
    assert bounds[4].budget == int(0.2 * terminal.engine.requests[4].max_tokens)


def test_drawing_reaches_the_engine(tokenizer: Tokenizer) -> None:
    """/temperature and /seed hold for the questions after them, and a seed can be taken back."""
    terminal = talk(tokenizer)
    assert terminal.run("/temperature 1.5", "/seed 7", "a", "/seed off", "b") == 0
    first, second = (request.sampling for request in terminal.engine.requests)
    assert (first.temperature, first.seed, first.top_p) == (1.5, 7, 1.0)
    assert (second.temperature, second.seed) == (1.5, None)


@pytest.mark.parametrize(("effort", "share"), [("low", 0.2), ("none", 0)])
def test_effort_can_be_given_at_the_start(tokenizer: Tokenizer, effort: str, share: float) -> None:
    """It is the dial as /effort sets it; a model without think tags refuses all but none."""
    engine = FakeEngine()
    settings = ChatSettings(effort=effort, top_p=0.9, seed=3)
    screen = Screen(io.StringIO(), io.StringIO(), interactive=False)
    TerminalChat(engine, tokenizer, screen, settings).run(iter(["a"]))
    assert engine.requests[0].thinking.budget == int(share * engine.requests[0].max_tokens)
    assert (engine.requests[0].sampling.top_p, engine.requests[0].sampling.seed) == (0.9, 3)
    if effort != "none":
        with pytest.raises(UserError, match="--effort: this model has no think tags"):
            TerminalChat(engine, with_template(tokenizer, LLAMA), screen, settings)


def test_model_without_tags_refuses_the_dial(tokenizer: Tokenizer) -> None:
    """Each command of the dial says that the model cannot think visibly, and the conversation goes on."""
    terminal = talk(with_template(tokenizer, LLAMA))
    assert terminal.run("/think on", "/effort high", "/budget 5", "hello") == 2
    assert terminal.notes.getvalue().count("no think tags") == 3
    assert terminal.out.getvalue() == "fine\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/thnk on", "did you mean '/think'?"),
        ("/think maybe", "'on' or 'off'"),
        ("/effort hihg", "did you mean 'high'?"),
        ("/again", "did you mean '/retry'?"),
        ("/model", "unknown command '/model'; see /help"),
        ("/temperature hot", "a number from 0 to 2"),
        ("/temperature 3", "a number from 0 to 2"),
        ("/temperature nan", "a number from 0 to 2"),
        ("/seed -1", "a whole number or 'off'"),
        ("/budget -1", "number of tokens"),
        ("/budget ٣", "number of tokens"),
        ("/retry", "nothing has been asked"),
        ("/save", "needs a file's name"),
        ("/save /nowhere/at/all", "/nowhere/at/all: No such file"),
        ("half a \ud800 pair", "not valid UTF-8"),
    ],
)
def test_wrong_line_gets_one_sentence(tokenizer: Tokenizer, line: str, words: str) -> None:
    """A mistake is said in one line, sets the exit code of a pipe, and the next line is served."""
    terminal = talk(tokenizer)
    assert terminal.run(line, "hello") == 2
    said = terminal.notes.getvalue().splitlines()
    assert said[0].startswith("fathom: ")
    assert words in said[0]
    assert terminal.out.getvalue() == "fine\n"


def test_retry_replaces_the_last_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """/retry puts the last of two equal questions again, with the same prompt, and its new answer takes the place."""
    terminal = talk(tokenizer, ("one",), ("two",), ("three",))
    terminal.run("same", "same", "/retry", f"/save {tmp_path / 'chat.json'}")
    assert terminal.prompt(1) == terminal.prompt(2)
    messages = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages] == ["same", "one", "same", "three"]


def test_failed_retry_keeps_the_old_answer(tokenizer: Tokenizer) -> None:
    """When the engine fails, the sentence says why, and what was there before is still part of the conversation."""
    terminal = talk(tokenizer, ("one",), (ValueError("out of memory"),), ("two",))
    assert terminal.run("question", "/retry", "next") == 2
    assert "the engine failed: out of memory" in terminal.notes.getvalue()
    assert "one" in terminal.prompt()


def test_refusal_of_the_engine_is_a_sentence(tokenizer: Tokenizer) -> None:
    """A full queue ends the question, not the conversation."""
    terminal = talk(tokenizer, refuse=UserError("the queue is full"))
    assert terminal.run("hello") == 2
    assert "fathom: the queue is full\n" in terminal.notes.getvalue()


def test_conversation_over_the_context_says_so(tokenizer: Tokenizer) -> None:
    """A prompt that leaves no room names both numbers, and is no part of the conversation afterwards."""
    terminal = talk(tokenizer, context=60)
    assert terminal.run("word " * 100, "short") == 2
    assert "60" in terminal.notes.getvalue()
    assert "word word" not in terminal.prompt()


def test_system_and_reset(tokenizer: Tokenizer) -> None:
    """/system stays over /reset, which forgets the turns; without a text it is gone."""
    terminal = talk(tokenizer)
    terminal.run("/system Be brief.", "first", "/reset", "second", "/system", "third")
    assert "Be brief." in terminal.prompt(1)
    assert "first" not in terminal.prompt(1)
    assert "Be brief." not in terminal.prompt(2)


def test_save_does_not_overwrite(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The file holds system prompt, turns and thoughts; a file that exists stays as it is."""
    file = tmp_path / "chat.json"
    terminal = talk(tokenizer, (("thinking", "hm"), "yes"))
    assert terminal.run("/system S", "q", f"/save {file}") == 0
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
    ]
    assert terminal.run("/reset", f"/save {file}") == 2
    assert json.loads(file.read_text(encoding="utf-8")) == saved


def test_line_goes_on_after_a_backslash(tokenizer: Tokenizer) -> None:
    """A message of several lines is one question."""
    terminal = talk(tokenizer)
    terminal.run("one\\", "two", "/quit", "never")
    assert len(terminal.engine.requests) == 1
    assert "one\ntwo" in terminal.prompt()


def press_ctrl_c(engine: FakeEngine) -> threading.Thread:
    """Interrupts the main thread once an answer stalls."""

    def press() -> None:
        engine.stalled.wait(10)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_ctrl_c_stops_the_answer_only(tokenizer: Tokenizer) -> None:
    """The engine is told to stop, what was written stays part of the conversation, and the next line is answered."""
    terminal = talk(tokenizer, ("half an", STALL, " answer"), ("whole",))
    presser = press_ctrl_c(terminal.engine)
    assert terminal.run("first", "second") == 0
    presser.join()
    assert terminal.engine.tickets[0].cancelled.is_set()
    assert terminal.out.getvalue() == "half an\nwhole\n"
    assert "[stopped · 1 token]" in terminal.notes.getvalue()
    assert "half an" in terminal.prompt()


def test_second_ctrl_c_ends_at_once(tokenizer: Tokenizer) -> None:
    """An engine that does not obey the first one cannot hold the terminal, and Ctrl-C is then the caller's again."""

    class Deaf(FakeEngine):
        def submit(self, request, deliver):
            ticket = super().submit(request, deliver)
            ticket.cancelled = threading.Event()
            ticket.cancel = lambda: signal.raise_signal(signal.SIGINT)
            return ticket

    terminal = Terminal(Deaf(scripts=(("half", STALL),)), tokenizer)
    before = signal.getsignal(signal.SIGINT)
    presser = press_ctrl_c(terminal.engine)
    with pytest.raises(KeyboardInterrupt):
        terminal.run("first", "never asked")
    presser.join()
    assert len(terminal.engine.requests) == 1
    assert signal.getsignal(signal.SIGINT) is before


class Keyboard:
    """In place of `input` and readline: plays lines, or presses Ctrl-C behind what has been typed."""

    def __init__(self, *played: str | tuple[str]) -> None:
        self._played = iter(played)
        self._typed = ""

    def input(self, prompt: str) -> str:
        step = next(self._played)
        if isinstance(step, tuple):
            (self._typed,) = step
            raise KeyboardInterrupt
        return step

    def get_line_buffer(self) -> str:
        return self._typed


def test_ctrl_c_at_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It clears a line, and says on an empty one how to end; only the second on an empty one ends."""
    keyboard = Keyboard(("half a",), ("",), "question", ("",), ("typed",), ("",), ("",), "never")
    monkeypatch.setattr("builtins.input", keyboard.input)
    monkeypatch.setattr("fathom.serve.terminal._line_editor", lambda: keyboard)
    lines = terminal_lines(interactive=True)
    assert next(lines) == "question"
    assert capsys.readouterr().out.count("once more, or Ctrl-D, ends") == 1
    with pytest.raises(KeyboardInterrupt):
        next(lines)
    assert capsys.readouterr().out.count("once more, or Ctrl-D, ends") == 2


def test_ctrl_c_in_a_pipe_ends(tokenizer: Tokenizer) -> None:
    """With no answer under way there is nothing else to stop."""

    def lines() -> Iterator[str]:
        yield "question"
        raise KeyboardInterrupt

    terminal = talk(tokenizer)
    with pytest.raises(KeyboardInterrupt):
        terminal.chat.run(lines())


def test_model_without_a_template_is_refused(tokenizer: Tokenizer) -> None:
    """A model that was never taught to chat gets a sentence that names the command for plain text."""
    with pytest.raises(UserError, match="fathom generate"):
        chat(FakeEngine(), with_template(tokenizer, None), ChatSettings())
