"""The C++ kernels compiled for lesser processors than this one: narrower registers, no masks, and the same bits."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_bits import hashes

from unlocked.kernels import cpp
from unlocked.kernels.cpp.bindings import find_compiler

pytestmark = [
    pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the sets are those of x86-64"),
]
SETS = ["x86-64", "x86-64-v3"]


@pytest.mark.parametrize("instructions", SETS)
def test_bits_are_those_of_this_processor(instructions: str, tmp_path: Path) -> None:
    if instructions == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    compiler = tmp_path / "c++"
    lesser = f"${{@/-march=native/-march={instructions}}}"
    compiler.write_text(f'#!{shutil.which("bash")}\nexec {find_compiler()} "{lesser}"\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    script = Path(__file__).with_name("kernel_bits.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "cache").rglob("cpu-*.so")), "the library was compiled for this test"
    assert json.loads(run.stdout.splitlines()[-1]) == hashes()
