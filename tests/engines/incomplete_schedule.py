"""A run whose schedule lacks one kind of action, by any engine: python incomplete_schedule.py ENGINE KIND FOLDER."""

import sys
from pathlib import Path

from unlocked.runtime.schedules import schedule

NEEDED = dict(schedule._NEEDED)


def without(kind: str) -> dict[str, tuple]:
    """What each kind of item needs, less the actions of that kind."""
    return {item: tuple(action for action in needed if action != kind) for item, needed in NEEDED.items()}


def run(engine: str, kind: str, folder: Path) -> None:
    from engine_runs import fit, trainer

    schedule._NEEDED.update(without(kind))  # type: ignore[attr-defined]
    try:
        fit(trainer(engine, snapshot_every=2, snapshot_dir=folder))
    finally:
        schedule._NEEDED.update(NEEDED)  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
