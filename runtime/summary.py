"""What `--summary` writes of a run."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from unlocked.runtime.result import RunResult

__all__ = ["summary_of"]


def summary_of(settings: Mapping[str, Any], result: RunResult) -> dict[str, Any]:
    """A run's settings and figures, as JSON values. Of a resumed run, `epochs` and `steps` are the whole run's; the
    seconds, the speed and `epoch_results` are those of the part after `first_step` training micro-batches.

    Args:
        settings: of the recipe, by name.
    """
    return {
        **{name: settings[name] for name in _TOLD},
        **{name: getattr(result, name) for name in _FIGURES},
        **({"test_figures": result.test_figures} if result.test_figures else {}),
        "links": [None if link is None else asdict(link) for link in result.links],
        "recoveries": [asdict(recovery) for recovery in result.recoveries],
        "torch": torch.__version__,
        "epochs": result.epochs_done,
        "epoch_results": [
            {
                "epoch": e.epoch,
                "train_loss": e.train_loss,
                "train_acc1": e.train_acc1,
                "test_loss": e.eval_loss,
                "test_acc1": e.eval_acc1,
                "layer_acc1": dict(e.layer_acc1),
                **({"test_figures": dict(e.eval_figures)} if e.eval_figures else {}),
            }
            for e in result.epochs
        ],
    }


_FIGURES = (
    *("engine", "stages", "threads", "steps", "first_step", "train_seconds", "setup_seconds", "images_per_second"),
    "predicted_images_per_second",
    *("test_acc1", "test_loss", "local_losses", "layer_acc1", "weights_sha256", "peak_memory_bytes", "busy_fraction"),
    *("predicted_stage_seconds", "measured_stage_seconds", "stopped_by", "stop_reason"),
)
_TOLD = ("model", "training_mode", "dataset", "batch_size", "drop_last", "seed", "device", "precision", "deterministic")
