"""The energy of a device."""

from pathlib import Path

from unlocked.comparison.energy import _cpu_joules


def test_energy_of_all_cpu_packages_is_added(tmp_path: Path) -> None:
    assert _cpu_joules(tmp_path) is None
    for name, value in (("intel-rapl:0", "1500000"), ("intel-rapl:1", "500000"), ("intel-rapl:0:0", "7")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(value + "\n")
    assert _cpu_joules(tmp_path) == 2.0
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert _cpu_joules(tmp_path) is None, "half of the machine is no answer"
