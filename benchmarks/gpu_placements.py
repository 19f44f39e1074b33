"""Do every rule, every network and every precision give the same bits in streams as one layer after the other?

    python benchmarks/gpu_placements.py --json placements.json          # on a GPU; about five minutes in all
    python benchmarks/gpu_placements.py --what rules --device cpu --only LLS DGL

Rules and optimizers train SmallConv on the digits; networks, by LLS, made-up images of CIFAR-10's size; all with
deterministic kernels of the library. The results are written after every case. Exit status: 0 all equal, 1 a case
failed or differs, or there is none of these names, 2 there is no such device.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unlocked.comparison.environment import environment
from unlocked.data import Dataset, load_dataset
from unlocked.models import MODELS, get_model
from unlocked.rules import LOCAL_RULES, get_rule
from unlocked.runtime import Sequential, Streams, Trainer
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

__all__ = ["Case", "cases", "main"]

_STREAMS = Streams(graph_ticks=4, queue_depth=2)
_ADAM = partial(torch.optim.Adam, lr=2e-3)


@dataclass(frozen=True)
class Case:
    """One run that is made twice."""

    name: str
    model: Callable[[], nn.Module]
    rule: str = "LLS"
    digits: bool = True
    batch_size: int = 64
    streams: Streams = _STREAMS
    options: dict[str, Any] = field(default_factory=dict)


def cases(what: str, device: str) -> Iterator[Case]:
    """`what`: rules, models or options."""
    small = partial(get_model, "SmallConv", in_channels=1, num_classes=10, image_size=8)
    images = {"in_channels": 3, "num_classes": 10, "image_size": 32}
    if what == "rules":
        yield from (Case(rule, small, rule, batch_size=128) for rule in LOCAL_RULES)
        yield Case("BP", small, "BP", batch_size=128, streams=Streams(stages=1))
    elif what == "models":
        yield from (Case(name, partial(get_model, name, **images), digits=False, batch_size=32) for name in MODELS)
    else:
        options: dict[str, dict[str, Any]] = {
            "torch kernels": {"kernels": "torch"},
            "SGD": {"optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)},
            "AdamW": {"optimizer": torch.optim.AdamW},
            "RMSprop": {"optimizer": torch.optim.RMSprop},
            "bf16": {"precision": "bf16"},
            **({"tf32": {"precision": "tf32"}} if device == "cuda" else {}),
        }
        for name, chosen in options.items():
            yield Case(name, small, options=chosen)
            yield Case(f"{name}, ResNet32", partial(get_model, "ResNet32", **images), digits=False, options=chosen)
        yield Case("dropout", partial(small, dropout=0.3))
        for name in ("ViT", "VGG8B"):
            model = partial(get_model, name, **images)
            yield Case(f"bf16, {name}", model, digits=False, batch_size=32, options={"precision": "bf16"})
            yield Case(f"BP, {name}", model, "BP", digits=False, batch_size=32, streams=Streams(stages=1))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("rules", "models", "options")
    parser.add_argument("--what", nargs="*", default=kinds, choices=kinds)
    parser.add_argument("--only", nargs="*", metavar="CASE", help="only cases of these names")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after every case")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_placements: needs a CUDA device; none is there (--device cpu tries the code)", file=sys.stderr)
        return 2
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in one order only with a fixed one
    torch.backends.cudnn.deterministic = True
    report: dict[str, Any] = {"environment": to_plain(environment()), "cases": []}
    data = load_dataset("digits"), load_dataset("synthetic", num_train=260, num_test=64)
    for what in options.what:
        for case in cases(what, options.device):
            if options.only and case.name not in options.only:
                continue
            row = compare(case, data[0] if case.digits else data[1], options.device)
            report["cases"].append({"what": what, **row})
            print(f"{what:<8}{case.name:<24}{row.get('error', row.get('digest', 'DIFFERENT'))[:160]}", flush=True)
            if options.json:
                write_json(options.json, report)
    wrong = [row for row in report["cases"] if "digest" not in row]
    print(f"{len(report['cases'])} cases, {len(wrong)} failed or different")
    return 1 if wrong or not report["cases"] else 0


def compare(case: Case, data: tuple[Dataset, Dataset], device: str) -> dict[str, Any]:
    """`digest` only where both runs have left the same bits and figures."""
    began, found = time.perf_counter(), []
    rule: Any = case.rule
    if rule != "BP":
        rule = get_rule(rule, temperature=0.5, label_smoothing=0.0, waveform="cosine")
    for engine in (Sequential(), case.streams):
        try:
            trainer = Trainer(
                case.model(), rule=rule, engine=engine, seed=0, device=device, **{"optimizer": _ADAM, **case.options}
            )
            rows = case.batch_size
            result = trainer.fit(data[0], epochs=2, batch_size=rows, eval_data=data[1], eval_batch_size=rows)
        except Exception as error:  # the other cases' turn comes all the same
            return {"case": case.name, "error": f"{engine.name}: {type(error).__name__}: {error}"[:600]}
        found.append((result.weights_sha256, result.epochs[-1].train_loss, result.test_acc1))
    row = {"case": case.name, "seconds": round(time.perf_counter() - began, 1), "runs": [list(one) for one in found]}
    return row | ({"digest": found[0][0]} if found[0] == found[1] else {})


if __name__ == "__main__":
    sys.exit(main())
