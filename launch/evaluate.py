"""Scores saved weights: `python -m unlocked.launch.evaluate RUN/model_final.pt`.

What the run was told is read from the `config.json` that lies beside its weights; flags say otherwise, or what is
missing.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlocked.launch.output import lasting_output
from unlocked.models.errors import first_line
from unlocked.runtime.fields import LineParser, add_flags, setting_names
from unlocked.runtime.job import check_device
from unlocked.runtime.model_options import ModelOptions
from unlocked.runtime.paths import checked_path
from unlocked.runtime.recipe import Recipe, make_model
from unlocked.runtime.saving.scoring import load_weights, score_snapshot, score_weights
from unlocked.runtime.saving.snapshots import find_snapshot
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.text_options import TextOptions

__all__ = ["main", "make_parser", "score"]

_TOLD = (
    *("model", "pool", "dataset", "dataset_dir", "image_size", "training_mode", "test_batch_size", "dropout"),
    *("precision", "classes_per_batch"),
    *sorted(setting_names(TextOptions)),
    *sorted(setting_names(ModelOptions)),
)
"""What of a run's settings its weights, and their scores, depend on."""
_FLAGS = (
    "model",
    "pool",
    "training_mode",
    "dataset",
    "dataset_dir",
    "image_size",
    *sorted(setting_names(TextOptions)),
    "test_batch_size",
    "device",
    "summary",
)
_UNREAD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)
"""What a file that is not the run's can raise once it has been read, beside a ValueError."""


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints loss and accuracies. A mistake ends in one line on standard error and exit code 2."""
    try:
        given = vars(make_parser().parse_args(arguments))
        path = checked_path("weights", given.pop("weights"), "")
        figures = score(path, given)
        if (summary := Recipe(**given).summary) is not None:
            summary.parent.mkdir(parents=True, exist_ok=True)
            write_json(summary, figures)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2
    told = [f"test accuracy {figures['test_acc1']:.2f} %"] if figures["test_acc1"] is not None else []
    told += [f"among the first five {figures['test_acc5']:.2f} %"] if figures["test_acc5"] is not None else []
    told += [f"loss {figures['test_loss']:.4f}", *(f"{name} {value:.4g}" for name, value in figures["figures"].items())]
    kind = "images" if figures["test_acc5"] is not None else "samples"
    print(f"{', '.join(told)} on {figures['images']} {kind} of {figures['dataset']}")
    return 0


def score(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the weights at `path`, as JSON values.

    Args:
        given: settings of a `Recipe` that go before the run's own, from the config.json beside its weights.

    Raises:
        ValueError: no such weights, or they don't fit model and data.
    """
    recipe = Recipe(**_config(path) | dict(given))
    check_device(recipe.device)
    weights = snapshot = None
    if path.is_dir():
        snapshot = find_snapshot(path / "snapshots" if (path / "snapshots").is_dir() else path)
    else:
        weights = load_weights(path)
    _check_rule(recipe.training_mode, is_snapshot=snapshot is not None)
    train, test = recipe.load_data()
    model = make_model(recipe, train)
    how: dict[str, Any] = {"batch_size": recipe.test_batch_size, "device": recipe.device}
    try:
        if snapshot is not None:
            scores = score_snapshot(model, snapshot, train, test, **how)
        else:
            assert weights is not None
            scores = score_weights(model, weights, test, precision=recipe.precision, **how)
    except _UNREAD as error:
        raise ValueError(
            f"{path} can't be scored as {recipe.model} on {recipe.dataset}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return {
        "weights": str(path if snapshot is None else snapshot.folder),
        "model": recipe.model,
        "dataset": recipe.dataset,
        "images": len(test),
        "test_loss": scores.loss,
        "test_acc1": scores.acc1,
        "test_acc5": scores.acc5,
        "figures": dict(scores.figures),
    }


def _check_rule(name: str, *, is_snapshot: bool) -> None:
    """Raises: ValueError: the run's figures were not those of the output layer on the data as it is."""
    if name == "ForwardForward":
        raise ValueError(
            "the prediction of ForwardForward is made of all layers' scores on labels laid over the data, which "
            "weights alone don't give; the run's log and summary have its figures"
        )
    if name == "BarlowTwins" and is_snapshot:
        raise ValueError(
            "BatchNorm's statistics of a BarlowTwins run belong to its two views, which are not made here; score its "
            "final or best weights"
        )


def make_parser() -> LineParser:
    """All flags of the command."""
    parser = LineParser(
        prog="unlocked evaluate",
        description="Scores saved weights on the test data.",
        epilog="Model, data and batch size are the run's own, from the config.json beside its weights, unless given.",
    )
    parser.add_argument(
        "weights", metavar="FILE", help="model_final.pt, model_best.pt, a snapshot, or a folder of such"
    )
    add_flags(parser.add_argument_group("the run's own unless given, but for the device"), Recipe, _FLAGS)
    add_flags(parser.add_argument_group("the model's options, likewise"), ModelOptions)
    return parser


def _config(path: Path) -> dict[str, Any]:
    """The settings of the run that wrote `path`: the nearest config.json above it, if there is one.

    Raises:
        ValueError: it is no run's, or a setting in it is not valid; names the file.
    """
    for folder in (path, *path.absolute().parents[:3]):
        file = folder / "config.json"
        if not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
            told = {key: settings[key] for key in _TOLD if settings.get(key) is not None}
            Recipe(**told)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} is not a run's config.json, or is damaged: {error}") from error
        return told
    return {}


if __name__ == "__main__":
    sys.exit(main())
