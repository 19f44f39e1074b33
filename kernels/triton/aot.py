"""Ahead-of-time compilation of every Triton kernel, without a GPU: proof that they compile, and what they cost.

    python -m unlocked.kernels.triton.aot [--json FILE] [--match PATTERN]

The files in `MODULES` list the specialisations worth watching in `AOT_SPECS`. Registers, stack and local memory are
read from the compiled binary by `cuobjdump --dump-resource-usage`, which ships with the triton package.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from unlocked.kernels.triton.aot_spec import AotSpec

__all__ = ["ARCHITECTURES", "MODULES", "AotSpec", "all_specs", "compile_ahead", "main"]

ARCHITECTURES = (90, 80)
MODULES = (
    "head",
    "rule_heads",
    "norm_act_specs",
    "weight_grad_specs",
    "block_specs",
    "images",
    "optim",
)  # the files that list specialisations


def all_specs() -> list[AotSpec]:
    """The specialisations of all kernel files, in the order of `MODULES`."""
    modules = [importlib.import_module(f"unlocked.kernels.triton.{name}") for name in MODULES]
    return [spec for module in modules for spec in module.AOT_SPECS]


def compile_ahead(spec: AotSpec, arch: int) -> dict[str, Any]:
    """Compiles `spec` for the compute capability `arch` (90 is sm_90).

    Returns:
        name, arch ("sm_90"), warps, registers (per thread), spills (bytes of local memory per thread; 0 means that
        no register was spilled), shared_bytes (per program), binary_bytes.

    Raises:
        ValueError: under TRITON_INTERPRET=1, where nothing can be compiled, or if the spec leaves an argument untyped.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler; unset it before the first import of triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, hints = _typed_arguments(spec)
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=hints)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": spec.num_warps})
    binary = compiled.asm["cubin"]
    registers, local_bytes = _resource_usage(binary)
    return {
        "name": spec.name,
        "arch": f"sm_{arch}",
        "warps": spec.num_warps,
        "registers": registers,
        "spills": local_bytes,
        "shared_bytes": compiled.metadata.shared,
        "binary_bytes": len(binary),
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints the table. A mistake is one line and exit code 2."""
    parser = _Parser(prog="unlocked.kernels.triton.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="also write the table as JSON")
    parser.add_argument(
        "--match", type=_pattern, default="", metavar="PATTERN", help="only kernels whose name has this regex in it"
    )
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("the package triton is not installed")
    specs = [spec for spec in all_specs() if re.search(options.match, spec.name)]
    if not specs:
        parser.error(f"no kernel's name has {options.match!r} in it")
    rows = [compile_ahead(spec, arch) for spec in specs for arch in ARCHITECTURES]
    print(f"{'kernel':<44} {'arch':<6} {'warps':>5} {'registers':>9} {'spills':>6} {'shared':>7} {'binary':>7}")
    for row in rows:
        print(
            f"{row['name']:<44} {row['arch']:<6} {row['warps']:>5} {row['registers']:>9} {row['spills']:>6} "
            f"{row['shared_bytes']:>7} {row['binary_bytes']:>7}"
        )
    print(
        "registers per thread and spilled bytes per thread: cuobjdump --dump-resource-usage; shared: Triton's metadata"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"error: {message}\n")


def _new_file(text: str) -> Path:
    path = Path(text)
    try:
        fits = path.parent.is_dir() and (path.is_file() or not path.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} can't be written ({error.strerror})") from error
    if not fits:
        raise argparse.ArgumentTypeError(f"{text} can't be written; give a file in a folder that is there")
    return path


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from error
    return text


def _typed_arguments(spec: AotSpec) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    """Triton's signature (constants included) and its hints: which arguments are multiples of 16."""
    signature: dict[str, str] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    for position, argument in enumerate(spec.kernel.arg_names):
        if argument in spec.constexprs:
            signature[argument] = "constexpr"
            continue
        if argument not in spec.signature:
            raise ValueError(f"{spec.name}: argument {argument!r} has neither a type nor a constant")
        kind, _, multiple = spec.signature[argument].partition(":")
        signature[argument] = kind
        if kind.startswith("*") or multiple == "16":
            hints[(position,)] = [["tt.divisibility", 16]]
    return signature, hints


def _resource_usage(binary: bytes) -> tuple[int, int]:
    """(registers, stack + local bytes) per thread of the one kernel in a cubin."""
    import triton

    program = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = (int(value) for value in found.groups())
    return registers, stack + local


if __name__ == "__main__":
    raise SystemExit(main())
