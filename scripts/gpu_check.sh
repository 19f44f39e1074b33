#!/usr/bin/env bash
# Everything that needs a GPU, in three calls of under 280 seconds each: does it run, how fast is each part, the rest.
#
#   scripts/gpu_check.sh 1|2|3 [FOLDER]      # FOLDER: default $OUT, else benchmarks/results/latest
#
# Needs python3 with torch, triton, pytest and the package's other dependencies (wheels may be put on PYTHONPATH); no
# network. scripts/gpu_steps.py says what each call does, and how. Exit status: 0 all well, 1 a step that checks
# failed, 2 only one that measures did, 3 the machine can't run it, 130 it was interrupted.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 3
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/gpu_steps.py "$@"
