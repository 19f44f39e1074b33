"""How much of a text a run reads, as settings; and that a network which reads text gets some."""

from dataclasses import dataclass

from unlocked.data import ImageDataset
from unlocked.models import LANGUAGE_MODELS, MODELS
from unlocked.runtime.fields import LARGEST, setting

__all__ = ["TextOptions", "check_reader"]

_LONGEST = 1 << 20  # tokens


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """For `stdlib` and `text`, the two numbers for `synthetic` as well; `load_dataset` refuses them elsewhere."""

    sequence_length: int | None = setting(
        None, "of --dataset stdlib and text: tokens of a sample (256)", at_least=1, at_most=_LONGEST
    )
    num_train: int | None = setting(
        None,
        "of --dataset stdlib, text and synthetic: training samples, spread evenly over a text (unless given: all)",
        at_least=1,
        at_most=LARGEST,
    )
    num_test: int | None = setting(
        None, "of --dataset stdlib, text and synthetic: test samples, likewise", at_least=1, at_most=LARGEST
    )


def check_reader(model: str, dataset: str, data: ImageDataset) -> None:
    """Raises: ValueError: the network called `model` does not read what the data is: text, or images."""
    is_text = bool(data.num_tokens)
    if is_text != (model.removeprefix("LLS_") in LANGUAGE_MODELS):
        fitting = LANGUAGE_MODELS if is_text else MODELS
        kind = "text" if is_text else "images"
        raise ValueError(
            f"--dataset {dataset} is {kind}, which --model {model} does not read; valid: {', '.join(fitting)}"
        )
