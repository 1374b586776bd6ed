"""What a person reads."""

import sys
from pathlib import Path

import pytest

from fathom.config import preset
from fathom.report.command import fathom_command
from fathom.report.describe import describe
from fathom.report.tables import count, plural, quantity


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (1_234_567, "1.23 M"),
        (671e9, "671 B"),
        (14.8e12, "14.8 T"),
        (-2e6, "-2 M"),
    ],
)
def test_counts_keep_three_digits(number: float, said: str) -> None:
    """Counts come in k, M, B, T with three significant digits."""
    assert count(number) == said


def test_quantities_use_si_prefixes() -> None:
    """A measured quantity says giga, not billion."""
    assert quantity(250.46e9, "FLOP") == "250 GFLOP"
    assert quantity(3.5, "FLOP") == "3.5 FLOP"
    assert [quantity(number, "FLOP") for number in (999.4e6, 999.7e6, 3.3e24)] == ["999 MFLOP", "1 GFLOP", "3.3 YFLOP"]


def test_one_is_singular() -> None:
    """Only one of a thing goes without its s."""
    assert [plural(n, "layer") for n in (0, 1, 2000)] == ["0 layers", "1 layer", "2,000 layers"]


def test_command_is_one_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name alone only where the shell would find this very program by it; else the path from here, or the whole."""
    for folder in ("mine/bin", "other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "fathom").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "mine/bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "mine/bin"))
    assert fathom_command() == "fathom"
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    assert fathom_command() == str(tmp_path / "mine/bin/fathom")
    monkeypatch.chdir(tmp_path)
    assert fathom_command() == "mine/bin/fathom"
    (tmp_path / "mine/bin/fathom").unlink()
    assert fathom_command() == f"{sys.executable} -m fathom.cli"


def test_description_of_deepseek_v3() -> None:
    """The published figures of DeepSeek-V3 appear in its description."""
    said = " ".join(f"{label} {value}" for label, value in describe(preset("deepseek-v3"), None))
    for figure in ("671 B", "37.6 B active", "70,272 bytes", "256 experts", "512 + rotary 64", "11,610,068,224"):
        assert figure in said
