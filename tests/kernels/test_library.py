"""Building the kernels where machines are as they are: no compiler, no home, broken files, several at once."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.kernels import library as module


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Opens the library of a small source, forgetting it afterwards: (library or None, what was warned of)."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int fathom_answer() { return 42; }')
    monkeypatch.setattr(module, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def open_it() -> tuple[object, list[str]]:
        module.library.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = module.library()
            module.library()
        return found, [str(warning.message) for warning in said]

    yield open_it
    module.library.cache_clear()


def answers(found: object) -> bool:
    return found is not None and found.fathom_answer() == 42


def test_it_is_built_once(opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second program finds what the first one has built, and leaves nothing else behind."""
    assert answers(opened()[0])
    monkeypatch.setattr(subprocess, "run", None)
    found, said = opened()
    assert answers(found)
    assert not said
    assert [path.suffix for path in (tmp_path / "cache" / "fathom").iterdir()] == [".so"]


def test_compiling_is_logged_and_not_printed(
    opened, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever listens hears of it when it begins, once; a program that does not listen prints nothing."""
    caplog.set_level(logging.INFO, "fathom.kernels")
    for _ in range(2):
        opened()
    said = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert said == ["compiling kernels for this processor, once, a few seconds"]
    assert capfd.readouterr() == ("", "")


def test_without_a_compiler_it_is_said_once(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler is no library and one warning that says what to install."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    found, said = opened()
    assert found is None
    assert len(said) == 1
    assert "g++" in said[0]


@pytest.mark.parametrize("script", ["exit 1", "echo >&2; exit 1", "printf '\\377\\376' >&2; exit 1", "exit 0"])
def test_a_broken_compiler_is_said_once(script: str, opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails, silently or with rubbish, or that makes nothing, is one warning of one line."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found, said = opened()
    assert found is None
    assert len(said) == 1
    assert "\n" not in said[0]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "/", "-o", "\N{SNOWMAN}"])
def test_a_compiler_that_is_none_is_passed_over(compiler: str, opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CXX set to something that cannot be run, the machine's own compiler builds."""
    monkeypatch.setenv("CXX", compiler)
    assert answers(opened()[0])


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: b"",
        lambda whole: b"no library",
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:4096],
        lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
    ],
    ids=["empty", "text", "last-byte", "half", "page", "zeros"],
)
def test_a_corrupt_file_is_built_again(damaged: Callable[[bytes], bytes], opened, tmp_path: Path) -> None:
    """A cached file that is not what was built, cut short by a full disk for one, is replaced without a word."""
    folder = tmp_path / "cache" / "fathom"
    assert answers(opened()[0])
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.unlink()  # written to in place, it would change under the program that has it open
    file.write_bytes(damaged(content))
    found, said = opened()
    assert answers(found)
    assert not said


@pytest.mark.parametrize("folder", ["/dev/null", "/proc/nothing", "file"])
def test_a_cache_that_cannot_be_written_is_said_once(
    folder: str, opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache folder that is a file, or cannot be made, is one warning and no library."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
    found, said = opened()
    assert found is None
    assert len(said) == 1


def test_a_user_without_a_home_is_served(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that the system does not know (a container's) gets a warning, not a traceback."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    found, said = opened()
    assert found is None
    assert len(said) == 1
    assert "home" in said[0]


def test_programs_may_build_at_once(opened, tmp_path: Path) -> None:
    """Several programs that start together all open a whole library, and leave one file."""
    program = (
        "import sys, types; sys.modules['torch'] = t = types.ModuleType('torch');"
        "t.backends = types.SimpleNamespace(cpu=types.SimpleNamespace(get_cpu_capability=lambda: 'x'));"
        "from pathlib import Path; from fathom.kernels import library as m;"
        f"m.SOURCE = Path({str(tmp_path / 'small.cpp')!r});"
        "print(m.library().fathom_answer())"
    )
    programs = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(4)
    ]
    assert [running.communicate()[0].strip() for running in programs] == ["42"] * 4
    assert len(list((tmp_path / "cache" / "fathom").iterdir())) == 1
