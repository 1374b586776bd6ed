"""Joules out of the files that Linux keeps."""

from pathlib import Path

from fathom.evaluate.energy import EnergyMeter


def _zone(powercap: Path, name: str, called: str, energy: int) -> Path:
    folder = powercap / name
    folder.mkdir()
    for file, text in (("name", called), ("energy_uj", energy), ("max_energy_range_uj", 1_000_000)):
        (folder / file).write_text(f"{text}\n")
    return folder


def test_packages_are_added_up_across_their_wrap(tmp_path: Path) -> None:
    """Two packages count, also past the end of a counter; parts of one and the whole computer do not."""
    first, second = _zone(tmp_path, "intel-rapl:0", "package-0", 100), _zone(tmp_path, "intel-rapl:1", "package-1", 0)
    part, whole = _zone(tmp_path, "intel-rapl:0:0", "core", 0), _zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = EnergyMeter(tmp_path)
    for folder, energy in ((first, 500_100), (second, 250_000), (part, 9), (whole, 9)):
        (folder / "energy_uj").write_text(str(energy))
    assert meter.read() == 0.75
    (first / "energy_uj").write_text("100")
    assert meter.read() == 1.25


def test_what_cannot_be_read_is_not_invented(tmp_path: Path) -> None:
    """Without counters, with one that may not be read and with one that goes away there is no number, for good."""
    assert EnergyMeter(tmp_path).read() is None
    zone = _zone(tmp_path, "intel-rapl:0", "package-0", 5)
    meter = EnergyMeter(tmp_path)
    assert meter.read() == 0
    (zone / "energy_uj").unlink()
    assert meter.read() is None
    (zone / "energy_uj").write_text("7")
    assert meter.read() is None
    assert EnergyMeter(tmp_path).read() == 0
