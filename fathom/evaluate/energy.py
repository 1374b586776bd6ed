"""Joules of this machine's processors, where Linux lets them be read.

`/sys/class/powercap/intel-rapl:N` counts what processor package N has used, whoever used it, on Intel's and AMD's
processors. Since 2020 most systems let only root read it; virtual machines mostly have none. Accelerators have counters
of their own, which are not read here.
"""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules of all processor packages since it was made."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._packages = [folder for folder in sorted(powercap.glob("intel-rapl:*")) if _is_package(folder)]
        self._last = {folder: _read(folder / "energy_uj") for folder in self._packages}
        self._ranges = {folder: _read(folder / "max_energy_range_uj") for folder in self._packages}
        self._microjoules: int | None = 0 if self._packages else None

    def read(self) -> float | None:
        """Joules so far; None where they cannot be read.

        The counters begin anew after some 10⁵ joules: to be called every few minutes.
        """
        for folder in self._packages:
            now, last, span = _read(folder / "energy_uj"), self._last[folder], self._ranges[folder]
            if now is None or last is None or span is None:
                self._microjoules = None
            elif self._microjoules is not None:
                self._microjoules += now - last if now >= last else now - last + span
            self._last[folder] = now
        return None if self._microjoules is None else self._microjoules / 1e6


def _is_package(folder: Path) -> bool:
    """Whether it counts a whole processor; others are parts of one, or the whole computer over again."""
    try:
        return (folder / "name").read_text().startswith("package")
    except OSError:
        return False


def _read(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
