#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: the gpu tests, the single-GPU benchmark, and what they say.
#
#   scripts/gpu_check.sh [OUTPUT_FOLDER]        (default: benchmarks/results/latest)
#
# Needs torch 2.11 or newer with CUDA, Triton 3.6 or newer, pytest, hypothesis and this project's dependencies; it
# installs nothing. Every part has a time limit of its own, and a part that fails does not stop the others. Keep what
# it leaves as benchmarks/results/WHAT_GPU_DATE.json.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/latest}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: no CUDA device that torch can use; run this on a machine with one" >&2
    exit 3
fi
mkdir -p "$out"
status=0

# part NAME SECONDS COMMAND...: runs it under a limit, keeps its output, remembers a failure.
part() {
    local name=$1 limit=$2
    shift 2
    local began=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    printf '%-14s exit %3d  %4d s  %s\n' "$name" "$code" $((SECONDS - began)) "$(tail -n 1 "$out/$name.log" | cut -c1-90)"
    [ "$code" -eq 0 ] || status=1
}

"$python" - >"$out/environment.json" <<'PY'
import json, platform, subprocess, torch
try:
    import triton
    triton_version = triton.__version__
except ImportError:
    triton_version = None
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
print(json.dumps({
    "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": triton_version, "python": platform.python_version(), "commit": commit,
}, indent=1))
PY
cat "$out/environment.json"

part tests 230 "$python" -m pytest -q -p no:cacheprovider --maxfail=30 --tb=short tests/kernels tests/runtime \
    --deselect tests/kernels/test_aot.py
part single_gpu 200 "$python" benchmarks/single_gpu.py --repeats 1 --json "$out/single_gpu.json"
part timeline 60 "$python" benchmarks/single_gpu.py --repeats 1 --max-steps 600 --only "LLS streams" \
    --trace "$out/timeline.json"
tail -n 14 "$out/single_gpu.log"
exit "$status"
