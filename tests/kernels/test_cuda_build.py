"""The CUDA backend where no GPU is needed: that it builds, what it caches, and the checks at its boundary."""

import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlocked.kernels import cuda, native
from unlocked.kernels.cuda import bindings, build, norm_act_geometry
from unlocked.kernels.cuda.head import _block

needs_nvcc = pytest.mark.skipif(build.find_compiler() is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path, Callable[[str], Path]]:
    """Libraries for two architectures, built once through a compiler that notes its calls, and a way to build again."""
    folder = tmp_path_factory.mktemp("cuda")
    calls = _fake_compiler(folder, f'exec "{build.find_compiler()}" "$@"')

    def build_again(arch: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_HOME", str(folder))
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            return build.build_library(arch)

    return {arch: build_again(arch) for arch in ("90a", "80")}, calls, build_again


def _fake_compiler(folder: Path, action: str) -> Path:
    """Puts a compiler at folder/bin/nvcc that notes its arguments in the returned file and then does `action`."""
    script, calls = folder / "bin" / "nvcc", folder / "calls"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n{action}\n')
    script.chmod(0o755)
    return calls


def _compilations(calls: Path) -> int:
    return sum("-shared" in line for line in calls.read_text().splitlines())


@needs_nvcc
def test_no_kernel_spills_registers(compiled: Any) -> None:
    for path in compiled[0].values():
        log = path.with_suffix(".log").read_text()
        spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", log)]
        registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
        assert len(registers) > 40
        assert max(registers) <= 128  # two blocks of 256 threads, or one of 512, fit an SM
        assert spilled.count(0) == len(spilled) >= 2 * len(registers)


@needs_nvcc
def test_the_oldest_promised_device_can_be_built_for() -> None:
    major, minor = build.OLDEST
    command = [str(build.find_compiler()), "--list-gpu-arch"]
    assert (
        f"compute_{major}{minor}" in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )


@needs_nvcc
def test_second_build_compiles_nothing(compiled: Any) -> None:
    libraries, calls, build_again = compiled
    native._compiler_version.cache_clear()  # as in a new process
    assert build_again("90a") == libraries["90a"]
    assert _compilations(calls) == 2  # the two architectures


@needs_nvcc
def test_library_loads_without_a_device(compiled: Any) -> None:
    library = bindings.load_library(str(compiled[0]["90a"]))
    assert library.unlocked_error_name(2) == b"cudaErrorMemoryAllocation"
    assert library.unlocked_geometry_bytes(0) == len(bindings.Geometry._fields_) * 8


def test_signatures_are_those_of_the_sources() -> None:
    letters = {"int": "i", "int64_t": "l", "float": "f", "const Geometry*": "g", "const void*": "p", "void*": "p"}
    found = {}
    for path in Path(build.__file__).parent.glob("*.cu"):
        for name, text in re.findall(
            r'extern "C" int (\w+)\(int device, cudaStream_t stream,([^)]*)\)', path.read_text()
        ):
            types = [" ".join(argument.split()[:-1]) for argument in text.split(",")]
            found[name] = "".join(letters[kind] for kind in types)
    assert found == {name: text.replace(" ", "") for name, text in bindings._SIGNATURES.items()}


def test_many_builders_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _fake_compiler(tmp_path, 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(build.build_library, ["90a"] * 8))
    assert len(paths) == 1
    assert paths.pop().read_text() == "built\n"
    assert _compilations(calls) == 1


def test_failing_compiler_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_compiler(tmp_path, '[ "$1" = --version ] && exit 0; echo "no such architecture" >&2; exit 3')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"exit status 3.*\nno such architecture"):
        build.build_library("80")
    assert [path.suffix for path in native.cache_directory().iterdir()] == [".lock"]


def test_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "_USUAL_PLACE", tmp_path / "nvcc")
    with pytest.raises(ValueError, match="need nvcc, found in none of"):
        build.build_library("90a")


def test_unavailable_without_a_device() -> None:
    assert "not cpu" in cuda.unavailable("cpu")
    if not torch.cuda.is_available():
        assert cuda.unavailable("cuda") == "torch finds no CUDA device"


# All but the device is checked wherever the tensors are.


def _norm_act_arguments(**changes: Any) -> dict[str, Any]:
    vectors = {name: torch.ones(4) for name in ("weight", "bias", "running_mean", "running_var")}
    return {"conv": torch.randn(2, 4, 6, 6), **vectors, "latent_size": 3, "pool": "max", **changes}


