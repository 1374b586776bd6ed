import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from fathom.train.display import BAR_WIDTH, Display, share_of_peak

VALUES = {
    "loss": 12.345,
    "bits_per_byte": 3.646,
    "tokens_per_second": 12345.6,
    "gemm_share": 1.25,
    "max_vio": 12.34,
    "mtp_loss": 8.329,
}


def live_line(width: int) -> str:
    """What a terminal of `width` shows after the second of a million steps."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    display = Display(console, total=1_000_000, done=123_455)
    display.step(123_456, VALUES)
    display.step(123_457, VALUES)
    with console.capture() as capture:
        console.print(display._live.get_renderable())
    line, rest = capture.get().split("\n", 1)
    assert rest == "", "the line was wrapped"
    return Text.from_ansi(line).plain.rstrip()


@pytest.mark.parametrize("width", [80, 95, 110, 200])
def test_the_dearest_parts_are_never_cut(width: int) -> None:
    """From 80 columns on step, loss, speed and time left stand whole beside a bar of full width; others as they fit."""
    line = live_line(width)
    assert cell_len(line) <= width
    assert len(line.split(" ")[0]) == BAR_WIDTH
    for part in ("step 123457/1000000", "loss 12.345", "12,346 tokens/s", " left"):
        assert part in line
    assert "…" not in line
    assert ("MTP loss 8.329" in line) == (width == 200)


def test_a_share_above_the_peak_says_why() -> None:
    """More than was measured to be possible is not printed without doubt in the measurement."""
    assert share_of_peak(0.42) == "42% of peak"
    assert "busy" in share_of_peak(1.25)
