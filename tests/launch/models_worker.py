"""One rank that trains every model by three rules, a few steps each, or by one of them, and writes what came out.

python models_worker.py ENGINE OUT.jsonl
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unlocked.models import MODELS, get_model, model_options
from unlocked.rules import LLS, LLS_MxM, LocalLosses
from unlocked.runtime import Trainer

RULES = {"LLS": LLS(), "LLS_MxM": LLS_MxM(), "LocalLosses": LocalLosses()}
SIZE, CLASSES = 16, 5
# VGG11's first linear block would have 134 million weights of repeated values; the others are small as well so.
OPTIONS: dict[str, dict[str, Any]] = {
    "VGG11": {"upsample": False},
    "MLP": {"width": 64},
    "ResNet18": {"local_module_num": 3},
    "ResNet32": {"local_module_num": 4},
    "ResNet110": {"local_module_num": 8},
    "ViT": {"depth": 2},
    "MLPMixer": {"depth": 2},
}


def rules_for(model: str) -> dict[str, Any]:
    """All three for the networks that the project began with, whose layers have fused kernels; else one."""
    return RULES if "upsample" in model_options(model) else {"LLS": RULES["LLS"]}


def main(engine: str, out: Path, models: Sequence[str] = tuple(MODELS)) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, SIZE, SIZE, generator=generator)
    data = images, torch.arange(10) % CLASSES  # with micro-batches of 4 the last one is partial
    for model in models:
        for name, rule in rules_for(model).items():
            blocks = get_model(model, num_classes=CLASSES, image_size=SIZE, **OPTIONS.get(model, {}))
            optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
            trainer = Trainer(blocks, rule=rule, optimizer=optimizer, engine=engine, seed=5)
            result = trainer.fit(data, epochs=1, batch_size=4, eval_data=data)
            if os.environ.get("RANK", "0") == "0":
                line = {"model": model, "rule": name, "sha256": result.weights_sha256, "loss": result.test_loss}
                with out.open("a") as file:
                    file.write(json.dumps({**line, "stages": len(result.stages)}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
