"""One process of a measured pipeline of equal blocks: `torchrun ... -m unlocked.comparison.stages.worker`."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

from unlocked.comparison.memory.chain import chain
from unlocked.comparison.memory.results import ChainSettings
from unlocked.rules import get_rule
from unlocked.runtime import Trainer
from unlocked.runtime.engines.processes.engine import Processes
from unlocked.runtime.engines.sequential import Sequential
from unlocked.runtime.result import RunResult
from unlocked.runtime.saving.whole_file import write_json

__all__ = ["main", "stage_list", "train_chain"]


def main(arguments: str) -> None:
    """Trains as JSON says (see `train_chain`), and writes images/s to its `summary`."""
    given = json.loads(arguments)
    summary = given.pop("summary")
    result = train_chain(**{**given, "settings": ChainSettings(**given["settings"])})
    if os.environ.get("RANK", "0") == "0":
        figures = {"images_per_second": result.images_per_second, "stages": result.stages}
        write_json(Path(summary), figures)


def train_chain(*, blocks: int, stages: int, steps: int, rule: str, settings: ChainSettings) -> RunResult:
    """Trains a chain of `blocks` equal blocks, in this process or as this rank of a pipeline of `stages`."""
    torch.set_num_threads(1)
    s = settings
    generator = torch.Generator().manual_seed(s.seed)
    rows = 8 * s.batch_size
    images = torch.randn(rows, s.channels, s.image_size, s.image_size, generator=generator)
    labels = torch.randint(s.num_classes, (rows,), generator=generator)
    trainer = Trainer(
        chain(blocks, s),
        rule=get_rule(rule, temperature=0.5, label_smoothing=0.0, waveform="cosine"),
        optimizer=partial(torch.optim.Adam, lr=0.01, fused=True),
        engine=Processes(stages=stage_list(blocks, stages)) if stages > 1 else Sequential(),
        seed=s.seed,
        kernels=s.kernels,
        print_freq=1000,
        progress=False,
    )
    return trainer.fit((images, labels), epochs=-(-steps // 8), batch_size=s.batch_size, max_steps=steps)


def stage_list(blocks: int, stages: int) -> str:
    """Equal stages of `blocks` blocks; the output layer goes to the last one."""
    each = blocks // stages
    ends = [(s * each, (s + 1) * each - 1 + (s == stages - 1)) for s in range(stages)]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)


if __name__ == "__main__":
    main(sys.argv[1])
