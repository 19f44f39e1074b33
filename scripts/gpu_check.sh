#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: tests, then timings.
#
#   scripts/gpu_check.sh [FOLDER]        # default: benchmarks/results/latest
#
# Needs python3 with torch, triton, pytest and the package's other dependencies (wheels may be put on PYTHONPATH); no
# network. Every step has a time limit and the next one runs whatever happened. FOLDER gets a log and the results as
# JSON. Exit status: 0 all well, 1 a test failed, 2 only a benchmark failed, 3 the machine can't run it.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-"$root/benchmarks/results/latest"}
python=${PYTHON:-python3}
mkdir -p "$folder" || exit 3
folder=$(cd "$folder" && pwd)
cd "$root" || exit 3
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}
export COMMIT
unset TRITON_INTERPRET

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: $python finds no CUDA device (or no torch); run this on a machine with an NVIDIA GPU" >&2
    exit 3
fi
if ! problem=$("$python" -c 'import numpy, triton, pytest, hypothesis, zmq, msgpack, rich, sklearn, unlocked.runtime' 2>&1); then
    echo "gpu_check: ${problem##*$'\n'}; put the missing package's wheel on PYTHONPATH" >&2
    exit 3
fi

log=$folder/gpu_check.log
: >"$log"
names=() states=() times=()
tests_failed=0 benchmarks_failed=0

# step NAME SECONDS COMMAND...: runs with a limit, keeps its output, remembers how it went.
step() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    printf '\n==== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$folder/$name.log" | tail -n 40
    status=${PIPESTATUS[0]}
    cat "$folder/$name.log" >>"$log"
    names+=("$name")
    times+=($((SECONDS - began)))
    case $status in
        0) states+=("ok") ;;
        5) states+=("no tests") ;;
        124 | 137) states+=("out of time") ;;
        *) states+=("failed ($status)") ;;
    esac
    if [[ $status -ne 0 ]]; then
        case $name in
            tests-*) tests_failed=1 ;;
            *) benchmarks_failed=1 ;;
        esac
    fi
}

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n 4)
fi

# 120 + 130 + 150 + 125 = 525 seconds.
step tests-gpu 120 "$python" -m pytest -p no:cacheprovider tests/kernels tests/workers tests/engines tests/runtime -m gpu
step tests-kernels 130 "$python" -m pytest -p no:cacheprovider "${workers[@]}" tests/kernels -m "not gpu"
step kernels 150 "$python" benchmarks/kernels.py --time-limit 120 --json "$folder/kernels.json"
# The whole of it is a command of its own: python benchmarks/single_gpu.py, also under nine minutes.
step single_gpu 125 "$python" benchmarks/single_gpu.py --rounds 1 --time-limit 115 --json "$folder/single_gpu.json" \
    --only "LLS streams" "BP graph" "BP eager" "LLS sequential graph" "LLS streams, traced" "LLS streams bf16"

"$python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

from unlocked.comparison.environment import environment
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

write_json(Path(sys.argv[1]) / "environment.json", to_plain(environment()))
PYTHON

{
    printf '\n==== results in %s\n' "$folder"
    sed -n '/^== summary/,$p' "$folder/kernels.log"
    grep -A 20 '^contender' "$folder/single_gpu.log" || true
    for name in tests-gpu tests-kernels; do
        grep -E '^(FAILED|ERROR)' "$folder/$name.log" | cut -c 1-160 | head -n 12
        printf '%s: %s\n' "$name" "$(tail -n 1 "$folder/$name.log")"
    done
    printf '\n%-16s %-16s %6s\n' step outcome seconds
    for i in "${!names[@]}"; do
        printf '%-16s %-16s %6s\n' "${names[$i]}" "${states[$i]}" "${times[$i]}"
    done
} | tee -a "$log"

if [[ $tests_failed -ne 0 ]]; then exit 1; fi
if [[ $benchmarks_failed -ne 0 ]]; then exit 2; fi
