"""One rank of the test of every rule: trains a small network by each, one after the other.

python rules_worker.py OUT.jsonl RULE...
"""

import json
import os
import sys
from pathlib import Path

from unlocked.rules import get_rule
from unlocked.runtime.conformance import train_small


def main(out: Path, names: list[str]) -> None:
    for name in names:
        rule = get_rule(name, temperature=0.5, label_smoothing=0.0, waveform="cosine")
        result = train_small(rule, "processes")
        if os.environ["RANK"] == "0":
            with out.open("a") as file:
                epochs = [[e.eval_acc1, e.local_losses, e.layer_acc1] for e in result.epochs]
                file.write(json.dumps({"rule": name, "sha256": result.weights_sha256, "epochs": epochs}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