def _head_arguments(**changes: Any) -> dict[str, Any]:
    given = {"latents": torch.randn(3, 8), "labels": torch.zeros(3, dtype=torch.int64), "basis": torch.randn(5, 8)}
    return {**given, "modulation": torch.randn(5, 6), **changes}


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (cuda.norm_act_forward, _norm_act_arguments(), "conv must be on a CUDA device"),
        (cuda.norm_act_forward, _norm_act_arguments(conv=torch.randn(2, 4, 6)), r"\[2, 4, 6\]"),
        (cuda.norm_act_forward, _norm_act_arguments(conv=torch.randn(2, 4, 6, 6).double()), "float64"),
        (cuda.norm_act_forward, _norm_act_arguments(conv=torch.empty(0, 4, 6, 6)), "non-empty"),
        (cuda.norm_act_forward, _norm_act_arguments(weight=torch.ones(5)), r"weight must be .*\[4\].*\[5\]"),
        (cuda.norm_act_forward, _norm_act_arguments(running_var=torch.ones(8)[::2]), "running_var must be contiguous"),
        (cuda.norm_act_forward, _norm_act_arguments(conv_bias=torch.ones(4).half()), "conv_bias must be .*float16"),
        (cuda.norm_act_forward, _norm_act_arguments(latent_size=4), "pooling to 4 does not tile 6 x 6"),
        (cuda.norm_act_forward, _norm_act_arguments(pool="mean"), "valid: none, max, average"),
        (cuda.norm_act_forward, _norm_act_arguments(pool="average", pool_size=4), "to 4 does not tile"),
        (cuda.norm_act_forward, _norm_act_arguments(conv=torch.randn(2, 4), latent_size=4), "use pool='none'"),
        (cuda.norm_act_forward, _norm_act_arguments(conv=torch.randn(2, 4), latent_size=2), "its 4 activations, got 2"),
        (cuda.norm_act_forward, _norm_act_arguments(out=torch.empty(2, 4, 6, 6)), r"out must be .*\[2, 4, 3, 3\]"),
        (cuda.local_head, _head_arguments(), "latents must be on a CUDA device"),
        (cuda.local_head, _head_arguments(latents=torch.randn(3, 8).double()), "float64"),
        (cuda.local_head, _head_arguments(labels=torch.zeros(3).int()), "labels must be torch.int64"),
        (cuda.local_head, _head_arguments(basis=torch.randn(5, 7)), r"basis must be float32 \[R, 8\].*\[5, 7\]"),
        (cuda.local_head, _head_arguments(modulation=torch.randn(4, 6)), r"modulation must be .*\[5, N\].*\[4, 6\]"),
        (cuda.local_head, _head_arguments(totals=torch.zeros(2)), "totals must be torch.float64"),
        (cuda.local_head, _head_arguments(temperature=0.0), "temperature must be positive, got 0"),
    ],
)
def test_boundary(function: Callable[..., object], arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        function(**arguments)


@given(
    batch=st.integers(1, 2**31) | st.integers(2**31 - 2**21, 2**31),
    channels=st.sampled_from([1, 2, 33, 4096]),
    plane=st.integers(1, 2**31) | st.integers(2**31 - 2**21, 2**31) | st.just(1),
    channels_last=st.booleans(),
    sms=st.sampled_from([1, 132, 600]),
)
def test_no_index_of_32_bits_overflows(batch: int, channels: int, plane: int, channels_last: bool, sms: int) -> None:
    """What is not refused leaves room for the last step of each loop, in which a counter goes beyond its end."""
    try:
        geometry = norm_act_geometry.full_backward_geometry((batch, channels, 1, plane), channels_last, 1, sms)
    except ValueError:
        return
    slots = build.THREADS // (build.CHUNK if channels_last else 1)
    step = geometry.blocks * (slots // geometry.splits)
    assert batch * geometry.grid_h * geometry.grid_w + step < 2**31
    assert channels * plane < 2**31
    assert geometry.window_h * geometry.window_w + 4 * geometry.splits < 2**31


def test_limits_of_the_geometry() -> None:
    with pytest.raises(ValueError, match=r"less than 2\*\*31 - 2\*\*20 values"):
        norm_act_geometry.full_backward_geometry((1, 2, 2**15, 2**15), True, 1, 132)
    assert _block(1, 60000, 10, 10, False, 132, 227 * 1024) == (0, 0)  # such a head is the reference's
