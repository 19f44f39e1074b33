"""The study of stages: fits that find what was put in, predictions that meet closed forms, and one small real run."""

import json
from pathlib import Path

import pytest
from sample_report import sample_stages

from unlocked.comparison.stages.results import StagesStudy
from unlocked.comparison.stages.scaling_model import LOCAL, CostModel, Line, Link, predict, stage_factors
from unlocked.comparison.stages.study import main
from unlocked.comparison.stages.worker import stage_list
from unlocked.runtime.schedules.backpropagation import SCHEDULES

BLOCKS = 2
FREE = Link(seconds=0.0, occupies_sender=False)
# Blocks of 2 s forward and 3 s update under the local rule; of 2, 1.5 and 1.5 s under backpropagation.
MODEL = CostModel(
    step=Line(intercept=0.0, slope=5.0, largest_residual=0.0),
    forward_share=0.4,
    output=0.0,
    hop=Line(intercept=0.0, slope=0.0, largest_residual=0.0),
    backpropagation={"F": 2.0, "B": 1.5, "W": 1.5, "U": 0.0},
)


def test_a_line_is_found_again() -> None:
    line = Line.fit([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
    assert (line.intercept, line.slope) == pytest.approx((3, 2))
    assert line.largest_residual == pytest.approx(0, abs=1e-12)
    assert line.at(10) == pytest.approx(23)
    bent = Line.fit([1.0, 2.0, 4.0], [5.0, 7.0, 12.0])
    assert 0 < bent.largest_residual < 0.1
    with pytest.raises(ValueError, match="two different points"):
        Line.fit([1.0, 1.0], [2.0, 3.0])


@pytest.mark.parametrize("stages", [1, 3, 16])
def test_equal_stages_lose_nothing_by_local_learning(stages: int) -> None:
    found = predict(MODEL, LOCAL, stages, blocks=BLOCKS, link=FREE)
    assert found.microbatches_per_second == pytest.approx(1 / 10)
    assert found.efficiency == pytest.approx(1)
    assert found.fill_seconds == pytest.approx((stages - 1) * (2 + 5))  # only the last update waits for SEND


@pytest.mark.parametrize("stages", [1, 3, 16])
def test_backpropagation_drains_at_every_step(stages: int) -> None:
    for name in SCHEDULES:
        found = predict(MODEL, name, stages, blocks=BLOCKS, link=FREE, microbatches=16)
        bubble = (stages - 1) * (4 + 3 - 3 if name == "ZB-H1" else 4 + 3 + 3)
        assert found.microbatches_per_second == pytest.approx(16 / (16 * 10 + bubble))
        assert found.efficiency == pytest.approx(160 / (160 + bubble))
        assert found.fill_seconds == pytest.approx((stages - 1) * 4)


def test_a_hop_costs_the_sender_or_only_time() -> None:
    copied = predict(MODEL, LOCAL, 4, blocks=BLOCKS, link=Link(seconds=1.0, occupies_sender=True))
    carried = predict(MODEL, LOCAL, 4, blocks=BLOCKS, link=Link(seconds=1.0, occupies_sender=False))
    assert copied.microbatches_per_second == pytest.approx(1 / 11)
    assert carried.microbatches_per_second == pytest.approx(1 / 10)
    assert carried.fill_seconds == pytest.approx(3 * (7 + 1))


def test_a_slow_stage_sets_the_pace_of_local_learning() -> None:
    factors = stage_factors(8, 0.3, seed=1)
    found = predict(MODEL, LOCAL, 8, blocks=BLOCKS, link=FREE, spread=0.3, seed=1)
    assert found.microbatches_per_second == pytest.approx(1 / (10 * max(factors)))
    assert stage_factors(4, 0.3, seed=1) == factors[:4]
    assert stage_factors(3, 0.0) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="spread=-1"):
        stage_factors(2, -1)


def test_faster_compute() -> None:
    found = predict(MODEL, LOCAL, 2, blocks=BLOCKS, link=FREE, speed=100)
    assert found.microbatches_per_second == pytest.approx(10)


def test_a_thousand_stages() -> None:
    found = predict(MODEL, LOCAL, 1024, blocks=BLOCKS, link=FREE)
    assert found.microbatches_per_second == pytest.approx(1 / 10)
    zero_bubble = predict(MODEL, "ZB-H1", 1024, blocks=BLOCKS, link=FREE, microbatches=8)
    whole = predict(MODEL, "1F1B", 1024, blocks=BLOCKS, link=FREE, microbatches=8)
    assert whole.microbatches_per_second == pytest.approx(8 / (80 + 1023 * 10))
    assert zero_bubble.microbatches_per_second > whole.microbatches_per_second


def test_the_stages_of_a_chain() -> None:
    assert stage_list(4, 2) == "0-1,2-4"
    assert stage_list(3, 3) == "0,1,2-3"


def test_results_are_plain_data(tmp_path: Path) -> None:
    study = sample_stages()
    assert StagesStudy.from_dict(json.loads(json.dumps(study.as_dict()))) == study
    assert [p.stages for p in study.of("GPipe")] == [1, 2, 4, 8]
    assert [p.microbatches for p in study.of("1F1B", growing=True)] == [64]
    one, two, shared = study.measured
    assert study.error(one) == pytest.approx(0, abs=0.02)
    assert (two.oversubscribed, shared.oversubscribed) == (False, True)
    assert "With 8 stages" in study.sentence()
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="no study of stages"):
        StagesStudy.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predict", "0"], "--predict 0"),
        (["--compute-speed", "0"], "--compute-speed 0.0"),
        (["--link-latency", "5"], "belong together"),
        (["--spread", "-1"], "spread=-1"),
        (["--training-mode", "nonsense"], "nonsense"),
    ],
)
def test_mistakes(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main([*flags, "--output", str(tmp_path)])


@pytest.mark.alone
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    flags = "--max-stages 2 --predict 4 --channels 4 --image-size 4 --batch-size 4 --repeats 1 --blocks-per-stage 1"
    assert main([*flags.split(), "--run-seconds", "0.1", "--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "ms per block (residuals up to" in output
    study = StagesStudy.load(tmp_path / "stages.json")
    assert [m.stages for m in study.measured] == [1, 2]
    assert min(m.images_per_second for m in study.measured) > 0
    assert study.schedules == ["LLS", "GPipe", "1F1B", "ZB-H1"]
    assert "Throughput against stages" in (tmp_path / "stages.html").read_text()
    assert len((tmp_path / "stages.csv").read_text().splitlines()) == 1 + 4 * 2 * 3
