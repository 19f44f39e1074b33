"""The study of stages: its results as data, its mistakes, and one small real run."""

import json
from pathlib import Path

import pytest
from sample_report import sample_stages

from unlocked.comparison.stages.results import StagesStudy
from unlocked.comparison.stages.study import main
from unlocked.comparison.stages.worker import stage_list


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
        (["--predict", "0"], "predict is 0"),
        (["--compute-speed", "0"], "compute_speed is 0.0"),
        (["--link-latency", "5"], "belong together"),
        (["--spread", "-1"], "spread is -1"),
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
