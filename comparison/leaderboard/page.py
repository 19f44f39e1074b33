"""The leaderboard as a page and as tables for spreadsheets."""

import math
from collections.abc import Iterable
from pathlib import Path

from unlocked.comparison.leaderboard.board import REFERENCE, Board, Table
from unlocked.comparison.leaderboard.charts import accuracy_chart, speed_chart
from unlocked.comparison.leaderboard.options import LeaderboardOptions
from unlocked.comparison.leaderboard.results import Inspection, Row
from unlocked.comparison.report.export import write_rows
from unlocked.comparison.report.layers import LayerAccuracies, layers_charts
from unlocked.comparison.report.sections import Headline, Section, render
from unlocked.comparison.report.sections import Table as PageTable
from unlocked.comparison.significance import LEVEL
from unlocked.runtime.saving.whole_file import write_whole

__all__ = ["summary_line", "write_page", "write_tables"]

_NONE = "-"
_MOST_NAMED = 4  # layers that are not local


def write_page(board: Board, options: LeaderboardOptions, path: Path) -> None:
    """One page, with nothing to fetch. Raises: ValueError where what draws it is not installed."""
    sections = [
        section
        for number, table in enumerate(board.tables)
        for section in _sections(table, f"table{number + 1}", len(options.seeds))
    ]
    sections.append(_conditions(board, options))
    headline = Headline(
        sentence=" ".join(summary_line(table) for table in board.tables),
        conditions=_budget(options),
    )
    write_whole(path, render("Leaderboard of learning rules", headline, sections))


def write_tables(board: Board, folder: Path) -> list[Path]:
    """leaderboard.csv, a row per rule, network and dataset; differences.csv, a row per pair of rules. Their paths."""
    rows = [_csv_row(row) for table in board.tables for row in table.rows]
    pairs = [
        {
            "dataset": table.dataset,
            "network": table.network,
            "better": pair.better,
            "worse": pair.worse,
            "points": pair.points,
            "welch_p": pair.p,
            "holm_p": pair.corrected,
        }
        for table in board.tables
        for pair in table.differences()
    ]
    paths = [folder / "leaderboard.csv", folder / "differences.csv"]
    for path, content in zip(paths, (rows, pairs), strict=True):
        write_rows(path, content)
    return paths


def summary_line(table: Table) -> str:
    """Who is ahead, in one sentence."""
    local = [row for row in table.trained if row.rule != REFERENCE and _is_local(row)]
    where = f"{table.network} on {table.dataset}"
    if not local:
        return f"{where}: nothing local has been trained yet."
    whole = [row for row in local if not row.failures]  # the mean of those that did not fail flatters a rule
    best, reference = (whole or local)[0], table.reference
    told = f"{where}: the best local rule is {best.rule} with {best.mean:.2f} %"
    if best.failures:
        told += f" ({best.seeds_told} seeds; the others failed)"
    if reference is None:
        return f"{told}."
    points = (reference.mean or 0) - (best.mean or 0)
    if abs(points) < 0.005:
        return f"{told}, level with backpropagation."
    side = "behind" if points > 0 else "ahead of"
    chance = "" if math.isnan(best.p) else f" (p = {best.p:.2g}{'' if best.p < LEVEL else ', no sure difference'})"
    return f"{told}, {abs(points):.2f} points {side} backpropagation{chance}."


