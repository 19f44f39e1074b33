"""One process of a measured pipeline of equal blocks: `torchrun ... -m unlocked.launch.comparison.chain_worker`."""

import json
import os
import sys
from functools import partial

import torch

from unlocked.launch.comparison.memory_study import ChainSettings, chain
from unlocked.rules import get_rule
from unlocked.runtime import Trainer

__all__ = ["main", "stage_list"]


def main(arguments: str) -> None:
    """Trains as JSON says (blocks, stages, steps, rule, settings), and writes images/s and stages to `summary`."""
    given = json.loads(arguments)
    torch.set_num_threads(1)
    s = ChainSettings(**given["settings"])
    generator = torch.Generator().manual_seed(s.seed)
    rows = 8 * s.batch_size
    images = torch.randn(rows, s.channels, s.image_size, s.image_size, generator=generator)
    labels = torch.randint(s.num_classes, (rows,), generator=generator)
    trainer = Trainer(
        chain(given["blocks"], s),
        rule=get_rule(given["rule"], temperature=0.5, label_smoothing=0.0, waveform="cosine"),
        optimizer=partial(torch.optim.Adam, lr=0.01, fused=True),
        engine="processes" if given["stages"] > 1 else "sequential",
        stages=stage_list(given["blocks"], given["stages"]) if given["stages"] > 1 else None,
        seed=s.seed,
        kernels=s.kernels,
        print_freq=1000,
    )
    steps = given["steps"]
    result = trainer.fit((images, labels), epochs=-(-steps // 8), batch_size=s.batch_size, max_steps=steps)
    if os.environ.get("RANK", "0") == "0":
        content = {"images_per_second": result.images_per_second, "stages": result.stages}
        with open(given["summary"], "w", encoding="utf-8") as file:
            json.dump(content, file)


def stage_list(blocks: int, stages: int) -> str:
    """Equal stages of `blocks` blocks; the output layer goes to the last one."""
    each = blocks // stages
    ends = [(s * each, (s + 1) * each - 1 + (s == stages - 1)) for s in range(stages)]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)


if __name__ == "__main__":
    main(sys.argv[1])
