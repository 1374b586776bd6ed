"""Calls in a process of their own."""

import builtins
import os
import signal

import pytest

from fathom.tasks import isolation
from fathom.tasks.isolation import Failed, Overrun, isolated


def test_result_comes_from_another_process_that_stays() -> None:
    """Calls run elsewhere, and one after the other in the same process."""
    assert isolated(os.getpid) != os.getpid()
    assert isolated(os.getpid) == isolated(os.getpid)


def test_what_a_call_raises_is_named() -> None:
    """An exception arrives as its class's name and words, and the process goes on."""
    before = isolated(os.getpid)
    with pytest.raises(Failed, match="ValueError: invalid literal for int"):
        isolated(int, "x")
    assert isolated(os.getpid) == before


def test_output_of_a_call_is_no_reply(capfd: pytest.CaptureFixture[str]) -> None:
    """What a call prints reaches nobody and disturbs nothing."""
    assert isolated(print, "x" * 100_000) is None
    assert isolated(len, "four") == 4
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("forever", ["9**9**9**9", "[0 for _ in iter(int, 1)]"])
def test_endless_call_is_ended(forever: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One huge multiplication and an endless loop alike end with `Overrun`; the next call works."""
    monkeypatch.setattr(isolation, "SECONDS", 0.2)
    with pytest.raises(Overrun, match=r"took more than 0\.2 s of processor time"):
        isolated(builtins.eval, forever)
    assert isolated(len, "four") == 4


def test_memory_is_bounded() -> None:
    """A call that asks for more memory than there should be for one raises, and the process goes on."""
    with pytest.raises(Failed, match="MemoryError"):
        isolated(builtins.eval, "bytes(1 << 33)[0]")
    assert isolated(len, "four") == 4


def test_process_that_ends_is_replaced() -> None:
    """A call that takes its process down, or one that was killed meanwhile, costs that call alone."""
    with pytest.raises(Overrun, match=r"ended its process \(code 3\)"):
        isolated(os._exit, 3)
    os.kill(isolated(os.getpid), signal.SIGKILL)
    isolation._current._process.wait()
    assert isolated(len, "four") == 4


def test_reply_that_nobody_read_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while a call runs ends its process: its late reply must not answer another call."""

    def interrupt(_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(isolation, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            isolated(len, "a")
    assert isolated(len, "four") == 4


def test_sets_have_the_same_order_in_every_run() -> None:
    """Strings hash the same in every other process."""
    assert isolated(builtins.eval, "hash('a')") == _hash_in_new_process()


def _hash_in_new_process() -> int:
    isolation._current.end()
    return isolated(builtins.eval, "hash('a')")
