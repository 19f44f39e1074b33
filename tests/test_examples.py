"""The examples run as they stand, and learn."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_rule_of_ones_own_learns() -> None:
    command = [sys.executable, str(EXAMPLES / "prediction_similarity.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    accuracy = float(last.split("test accuracy ")[1].split(" %")[0])
    assert accuracy > 90, done.stdout
