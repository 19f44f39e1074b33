"""Does it run on this device, and is it exact: one short training by every engine, and the digests of their weights.

    python benchmarks/gpu_exact.py --json gpu_exact.json
    python benchmarks/gpu_exact.py --device cpu --max-steps 6     # the same code without a GPU
    python benchmarks/gpu_exact.py --device stand-in --max-steps 9   # and the engine's device side

SmallConv on the digits by LLS, in float32, with deterministic library kernels. All runs of one kernel backend must end
with the same weights, bit for bit, whatever the engine; a backend that can't run is told and left out. Exit status: 0
all equal, 1 a run failed or a digest differs, 2 there is no such device. The results are written after every run.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from on_stand_in import STAND_IN, on_stand_in

from unlocked.comparison.environment import environment
from unlocked.data import load_dataset
from unlocked.models import get_model
from unlocked.rules import get_rule
from unlocked.runtime import Sequential, Streams, Trainer
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

__all__ = ["ENGINES", "main"]

ENGINES = {
    "sequential": Sequential(),
    "streams, no graphs": Streams(graphs=False),
    "streams, one graph": Streams(stages=1),
    "streams, a graph per stage": Streams(graph_ticks=0),
    "streams, graphs of 4 ticks": Streams(graph_ticks=4),
    "streams, graphs of 32 ticks": Streams(graph_ticks=32),
    "streams, 2 stages, queue depth 1": Streams(stages=2, queue_depth=1),
}
# The first of a device is the truth for the others' losses, to within rounding.
BACKENDS = {"cuda": ("torch", "triton", "triton_joined", "cuda"), "cpu": ("torch", "cpp"), STAND_IN: ("torch",)}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_exact: needs a CUDA device; none is there (--device cpu tries the code)", file=sys.stderr)
        return 2
    # cuBLAS sums in one order only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    report: dict[str, Any] = {"environment": to_plain(environment()), "options": {}, "runs": []}
    report["options"] = {name: str(value) for name, value in vars(options).items()}
    print(f"{environment().line}\n{'kernels':<9}{'engine':<34}{'s':>7}{'set-up s':>10}{'loss':>10}  digest", flush=True)
    with on_stand_in() if options.device == STAND_IN else nullcontext({}) as given:
        for row in rows(options, given):
            report["runs"].append(row)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                write_json(options.json, report)
    wrong = differences(report["runs"])
    print("\n".join(wrong) or "all engines left equal bits")
    return 1 if wrong else 0


def rows(options: argparse.Namespace, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One run after the other, printed as they end; `given`: the trainer's options instead of the usual ones."""
    train, test = load_dataset("digits")
    for kernels in options.kernels or BACKENDS[options.device]:
        for name, engine in ENGINES.items():
            row: dict[str, Any] = {"kernels": kernels, "engine": name}
            began = time.perf_counter()
            try:
                usual = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "device": options.device, "kernels": kernels}
                trainer = Trainer(
                    get_model("SmallConv", in_channels=1, num_classes=10, image_size=8),
                    rule=get_rule("LLS", temperature=0.5, label_smoothing=0.0, waveform="cosine"),
                    engine=engine,
                    seed=0,
                    **{**usual, **given},
                )
                result = trainer.fit(
                    train, epochs=options.epochs, batch_size=64, eval_data=test, max_steps=options.max_steps
                )
                row |= {
                    "digest": result.weights_sha256,
                    "train_loss": result.epochs[-1].train_loss,
                    "test_acc1": result.test_acc1,
                    "seconds": result.train_seconds,
                    "setup_seconds": result.setup_seconds,
                }
                shown = f"{row['seconds']:>7.2f}{row['setup_seconds']:>10.1f}{row['train_loss']:>10.5f}"
                print(f"{kernels:<9}{name:<34}{shown}  {row['digest'][:12]}", flush=True)
            except Exception as error:  # the other engines' turn comes all the same
                row |= {"error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-3000:]}
                row["seconds"] = time.perf_counter() - began
                print(f"{kernels:<9}{name:<34}  {row['error'][:160]}", flush=True)
            yield row
            if "error" in row and engine == next(iter(ENGINES.values())):
                break  # a backend that can't run the plain loop


def differences(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong, a line each: runs that failed, and digests other than that of the backend's first run."""
    found, first = [], {}
    for row in runs:
        name = f"{row['kernels']}, {row['engine']}"
        if "error" in row:
            found.append(f"FAILED {name}: {row['error'][:200]}")
            continue
        expected = first.setdefault(row["kernels"], row)
        if row["digest"] != expected["digest"]:
            found.append(
                f"DIFFERENT {name}: {row['digest'][:12]}, but {expected['engine']} has {expected['digest'][:12]} "
                f"(losses {row['train_loss']!r} and {expected['train_loss']!r})"
            )
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=tuple(BACKENDS))
    parser.add_argument("--kernels", nargs="*", metavar="NAME", help="only these kernel backends")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after every run")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
