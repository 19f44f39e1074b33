"""From kept cells to rows: what there is, read again; means, and which differences are more than chance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any

from unlocked.comparison.cells import read_cell
from unlocked.comparison.leaderboard.options import Key, LeaderboardOptions
from unlocked.comparison.leaderboard.results import Measures, Row, Timing, Training, best_first
from unlocked.comparison.significance import holm, welch
from unlocked.runtime.typed import from_plain

__all__ = ["REFERENCE", "Board", "Difference", "Table", "read_board"]

REFERENCE = "BP"
"""The rule that all others are tested against."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two rules of one table."""

    better: str
    worse: str
    points: float
    """Of mean accuracy."""
    p: float
    """Welch's; NaN where nothing is known of chance."""
    corrected: float
    """By Holm, for all pairs of the table."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rules on one network and dataset, the best first."""

    dataset: str
    network: str
    rows: tuple[Row, ...]
    settings: dict[str, Any]

    @property
    def trained(self) -> list[Row]:
        return [row for row in self.rows if row.trainings]

    @property
    def reference(self) -> Row | None:
        """Backpropagation's row, if it has been trained."""
        return next((row for row in self.trained if row.rule == REFERENCE), None)

    def differences(self) -> list[Difference]:
        """Of all pairs, the better one first."""
        pairs = list(combinations(self.trained, 2))  # in order: the first of a pair is not worse
        values = [welch(a.accuracies, b.accuracies) for a, b in pairs]
        return [
            Difference(better=a.rule, worse=b.rule, points=(a.mean or 0) - (b.mean or 0), p=p, corrected=corrected)
            for (a, b), p, corrected in zip(pairs, values, holm(values), strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Board:
    """Everything that a leaderboard's folder holds of what was asked for."""

    tables: tuple[Table, ...]
    missing: int
    """Cells that are not there yet."""
    machines: tuple[str, ...]
    """Processors, software and commits that the cells were made with."""


def read_board(options: LeaderboardOptions) -> Board:
    """
    Raises:
        ValueError: a cell was made with other settings, or is damaged; names the file.
    """
    cells = list(_cells(options))
    measures = [_kept(options, key, "measures") for key in options.keys]
    rows = [_row(options, key) for key in options.keys]
    tables = []
    for (dataset, network), group in groupby(rows, key=lambda row: (row.dataset, row.network)):
        settings = options.settings_of(Key(dataset, network, REFERENCE))
        tables.append(Table(dataset=dataset, network=network, rows=_tested(list(group)), settings=settings))
    return Board(
        tables=tuple(tables),
        missing=sum(cell is None for cell in cells),
        machines=tuple(dict.fromkeys(_machine(cell) for cell in (*cells, *measures) if cell is not None)),
    )


def _cells(options: LeaderboardOptions) -> Iterator[dict[str, Any] | None]:
    for key, seed in options.cells():
        yield _kept(options, key, seed)


def _kept(options: LeaderboardOptions, key: Key, part: int | str) -> dict[str, Any] | None:
    return read_cell(options.path_of(key, part), options.settings_of(key), remedy="--output")


def _row(options: LeaderboardOptions, key: Key) -> Row:
    trainings, failures = [], []
    for seed in options.seeds:
        path = options.path_of(key, seed)
        cell = _kept(options, key, seed)
        if cell is None:
            continue
        if "failed" in cell:
            failures.append(f"seed {seed}: {cell['failed']}")
        else:
            trainings.append(from_plain(Training, cell.get("training"), str(path)))
    path = options.path_of(key, "measures")
    cell = _kept(options, key, "measures") or {}
    return Row(
        rule=key.rule,
        network=key.network,
        dataset=key.dataset,
        trainings=tuple(trainings),
        failures=tuple(failures),
        measures=from_plain(Measures, cell["measures"], str(path)) if "measures" in cell else None,
        timing=from_plain(Timing, cell["timing"], str(path)) if {"measures", "timing"} <= cell.keys() else None,
        measures_failed=cell.get("failed"),
    )


def _tested(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The best first, each tested against backpropagation."""
    reference = next((row for row in rows if row.rule == REFERENCE and row.trainings), None)
    if reference is None:
        return tuple(best_first(rows))
    others = [row for row in rows if row is not reference and row.trainings]
    corrected = holm([welch(row.accuracies, reference.accuracies) for row in others])
    found = dict(zip((row.rule for row in others), corrected, strict=True))
    return tuple(best_first([replace(row, p=found.get(row.rule, row.p)) for row in rows]))


def _machine(cell: dict[str, Any]) -> str:
    versions = cell.get("versions") or {}
    told = [str(cell.get("machine")), *(f"{name} {versions[name]}" for name in ("torch", "numpy") if name in versions)]
    return ", ".join([*told, f"commit {cell['commit']}"] if cell.get("commit") else told)
