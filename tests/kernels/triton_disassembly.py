"""The head kernels of source files as a GPU would run them: a script.

    python triton_disassembly.py CAPABILITY FILE ... (90 is sm_90)

Prints a JSON object: for each file, the machine instructions that touch global memory or order it, as in the binary.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unlocked.kernels.triton import aot, head
from unlocked.kernels.triton.pieces import LLS_MATRIX

# Loads and stores of global memory (also those to shared memory behind the threads' back), atomics, barriers of the
# program, fences, and what forgets the lines of the first-level cache.
_OPERATIONS = re.compile(r"\b((?:LDG|LDGSTS|STG|ATOMG?|RED|BAR|MEMBAR|CCTL)(?:\.[\w.]+)?)\b")


def operations(file: str, capability: int) -> list[str]:
    module_spec = importlib.util.spec_from_file_location("disassembled", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    spec = head.head_spec("small", LLS_MATRIX, 24, 6, 4, 2)
    signature, hints = aot._typed_arguments(spec)
    source = ASTSource(fn=module.head_kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=hints)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": spec.num_warps})
    disassembler = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        text = subprocess.run([disassembler, "-c", binary.name], capture_output=True, text=True, check=True).stdout
    return _OPERATIONS.findall(text)


if __name__ == "__main__":
    print(json.dumps({file: operations(file, int(sys.argv[1])) for file in sys.argv[2:]}))
