"""How much energy a device has taken: NVML's counter of a GPU, the kernel's RAPL counters of the CPU packages."""

from pathlib import Path

import torch

__all__ = ["energy_joules"]

_POWERCAP = Path("/sys/class/powercap")


def energy_joules(device: torch.device) -> float | None:
    """Joules since some fixed moment, or None where nothing tells: without NVML's Python package (nvidia-ml-py), on
    machines without RAPL, and where its counters may be read by root alone."""
    return _gpu_joules(device) if device.type == "cuda" else _cpu_joules()


def _gpu_joules(device: torch.device) -> float | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # it counts millijoules
    except Exception:  # an extra: whatever is missing or too old, the comparison goes on without
        return None


def _cpu_joules(root: Path = _POWERCAP) -> float | None:
    try:
        zones = [zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1]
        # Beside the packages there may be the whole platform ("psys"), which has them in it.
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not packages:
            return None
        return sum(int((zone / "energy_uj").read_text()) for zone in packages) / 1e6
    except (OSError, ValueError):
        return None
