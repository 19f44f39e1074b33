"""The bits of two small runs on digits: the same in every engine, and the same as when they were written down.

A weight's bits depend on the order of sums, hence on torch's release, on the processor's vector instructions and on the
number of threads. So the literals are for one of each; that the engines agree is checked everywhere.
"""

import json
from pathlib import Path

import digest_worker
import pytest
import torch
from ranks import ranks

TORCH = "2.13.0"
# By the processor's capability as torch names it; then by kernels and rule.
DIGESTS = {
    "AVX512": {
        "auto LLS": "28c06ef80adaeba946b62990b2c3742822e77ad23613684c8db97169e3d53778",
        "auto LLS_MxM": "e2c7de455aeb9cf60a1f6c01489bb8a811bfc51f0a312f882bbce4bbf1d1d221",
        "torch LLS": "328892c507043da8747048dc53e79d8b3a3540c4d5e100fc0e98522cf93a6d42",
        "torch LLS_MxM": "5f220caad953e75f83d87145e9c16fce2ff84e3357fe7d06f42e83b143412448",
    },
}


@pytest.fixture(scope="module")
def sequential() -> dict[str, str]:
    found = digest_worker.train("sequential", 1)
    assert len(set(found.values())) == 4
    return found


def test_the_digests_are_those_written_down(sequential: dict[str, str]) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    release = torch.__version__.partition("+")[0]
    if release != TORCH or capability not in DIGESTS:
        written = f"written down for torch {TORCH} on {', '.join(DIGESTS)}"
        pytest.skip(f"{written}; this is torch {release} on {capability}, with {sequential}")
    assert sequential == DIGESTS[capability]


@pytest.mark.parametrize("stages", [2, 5])
def test_streams_leave_the_same_bits(stages: int, sequential: dict[str, str]) -> None:
    assert digest_worker.train("streams", stages) == sequential


@pytest.mark.alone
def test_processes_leave_the_same_bits(sequential: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with ranks(2, [digest_worker.__file__, "processes", "2", str(out)]) as started:
        texts = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], texts
    assert json.loads(out.read_text()) == sequential
