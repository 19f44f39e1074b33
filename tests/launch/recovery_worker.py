"""One rank that trains the same small network again and again, each time with other faults; rank 0 writes what comes.

python recovery_worker.py JOBS.json OUT.json

A job has `engine`, `faults`, `transport`, `how` (one of `VARIANTS`) and `saves`: "rare" where a stage saves itself only
when its log is half full, "always" where it does after every item; `loses`: the stage whose first worker's report of an
epoch gets lost. `built` in the output says which workers
(processes) have built each layer: one per layer where nobody died.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import schedulefree
import torch

from unlocked.data import load_dataset
from unlocked.models import small_conv
from unlocked.rules import DRTP, LLS, InfoPro, LayerInfo, LocalRule, TaskAndConsistency
from unlocked.runtime import Processes, ReduceLROnPlateau, Sequential, Trainer
from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.mailbox import Mailbox
from unlocked.runtime.control.messages import Epoch
from unlocked.runtime.engines.processes import memory_saver
from unlocked.runtime.engines.processes.memory_saver import MemorySaver
from unlocked.runtime.faults import VARIABLE
from unlocked.workers.actions import Item

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plateau": {
        "optimizer": partial(schedulefree.AdamWScheduleFree, lr=1e-2),
        "lr_factor": ReduceLROnPlateau(factor=0.5, patience=0, threshold=0.5),
    },
    "best": {"best_dir": True},
    "impatient": {"timeout": 6.0},
    "side channel": {},
    "side channel of the input": {},
}
RULES = {"plateau": DRTP, "side channel": TaskAndConsistency, "side channel of the input": InfoPro}
ROWS, EPOCHS = 100, 2


@dataclass(frozen=True)
class Witness:
    """Builds a rule and notes in which process."""

    rule: Any
    file: str

    def __call__(self, layer: LayerInfo) -> LocalRule:
        with open(self.file, "a") as file:
            file.write(f"{layer.name} {os.getpid()}\n")
        built: LocalRule = self.rule(layer)
        return built

    def __repr__(self) -> str:
        return repr(self.rule)


@contextmanager
def lost_report(stage: int) -> Iterator[None]:
    """What the stage's first worker says of epoch 0 comes nowhere, as where its connection is cut. It saves itself
    behind that, and dies."""
    epoch, put, after = CoordinatorClient.epoch, Mailbox.put, MemorySaver.after
    losing = False  # set in the worker alone

    def lose(client: CoordinatorClient, part: Any) -> None:
        nonlocal losing
        losing = client.stage == stage and client._incarnation == 0
        epoch(client, part)

    def drop(mailbox: Mailbox, item: Any) -> None:
        if not (losing and isinstance(item, Epoch)):
            put(mailbox, item)

    def die(saver: MemorySaver, item: Item) -> None:
        after(saver, item)
        if losing and saver._settle(True):
            saver.save(item.position + 1)
            os.kill(os.getpid(), signal.SIGKILL)

    with (
        patch.object(CoordinatorClient, "epoch", lose),
        patch.object(Mailbox, "put", drop),
        patch.object(MemorySaver, "after", die),
    ):
        yield


def train(
    engine: str, faults: str, transport: str, how: str, saves: str, folder: Path, loses: str = ""
) -> dict[str, Any]:
    """One run: digest, figures, recoveries, and who has built which layer."""
    os.environ[VARIABLE] = faults
    memory_saver._SHORTEST, memory_saver._SHARE = {"rare": (1e6, 1.0), "always": (0.0, 1e9)}[saves]
    train_data, test_data = ((data.images[:ROWS], data.labels[:ROWS]) for data in load_dataset("digits"))
    variant = dict(VARIANTS[how])
    if variant.get("best_dir"):
        variant["best_dir"] = folder / "best"
    rule = RULES.get(how, LLS(temperature=0.5))
    options: dict[str, Any] = {
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        "snapshot_every": 3,
        "snapshot_dir": folder / "snapshots",
        "statistics_batches": 2,
        "print_freq": 2,
        **variant,
    }
    made = Sequential() if engine == "sequential" else Processes(transport=transport, queue_depth=2)
    network = small_conv(in_channels=1, num_classes=10, image_size=8, dropout=0.1)
    trainer = Trainer(network, rule=Witness(rule, str(folder / "built")), engine=made, seed=3, threads=1, **options)
    with lost_report(int(loses)) if loses else nullcontext():
        result = trainer.fit(train_data, epochs=EPOCHS, batch_size=25, eval_data=test_data, eval_batch_size=40)
    return {
        "faults": faults,
        "sha256": result.weights_sha256,
        "epochs": [{k: v for k, v in asdict(e).items() if k != "seconds"} for e in result.epochs],
        "recoveries": [asdict(r) for r in result.recoveries],
        "stages": result.stages,
        "best": sorted(path.name for path in (folder / "best").glob("*")),
        "snapshots": sorted(path.parent.name for path in (folder / "snapshots").glob("*/manifest.json")),
    }


def main(jobs: Path, out: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "-1"))
    for number, job in enumerate(json.loads(jobs.read_text())):
        folder = out.parent / f"run-{number}"
        folder.mkdir(exist_ok=True)
        (folder / f"supervisor-{os.getpid()}").touch()
        line = train(**job, folder=folder)
        if rank <= 0:
            built = [one.split() for one in (folder / "built").read_text().splitlines()]
            # Rules are also built where they are looked at before the run, and where costs are measured.
            others = {path.name.removeprefix("supervisor-") for path in folder.glob("supervisor-*")}
            line["built"] = [[layer, int(pid)] for layer, pid in built if pid not in others]
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
