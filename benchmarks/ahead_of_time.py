"""What the compilers say of the kernels, without a GPU: registers, spills, shared memory, instructions.

    python benchmarks/ahead_of_time.py [FOLDER]      # default: benchmarks/results

Writes aot_triton-VERSION.json (every Triton kernel), aot_heads_triton-VERSION.json (the generic head against one
written by hand, and a rule outside of the LLS family) and, where nvcc is there, aot_nvcc-VERSION.json.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from unlocked.runtime.saving.whole_file import write_json

__all__ = ["head_rows", "nvcc_rows", "parse_ptxas"]

ROOT = Path(__file__).parent.parent
_LLS = "local_head SmallConv LLS 512"
_CLASSES = {"loads": r"LDG", "stores": r"STG", "shared": r"(LDS|STS)", "barriers": r"BAR", "shuffles": r"SHFL"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "benchmarks" / "results")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("ahead_of_time: unset TRITON_INTERPRET, which replaces the compiler", file=sys.stderr)
        return 1
    import triton

    from unlocked.kernels.triton import aot

    aot.main(["--json", str(folder / f"aot_triton-{triton.__version__}.json")])
    _write(folder / f"aot_heads_triton-{triton.__version__}.json", head_rows())
    version, rows = nvcc_rows()
    if version:
        _write(folder / f"aot_nvcc-{version}.json", rows)
    else:
        print("ahead_of_time: no nvcc here, so no report of the CUDA sources")
    return 0


def head_rows() -> list[dict[str, Any]]:
    """Heads of 512 latents and 10 classes on sm_90 and sm_80: by hand, of LLS's pieces, of the example's pieces."""
    from hand_head import AOT_SPEC

    from unlocked.kernels.triton.aot import ARCHITECTURES, all_specs, compile_ahead

    lls = next(spec for spec in all_specs() if spec.name == _LLS)
    example = _load_example().hinge_head_pieces
    pieces = {
        "LATENTS": example.latents,
        "LATENTS_BACKWARD": example.latents_backward,
        "SCORES": example.scores,
        "SCORES_BACKWARD": example.scores_backward,
        "LOSS": example.loss,
    }
    specs = [
        AOT_SPEC,
        replace(lls, name="LLS 512, of pieces"),
        replace(
            lls,
            name="softsign + hinge 512, of pieces (examples/triton_rule.py)",
            constexprs={**lls.constexprs, **pieces},
        ),
    ]
    return [compile_ahead(spec, arch) | _instructions(spec, arch) for spec in specs for arch in ARCHITECTURES]


def nvcc_rows() -> tuple[str, list[dict[str, Any]]]:
    """(nvcc's version, a row per kernel and architecture) from the report of a build; ("", []) without nvcc."""
    from unlocked.kernels.cuda.build import build_library, find_compiler

    compiler = find_compiler()
    if compiler is None:
        return "", []
    text = subprocess.run([str(compiler), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    rows = []
    for arch in ("90a", "80"):
        log = build_library(arch).with_suffix(".log").read_text()
        rows += [{"arch": f"sm_{arch}"} | row for row in parse_ptxas(log)]
    return found[1] if found else "unknown", rows


def parse_ptxas(log: str) -> list[dict[str, Any]]:
    """Rows {name, registers, spills, stack, shared_bytes} of what `ptxas -v` prints; names demangled if c++filt is
    there."""
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    rows = []
    for name, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append(
            {
                "name": name,
                "registers": int(registers),
                "spills": int(stores) + int(loads),
                "stack": int(stack),
                "shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    for row, name in zip(rows, _demangle([row["name"] for row in rows]), strict=True):
        row["name"] = name
    return rows


def _demangle(names: list[str]) -> list[str]:
    try:
        result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    plain = result.stdout.splitlines()
    return [re.sub(r"^void |unlocked::|\(anonymous namespace\)::|\(.*", "", name) for name in plain]


def _load_example() -> Any:
    """examples/triton_rule.py with `hinge_head_pieces`. Where there is no GPU it would ask for the interpreter, which
    can't compile: so it is told that there is one."""
    import torch

    path = ROOT / "examples" / "triton_rule.py"
    spec = importlib.util.spec_from_file_location("triton_rule", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    answer, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        spec.loader.exec_module(module)
    finally:
        torch.cuda.is_available = answer
    from unlocked.kernels.triton.pieces import HeadPieces

    module.hinge_head_pieces = HeadPieces(
        latents=module.softsign, latents_backward=module.softsign_backward, loss=module.hinge
    )
    return module


def _instructions(spec: Any, arch: int) -> dict[str, Any]:
    """Static counts out of the disassembly. There are no loops but the one over the batch of the last program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from unlocked.kernels.triton.aot import _typed_arguments

    signature, hints = _typed_arguments(spec)
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": spec.num_warps})
    program = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([str(program), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", text))
    del opcodes["NOP"]  # padding
    counts = {
        name: sum(number for opcode, number in opcodes.items() if re.match(pattern, opcode))
        for name, pattern in _CLASSES.items()
    }
    return {"instructions": sum(opcodes.values())} | counts


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    write_json(path, rows)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
