"""The comparison on a terminal."""

import io

from rich.console import Console
from sample_report import sample_report

from unlocked.comparison.report.table import print_report


def test_no_figure_is_cut_off_at_eighty_columns() -> None:
    report, printed = sample_report(), io.StringIO()
    print_report(report, Console(file=printed, width=80))
    text = printed.getvalue()
    assert "…" not in text
    for contender in report.measured:
        assert contender.images_per_second is not None
        row = next(line for line in text.splitlines() if line.strip().startswith(f"{contender.name}  "))
        assert f"{contender.images_per_second.median:,.0f}" in row