def _sections(table: Table, key: str, seeds: int) -> list[Section]:
    joules = any(row.measures is not None and row.measures.joules_per_image is not None for row in table.rows)
    head = ["rule", "accuracy, %", "deviation (n)", f"to {REFERENCE}", "p (Holm)", "local", "digest"]
    learned = PageTable(
        caption="All rules, the most accurate first",
        head=head,
        rows=[_learned(row, table.reference) for row in table.rows],
        words=(5,),
    )
    head = ["rule", "seconds", "images/s", "as a pipeline", "same bits", "activations, MiB", "edges, KiB/image"]
    costs = PageTable(
        caption="What it costs",
        head=[*head, *["J/1,000 images"] * joules],
        rows=[_costs(row, joules) for row in table.rows],
    )
    tables = [learned, costs]
    if failed := [[row.rule, text] for row in table.rows for text in _problems(row)]:
        caption = "What failed or could not be found out"
        tables.append(PageTable(caption=caption, head=["rule", "why"], rows=failed, words=(1,)))
    differences = table.differences()
    differ = sum(pair.corrected < LEVEL for pair in differences)
    told = f"{differ} of {len(differences)} pairs of rules differ at a corrected p below {LEVEL} (Holm)."
    if seeds == 1:
        told = "One seed each: no difference can be told from chance."
    title = f"{table.network} on {table.dataset}"
    sections = [Section(key=key, title=title, paragraphs=[told], tables=tables)]
    if pictures := [p for p in (accuracy_chart(table, key), speed_chart(table, key)) if p is not None]:
        legend = (
            "Above, test accuracy: diamonds are means, dots are seeds, lines one standard deviation to both sides, the "
            "dashed line is backpropagation. Below, images per second: grey in one process, coloured as a pipeline. "
            "Pink is what the audit found not to be local."
        )
        sections.append(Section(key=f"{key}-charts", title=f"{title}, drawn", paragraphs=[legend], pictures=pictures))
    told_by_layer = {row.rule: LayerAccuracies(last=row.layer_accuracies) for row in table.rows if row.layer_accuracies}
    if pictures := layers_charts(told_by_layer, key):
        layers = Section(
            key=f"{key}-layers",
            title=f"{title}: which layer has learned what",
            paragraphs=["Each layer's own prediction of the test data after the last epoch, mean over the seeds."],
            pictures=pictures,
        )
        sections.append(layers)
    return sections


def _learned(row: Row, reference: Row | None) -> list[str]:
    apart = None
    if row.mean is not None and reference is not None and reference.mean is not None and row.rule != REFERENCE:
        apart = row.mean - reference.mean
    return [
        row.rule,
        _number(row.mean, "{:.2f}"),
        f"± {row.deviation:.2f} ({row.seeds_told})" if row.deviation is not None else f"({row.seeds_told})",
        _number(apart, "{:+.2f}"),
        _chance(row.p),
        _locality(_inspection(row)),
        row.trainings[0].weights_sha256[:12] if row.trainings else _NONE,
    ]


def _chance(p: float) -> str:
    if math.isnan(p):
        return _NONE
    return f"{'< 0.001' if p < 0.001 else f'{p:.3f}'}{'*' if p < LEVEL else ''}"


def _costs(row: Row, joules: bool) -> list[str]:
    m, found = row.measures, _inspection(row)
    exact = None if m is None else m.is_exact
    energy = None if m is None or m.joules_per_image is None else 1000 * m.joules_per_image
    return [
        row.rule,
        _number(row.train_seconds, "{:.1f}"),
        _number(None if m is None else m.images_per_second, "{:,.0f}"),
        _number(None if m is None else m.pipeline_images_per_second, "{:,.0f}"),
        _NONE if exact is None else "yes" if exact else "no",
        _number(None if found is None else found.activation_bytes, "{:.2f}", 2**-20),
        _number(None if m is None else m.pipeline_edge_bytes, "{:.2f}", 2**-10),
        *([_number(energy, "{:.2f}")] if joules else []),
    ]


def _inspection(row: Row) -> Inspection | None:
    return None if row.measures is None else row.measures.inspection


def _locality(found: Inspection | None) -> str:
    if found is None or found.leaks is None:
        return _NONE
    if not found.leaks:
        return f"yes ({found.cuts} cuts)"
    more = len(found.leaks) - _MOST_NAMED
    return f"no: {', '.join(found.leaks[:_MOST_NAMED])}" + (f" and {more} more" if more > 0 else "")


def _problems(row: Row) -> list[str]:
    found = _inspection(row)
    notes = [] if row.measures is None else [*row.measures.notes]
    failed = [f"measures: {row.measures_failed}"] if row.measures_failed else []
    return [*row.failures, *failed, *notes, *(() if found is None else found.notes)]


def _is_local(row: Row) -> bool:
    """Unless its audit says otherwise."""
    found = _inspection(row)
    return found is None or found.is_local is not False


