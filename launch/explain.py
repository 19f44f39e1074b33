"""Says what becomes of every layer: `unlocked explain FLAGS`, with the flags of `unlocked train`."""

import sys
from collections.abc import Sequence

from unlocked.launch.command_line import make_parser as make_training_parser
from unlocked.launch.command_line import parse
from unlocked.launch.output import lasting_output
from unlocked.runtime.fields import LineParser
from unlocked.runtime.saving.whole_file import write_json

__all__ = ["main", "make_parser"]


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line per layer and a line per call of its step. A mistake ends in one line on standard error and exit
    code 2."""
    try:
        recipe = parse(arguments, default_engine="sequential", parser=make_parser())
        train, _ = recipe.load_data()
        explanation = recipe.trainer(train).explain(train, batch_size=recipe.batch_size)
        if recipe.summary is not None:
            recipe.summary.parent.mkdir(parents=True, exist_ok=True)
            write_json(recipe.summary, explanation.as_json())
    except (ValueError, OSError, RuntimeError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2
    print(explanation)
    return 0


def make_parser() -> LineParser:
    """All flags of the command: those of `unlocked train`."""
    parser = make_training_parser()
    parser.prog, parser.usage = "unlocked explain", "unlocked explain [FLAGS]"
    parser.description = "Says which operations of each layer run in closed form, joined, or through autograd, and why."
    parser.epilog = "--summary FILE writes the same as JSON. What only concerns a run's course changes nothing here."
    return parser


if __name__ == "__main__":
    sys.exit(main())
