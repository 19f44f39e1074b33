"""The energy of a device."""

from pathlib import Path

from unlocked.comparison.energy import _cpu_joules


def test_energy_of_all_cpu_packages_is_added(tmp_path: Path) -> None:
    assert _cpu_joules(tmp_path) is None
    zones = {
        "intel-rapl:0": ("package-0", "1500000"),
        "intel-rapl:1": ("package-1", "500000"),
        "intel-rapl:2": ("psys", "9000000"),  # the platform, with both packages in it
        "intel-rapl:0:0": ("core", "7"),
    }
    for folder, (name, value) in zones.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name").write_text(name + "\n")
        (tmp_path / folder / "energy_uj").write_text(value + "\n")
    assert _cpu_joules(tmp_path) == 2.0
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert _cpu_joules(tmp_path) is None, "half of the machine is no answer"