def _conditions(board: Board, options: LeaderboardOptions) -> Section:
    joules = any(r.measures and r.measures.joules_per_image is not None for t in board.tables for r in t.rows)
    facts = [("command", options.command)]
    facts += [("made on", machine) for machine in board.machines]
    facts += [
        (
            f"{t.network}, {t.dataset}",
            ", ".join(f"{k} {v}" for k, v in t.settings.items() if v not in (None, "", False)),
        )
        for t in board.tables
    ]
    energy = "Joules are the processor's or GPU's own count. " if joules else "Nothing on this machine reports joules. "
    return Section(
        key="conditions",
        title="How it was made",
        paragraphs=(
            "Every cell trained in a process of its own with one thread; seconds include the evaluation after each "
            "epoch, and are from runs that may have shared the machine. All rules have the same learning rate, "
            "optimizer and budget: a rule that wants others is not shown at its best.",
            f"{_timings(board)}Same bits: the pipeline left the weights of the one process. Edges are what the "
            "pipeline's messages hold, the side channel included. Activations are the most allocated at once in a "
            f"step of one process, without weights, their gradients under a local rule, and optimizer states. {energy}",
            "Local: at each cut between two layers all later layers began with other weights, and after three steps on "
            "the cell's own data every earlier layer held the same bits. p: Welch's test against backpropagation, "
            f"corrected by Holm for the rules of the table; * below {LEVEL}. The digest is the first seed's "
            "weights_sha256, by its first twelve digits.",
            *([f"{board.missing} cells are not there yet."] if board.missing else []),
        ),
        facts=facts,
    )


def _timings(board: Board) -> str:
    """How speed was measured, as the measures themselves say."""
    timings = dict.fromkeys(row.timing for table in board.tables for row in table.rows if row.timing is not None)
    told = [
        f"{one.speed_steps} micro-batches of seed {one.seed} without evaluation, the median of {one.repeats}, in one "
        f"process and as a pipeline of {one.processes}"
        for one in timings
        if one.repeats
    ]
    if not told:
        return ""
    rows = " (rows differ)" if len(told) > 1 else ""
    return f"Speed was measured while nothing else of the leaderboard ran: {'; or '.join(told)}{rows}. "


def _budget(options: LeaderboardOptions) -> list[str]:
    recipe = options.recipe
    budget = f"{options.minutes:g} minutes" if options.minutes else f"{recipe.num_epochs} epochs"
    seeds = f"{len(options.seeds)} seed{'s' if len(options.seeds) > 1 else ''}"
    return [budget, seeds, f"{recipe.optimizer}, learning rate {recipe.lr:g}", f"batch {recipe.batch_size}"]


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return _NONE if value is None else form.format(factor * value)


def _csv_row(row: Row) -> dict[str, object]:
    m, found = row.measures, _inspection(row)
    figures: dict[str, object] = {
        "dataset": row.dataset,
        "network": row.network,
        "rule": row.rule,
        "seeds": len(row.trainings),
        "seeds_failed": len(row.failures),
        "test_acc1_mean": row.mean,
        "test_acc1_deviation": row.deviation,
        "test_acc1": _joined(row.accuracies),
        "holm_p_against_BP": None if math.isnan(row.p) else row.p,
        "train_seconds": row.train_seconds,
        "weights_sha256": _joined(training.weights_sha256 for training in row.trainings),
        "problems": "; ".join(_problems(row)) or None,
    }
    if m is not None:
        figures |= {
            "images_per_second": m.images_per_second,
            "pipeline_images_per_second": m.pipeline_images_per_second,
            "pipeline_processes": m.processes,
            "pipeline_is_exact": m.is_exact,
            "pipeline_edge_bytes_per_image": m.pipeline_edge_bytes,
            "joules_per_image": m.joules_per_image,
        }
    if found is not None:
        figures |= {
            "all_edges_bytes_per_image": sum(found.edge_bytes) if found.edge_bytes else None,
            "activation_bytes": found.activation_bytes,
            "parameters": found.parameters,
            "is_local": found.is_local,
            "audited_cuts": found.cuts,
            "leaks": _joined(found.leaks or ()) or None,
        }
    return figures


def _joined(values: Iterable[object]) -> str:
    return " ".join(map(str, values))
