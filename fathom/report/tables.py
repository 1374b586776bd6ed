"""Two-column tables on a terminal, plain aligned lines elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_rows(title: str, rows: Sequence[tuple[str, str]], console: Console | None = None) -> None:
    """A title, then a label and a value per line."""
    console = console or Console(highlight=False, soft_wrap=True)
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    console.print(table)


def count(number: float) -> str:
    """Things that are counted, in thousands, millions, billions: 1234567 -> '1.23 M'."""
    return _short(number, ("k", "M", "B", "T")).rstrip()


def quantity(number: float, unit: str) -> str:
    """Things that are measured, with SI prefixes: 1.234e9, 'FLOP' -> '1.23 GFLOP'."""
    return _short(number, ("k", "M", "G", "T", "P", "E", "Z", "Y")) + unit


def plural(number: int, thing: str) -> str:
    """1, 'layer' -> '1 layer'; 2000, 'layer' -> '2,000 layers'."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _short(number: float, prefixes: tuple[str, ...]) -> str:
    """Three significant digits and the prefix that keeps them short."""
    for power in range(len(prefixes), 0, -1):
        if abs(number) >= 999.5 * 1000 ** (power - 1):  # what three digits would round up to 1000
            return f"{number / 1000**power:.3g} {prefixes[power - 1]}"
    return f"{number:.3g} "
