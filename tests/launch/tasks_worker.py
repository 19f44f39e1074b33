"""One rank of the test of every task: trains each as it comes, with a worker that dies, and from a snapshot.

python tasks_worker.py MODULE SNAPSHOTS OUT.jsonl KINDS CASE...

MODULE, of tests/, has `train(CASE, engine, ...)`.

KINDS are some of plain, killed (in training), evaluating (and killed in it) and resumed, by commas. SNAPSHOTS/CASE
holds a snapshot from the middle of an epoch of a plain loop.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unlocked.runtime import Processes
from unlocked.runtime.faults import VARIABLE

FAULTS = {"killed": "kill@1U4", "evaluating": "kill@2E9"}


def main(module: str, snapshots: Path, out: Path, kinds: list[str], names: list[str]) -> None:
    train = importlib.import_module(module).train
    for name in names:
        jobs: dict[str, dict[str, Any]] = {
            "plain": {"engine": Processes(transport="group", queue_depth=2)},
            "killed": {"engine": Processes(transport="shared", queue_depth=2)},
            "evaluating": {"engine": Processes(transport="shared", queue_depth=2)},
            "resumed": {"engine": Processes(transport="shared", queue_depth=2), "resume": snapshots / name},
        }
        for kind in kinds:
            os.environ[VARIABLE] = FAULTS.get(kind, "")
            _, result = train(name, **jobs[kind])
            if os.environ["RANK"] == "0":
                last = result.epochs[-1]
                told = {"case": name, "kind": kind, "sha256": result.weights_sha256, "deaths": len(result.recoveries)}
                told |= {"figures": [last.eval_loss, last.eval_acc1, last.eval_figures, last.local_losses]}
                with out.open("a") as file:
                    file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(","), sys.argv[5:])
