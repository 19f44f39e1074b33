"""From kept cells to the page: means, significance against an independent computation, what failed, what is missing."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from unlocked.comparison.leaderboard.board import read_board
from unlocked.comparison.leaderboard.options import Key, LeaderboardOptions, parse
from unlocked.comparison.leaderboard.page import summary_line, write_page, write_tables
from unlocked.comparison.leaderboard.results import Inspection, Measures, Timing, Training
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

TIMING = Timing(seed=0, speed_steps=7, repeats=5, processes=3)
ACCURACIES = {"BP": [97.0, 97.5, 98.0], "LLS": [95.0, 95.5, 94.0], "DRTP": [80.0, 81.0], "DFA": []}


def _options(folder: Path, *more: str) -> LeaderboardOptions:
    rules = ["--rules", "LLS", "BP", "DRTP", "DFA"]
    return parse(["--models", "SmallConv", "--seeds", "0", "1", "2", *rules, "--output", str(folder), *more])


def _keep(options: LeaderboardOptions, key: Key, part: int | str, content: Mapping[str, Any]) -> None:
    path = options.path_of(key, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {"machine": "a machine", "versions": {"torch": "2"}, "commit": "abc"}
    write_json(path, {"settings": options.settings_of(key), **where, **content})


def _training(accuracy: float) -> dict[str, Any]:
    made = Training(test_acc1=accuracy, epochs=(50.0, accuracy), steps=40, train_seconds=2.0, weights_sha256="d" * 64)
    return {"training": to_plain(made)}


def _measures(leaks: Sequence[str], joules: float | None = None) -> dict[str, Any]:
    inspection = Inspection(
        layers=("conv1", "output"),
        parameters=10,
        activation_bytes=2**20,
        edge_bytes=(512.0,),
        cuts=1,
        steps=3,
        leaks=tuple(leaks),
    )
    piped = None if leaks else 4000.0
    made = Measures(
        images_per_second=2000.0,
        pipeline_images_per_second=piped,
        processes=2,
        is_exact=None if leaks else True,
        pipeline_edge_bytes=None if leaks else 512.0,
        joules_per_image=joules,
        inspection=inspection,
    )
    return {"measures": to_plain(made), "timing": to_plain(TIMING)}


@pytest.fixture
def options(tmp_path: Path) -> LeaderboardOptions:
    made = _options(tmp_path)
    for rule, values in ACCURACIES.items():
        key = Key("digits", "SmallConv", rule)
        for seed, value in enumerate(values):
            _keep(made, key, seed, _training(value))
        _keep(made, key, "measures", _measures(["conv1"] if rule in ("BP", "DFA") else []))
    _keep(made, Key("digits", "SmallConv", "DFA"), 0, {"failed": "it <b>exploded</b>"})
    return made


def test_rows_are_means_and_tests_against_backpropagation(options: LeaderboardOptions) -> None:
    board = read_board(options)
    (table,) = board.tables
    assert [row.rule for row in table.rows] == ["BP", "LLS", "DRTP", "DFA"]
    assert board.missing == 1 + 2  # a seed of DRTP, two of DFA
    lls, drtp = table.rows[1:3]
    assert lls.mean == pytest.approx(94.8333333)
    assert lls.deviation == pytest.approx(stats.tstd(ACCURACIES["LLS"]))
    raw = [stats.ttest_ind(ACCURACIES[r], ACCURACIES["BP"], equal_var=False).pvalue for r in ("LLS", "DRTP")]
    low, high = sorted(raw)
    corrected = {low: 2 * low, high: max(high, 2 * low)}
    assert [lls.p, drtp.p] == pytest.approx([corrected[p] for p in raw])
    pairs = {(d.better, d.worse): d for d in table.differences()}
    assert set(pairs) == {("BP", "LLS"), ("BP", "DRTP"), ("LLS", "DRTP")}
    assert pairs["LLS", "DRTP"].points == pytest.approx(94.8333333 - 80.5)
    assert all(pair.corrected >= pair.p for pair in pairs.values())


def test_the_page_has_losers_and_failures_and_nothing_to_fetch(options: LeaderboardOptions, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(read_board(options), options, page)
    text = page.read_text()
    assert not re.search(r"https?:|@import|url\((?!#)|<script", text)
    for words in (
        "DRTP",
        "80.50",
        "seed 0: it &lt;b&gt;exploded&lt;/b&gt;",
        "no: conv1",
        "yes (1 cuts)",
        "dddddddddddd",
    ):
        assert words in text, words
    assert "3 cells are not there yet" in text
    assert "7 micro-batches of seed 0 without evaluation, the median of 5" in text, "as the cells say, not these flags"
    assert "Nothing on this machine reports joules" in text
    assert "J/1,000 images" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_a_tiny_p_is_below_a_bound_not_zero(options: LeaderboardOptions, tmp_path: Path) -> None:
    for seed in range(3):
        _keep(options, Key("digits", "SmallConv", "LLS"), seed, _training(10.0 + seed / 10))
    write_page(read_board(options), options, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "&lt; 0.001*" in text
    assert "0.000" not in text


def test_joules_are_a_column_where_they_were_measured(options: LeaderboardOptions, tmp_path: Path) -> None:
    _keep(options, Key("digits", "SmallConv", "LLS"), "measures", _measures([], joules=0.0125))
    write_page(read_board(options), options, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "J/1,000 images" in text
    assert "12.50" in text


def test_the_sentence_knows_who_is_local(options: LeaderboardOptions) -> None:
    (table,) = read_board(options).tables
    line = summary_line(table)
    assert line.startswith("SmallConv on digits: the best local rule is LLS with 94.83 %, 2.67 points behind")
    _keep(options, Key("digits", "SmallConv", "LLS"), "measures", _measures(["conv1"]))
    (table,) = read_board(options).tables
    assert "the best local rule is DRTP with 80.50 %" in summary_line(table)


def test_rules_that_fail_for_some_seeds_are_not_the_best(options: LeaderboardOptions) -> None:
    """The mean of those that did not fail flatters them."""
    for rule in ("LLS", "DRTP"):
        _keep(options, Key("digits", "SmallConv", rule), 2, {"failed": "a loss is not finite"})
        (table,) = read_board(options).tables
        line = summary_line(table)
        lls = next(row for row in table.rows if row.rule == "LLS")
        assert lls.seeds_told == "2 of 3"
        if rule == "LLS":
            assert "the best local rule is DRTP with 80.50 %" in line
    assert "the best local rule is LLS with 95.25 % (2 of 3 seeds; the others failed)" in line


def test_the_tables(options: LeaderboardOptions, tmp_path: Path) -> None:
    paths = write_tables(read_board(options), tmp_path)
    rows, pairs = (list(csv.DictReader(path.open())) for path in paths)
    assert [row["rule"] for row in rows] == ["BP", "LLS", "DRTP", "DFA"]
    assert (rows[1]["is_local"], rows[1]["seeds"], rows[1]["test_acc1"]) == ("True", "3", "95.0 95.5 94.0")
    assert rows[3]["problems"] == "seed 0: it <b>exploded</b>"
    assert len(pairs) == 3


def test_cells_of_other_settings_are_refused(options: LeaderboardOptions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was made with lr 0.01 instead of 0.5; give another folder by --output"):
        read_board(_options(tmp_path, "--lr", "0.5"))
    path = options.path_of(Key("digits", "SmallConv", "LLS"), 0)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is no cell of this program"):
        read_board(options)
    path.write_text(json.dumps({"settings": options.settings_of(Key("digits", "SmallConv", "LLS")), "training": {}}))
    with pytest.raises(ValueError, match=r"LLS_0\.json"):
        read_board(options)


def test_settings_that_are_rows_are_kept_and_known_again(tmp_path: Path) -> None:
    flags = ["--image-size", "16", "12", "--lr-scheduler", "MultiStepLR", "--milestone", "3", "5"]
    options = _options(tmp_path, *flags)
    _keep(options, Key("digits", "SmallConv", "LLS"), 0, _training(90.0))
    assert read_board(_options(tmp_path, *flags)).tables[0].trained[0].mean == 90.0


@pytest.mark.parametrize(
    ("flags", "others", "words"),
    [
        ([], ["--milestone", "3"], "lr_scheduler 'none' instead of 'MultiStepLR'"),
        (["--milestone", "3"], ["--milestone", "4"], r"milestone \[3\] instead of \[4\]"),
        (["--milestone", "3"], ["--milestone", "3", "--gamma", "0.9"], "gamma 0.3 instead of 0.9"),
        (["--datasets", "folder"], ["--datasets", "folder", "--dataset-dir", "other"], "dataset_dir '.*other'"),
    ],
)
def test_all_that_makes_a_cell_another_is_known(
    flags: list[str], others: list[str], words: str, tmp_path: Path
) -> None:
    options = _options(tmp_path, *flags)
    _keep(options, options.keys[0], 0, _training(90.0))
    with pytest.raises(ValueError, match=words):
        read_board(_options(tmp_path, *others))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rules", "LLS", "LLX"], "rules 'LLX' is not known; valid: LLS"),
        (["--models", "SmallCon"], "model 'SmallCon' is not known; valid"),
        (["--datasets", "digit"], "dataset 'digit' is not known"),
        (["--seeds", "1", "1"], "seeds are 1 1; give one or more, each once"),
        (["--minutes", "2", "--num-epochs", "3"], "two budgets"),
        (["--report-only", "--train-only"], "leave nothing to do"),
        (["--local-module-num", "4"], "model 'SmallConv' takes no local_module_num, but upsample; it is for ResNet18"),
        (["--minutes", "nan"], "minutes is nan"),
        (["--minutes", "180"], "minutes is 180, and no run may take longer than the timeout of 7200 seconds"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        parse(flags)
    assert len(str(error.value).splitlines()) == 1


def test_an_option_goes_to_the_networks_that_take_it(tmp_path: Path) -> None:
    options = parse(["--models", "MLP", "ResNet32", "--model-width", "64", "--local-module-num", "4"])
    mlp, resnet = (options.recipe_of(Key("digits", model, "LLS"), 3) for model in ("MLP", "ResNet32"))
    assert (mlp.width, mlp.local_module_num, mlp.seed) == (64, None, 3)
    assert (resnet.width, resnet.local_module_num) == (None, 4)
    assert options.settings_of(Key("digits", "MLP", "LLS"))["width"] == 64
