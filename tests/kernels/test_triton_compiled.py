"""Triton's own compiler without a GPU: every launch up to the last call, and what the binary does in which order.

In processes of their own: under the interpreter, which these tests run in, there is no compiler.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from unlocked.kernels.triton import head_kernels

pytestmark = pytest.mark.alone
_HERE = Path(__file__).parent
_SOURCE = Path(head_kernels.__file__)
_MODULES = (
    *("head_kernels", "images", "norm_act_backward_kernels", "norm_act_forward_kernels", "optim_kernels"),
    *("weight_grad_kernels", "sum_act", "gelu", "max_pool"),
)

# What is planted in a copy of the head's kernels, and what must be seen of it in the binary.
PLANTED = {
    "no order": ('sem="acq_rel"', 'sem="relaxed"', "no MEMBAR"),
    "no acquire": ('sem="acq_rel"', 'sem="release"', "no CCTL.IVALL"),
    "no release": ('sem="acq_rel"', 'sem="acquire"', "no MEMBAR"),
    "order in one SM": ('sem="acq_rel"', 'sem="acq_rel", scope="cta"', "not STRONG.GPU"),
    "no atomic": (
        'arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")',
        "arrived = tl.load(arrivals)\n    tl.store(arrivals, arrived + 1)",
        "0 atomics",
    ),
}


def _run(script: str, *arguments: object) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(_HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_launcher_reaches_its_kernel() -> None:
    launches = [json.loads(line) for line in _run("triton_without_device.py").splitlines()]
    kernels = set()
    for name in _MODULES:
        module = importlib.import_module(f"unlocked.kernels.triton.{name}")
        kernels |= {thing for thing in vars(module) if thing.endswith("_kernel")}
    assert len(kernels) == 18
    assert {launch["kernel"] for launch in launches} == kernels
    for launch in launches:
        assert launch["grid"][1] <= 65535, launch
        assert launch["shared_bytes"] <= 48 * 1024, launch  # what every device has
    # More rows than `_MANY_ROWS`: four per program.
    assert any(launch["kernel"] == "head_kernel" and launch["grid"][0] == 513 for launch in launches)


def _faults(operations: list[str]) -> list[str]:
    """What is wrong with [Note: other programs' stores] in the order of a binary's operations."""
    atomics = [k for k, name in enumerate(operations) if name.startswith("ATOM")]
    if len(atomics) != 1:
        return [f"{len(atomics)} atomics"]
    (at,) = atomics
    before, after = operations[:at], operations[at + 1 :]
    found = [] if operations[at].endswith("STRONG.GPU") else [f"{operations[at]} is not STRONG.GPU"]
    if not before or not before[-1].startswith("MEMBAR"):
        return [*found, "no MEMBAR before the atomic"]
    if not before[-1].endswith(".GPU"):
        found.append(f"{before[-1]} is not of the whole GPU")
    stores = [k for k, name in enumerate(before) if name.startswith("STG")]
    if not stores or not any(name.startswith("BAR") for name in before[stores[-1] :]):
        found.append("no barrier between the stores and the fence")
    if after[:1] != ["CCTL.IVALL"]:
        return [*found, "no CCTL.IVALL after the atomic"]
    loads = [k for k, name in enumerate(after) if name.startswith("LDG")]
    if not loads or not any(name.startswith("BAR") for name in after[: loads[0]]):
        found.append("no barrier between the acquire and the loads")
    return found


@pytest.mark.parametrize("capability", [80, 90])
def test_the_last_program_reads_what_the_others_wrote(capability: int) -> None:
    operations = json.loads(_run("triton_disassembly.py", capability, _SOURCE))[str(_SOURCE)]
    assert not _faults(operations)
    # Triton puts barriers of its own around an atomic whose result all threads use, so that without ours there are
    # still some; that they would be missed is seen here.
    at = next(k for k, name in enumerate(operations) if name.startswith("ATOM"))
    without = [[name for name in part if not name.startswith("BAR")] for part in (operations[:at], operations[at:])]
    assert _faults(without[0] + operations[at:]) == ["no barrier between the stores and the fence"]
    assert _faults(operations[:at] + without[1]) == ["no barrier between the acquire and the loads"]


def test_a_broken_order_is_seen(tmp_path: Path) -> None:
    files: dict[str, Path] = {}
    for name, (there, instead, _) in PLANTED.items():
        text = _SOURCE.read_text()
        assert text.count(there) == 1
        files[name] = tmp_path / f"{name.replace(' ', '_')}.py"
        files[name].write_text(text.replace(there, instead))
    found: dict[str, Any] = json.loads(_run("triton_disassembly.py", 90, *files.values()))
    for name, (_, _, fault) in PLANTED.items():
        assert any(fault in text for text in _faults(found[str(files[name])])), name
