"""The memory study's results as data, and the line through them."""

import json
from pathlib import Path

import pytest

from unlocked.comparison.memory.results import ChainSettings, MemoryPoint, MemoryStudy

SETTINGS = ChainSettings(channels=4, image_size=8, batch_size=8)


def test_the_line_through_the_points(tmp_path: Path) -> None:
    def point(depth: int, size: int) -> MemoryPoint:
        return MemoryPoint(method="BP", depth=depth, activation_bytes=size, persistent_bytes=1, held_bytes=0)

    study = MemoryStudy(settings=SETTINGS, points=[point(8, 170), point(4, 90), point(2, 50)])
    assert study.slope("BP") == pytest.approx((20, 10))
    assert [p.depth for p in study.of("BP")] == [2, 4, 8]
    assert MemoryStudy.from_dict(json.loads(json.dumps(study.as_dict()))) == study
    with pytest.raises(ValueError, match="at least two depths"):
        study.slope("LLS")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="no memory study"):
        MemoryStudy.load(tmp_path / "x.json")
