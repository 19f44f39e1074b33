"""Scores saved weights: `python -m unlocked.launch.evaluate RUN/model_final.pt`.

What the run was told is read from the `config.json` that lies beside its weights; flags say otherwise, or what is
missing.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlocked.runtime.saving.whole_file import write_whole
from unlocked.runtime.settings import LineParser

__all__ = ["main", "score"]

# What of a run's settings its weights, and their scores, depend on.
_TOLD = (
    *("model", "dataset", "dataset_dir", "image_size", "training_mode", "test_batch_size", "dropout"),
    "precision",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints loss and accuracies. A mistake ends in one line on standard error and exit code 2."""
    try:
        options = vars(_parser().parse_args(arguments))
        figures = score(options)
        if options["summary"] is not None:
            write_whole(options["summary"], json.dumps(figures, indent=1))
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2
    print(
        f"test accuracy {figures['test_acc1']:.2f} %, among the first five {figures['test_acc5']:.2f} %, "
        f"loss {figures['test_loss']:.4f} on {figures['images']} images of {figures['dataset']}"
    )
    return 0


def score(options: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the weights at `options["weights"]`, as JSON values.

    Raises:
        ValueError: no such weights, or they don't fit model and data.
    """
    from unlocked.runtime.recipe import Recipe, make_model
    from unlocked.runtime.saving.scoring import load_weights, score_snapshot, score_weights
    from unlocked.runtime.saving.snapshots import find_snapshot

    path: Path = options["weights"]
    given = {key: options[key] for key in (*_TOLD, "device") if options.get(key) is not None}
    recipe = Recipe(**{**_config(path), **given})
    weights = snapshot = None
    if path.is_dir():
        snapshot = find_snapshot(path / "snapshots" if (path / "snapshots").is_dir() else path)
    else:
        weights = load_weights(path)
    train, test = recipe.load_data()
    model = make_model(recipe, train)
    how: dict[str, Any] = {"batch_size": recipe.test_batch_size, "device": recipe.device}
    if snapshot is not None:
        scores = score_snapshot(model, snapshot, train, test, **how)
    else:
        assert weights is not None
        scores = score_weights(model, weights, test, precision=recipe.precision, **how)
    return {
        "weights": str(path if snapshot is None else snapshot.folder),
        "model": recipe.model,
        "dataset": recipe.dataset,
        "images": len(test),
        "test_loss": scores.loss,
        "test_acc1": scores.acc1,
        "test_acc5": scores.acc5,
    }


def _parser() -> LineParser:
    parser = LineParser(
        prog="unlocked evaluate",
        description="Scores saved weights on the test data.",
        epilog="Model, data and batch size are the run's own, from the config.json beside its weights, unless given.",
    )
    add = parser.add_argument
    add("weights", type=_path, help="a model_final.pt, a model_best.pt, a snapshot, or a folder of snapshots")
    add("--model", help="with or without the prefix LLS_ or DFA_")
    add("--training-mode", help="the run's; decides the activation function of DRTP's networks")
    add("--dataset")
    add("--dataset-dir", type=_path)
    add("--image-size", type=int, help="side in pixels that the run scaled the images of a folder to")
    add("--test-batch-size", type=int)
    add("--device", default="cpu", help="cpu, cuda or cuda:INDEX")
    add("--summary", type=_path, help="write the figures here, as JSON")
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _config(path: Path) -> dict[str, Any]:
    """The settings of the run that wrote `path`: the nearest config.json above it, if there is one."""
    for folder in (path, *path.absolute().parents[:3]):
        file = folder / "config.json"
        if not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text())["settings"]
            return {key: settings[key] for key in _TOLD if settings.get(key) is not None}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a run's config.json, or is damaged: {error}") from error
    return {}


if __name__ == "__main__":
    sys.exit(main())
