"""What a stop leaves in one process: no complete snapshot is written again, or gives its place to another position."""

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from engine_runs import dataset, figures, trainer

from unlocked.runtime import MetricsSink
from unlocked.runtime.metrics.records import EpochResult
from unlocked.runtime.saving import writer
from unlocked.runtime.saving.layer_files import LayerFile, write_layer
from unlocked.runtime.saving.snapshots import find_snapshot, newest_whole
from unlocked.workers.layer import Layer

ENGINES = {"sequential": {}, "streams": {"stages": 3, "queue_depth": 2}}
STEPS = 5  # of an epoch
SIZES: dict[str, Any] = {"batch_size": 16, "eval_batch_size": 25}


class StopAfterEpoch(MetricsSink):
    waits_at_epochs = True

    def on_epoch(self, result: EpochResult) -> None:
        self.stop("enough")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_at_a_mark_does_not_save_again(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while the state is copied for the mark, so there is no item between the mark and the stop."""
    written: Counter[tuple[int, str]] = Counter()
    state_of = Layer.state_dict

    def write(path: Path, state: Any, *, run: str, position: int, layer: str) -> LayerFile:
        written[position, layer] += 1
        return write_layer(path, state, run=run, position=position, layer=layer)

    def state_dict(self: Layer) -> dict[str, Any]:
        if self.name == "output" and self.clock == 3:
            signal.raise_signal(signal.SIGTERM)
        return state_of(self)

    monkeypatch.setattr(writer, "write_layer", write)
    monkeypatch.setattr(Layer, "state_dict", state_dict)
    one = trainer(engine, snapshot_every=1, keep_snapshots=1, snapshot_dir=tmp_path, **ENGINES[engine])
    result = one.fit(dataset(70), epochs=50, batch_size=16)
    assert result.stopped_by == signal.SIGTERM
    snapshot, problems = newest_whole(tmp_path)
    assert snapshot is not None
    assert (snapshot.steps, problems) == (result.steps, [])
    assert set(written.values()) == {1}, "a position was saved twice"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_behind_an_evaluation_has_a_folder_of_its_own(engine: str, tmp_path: Path) -> None:
    """Beside that of the mark behind the epoch's last micro-batch; each leads to the same end."""
    data, test = dataset(70), dataset(40, "test", augment=False)
    expected = trainer().fit(data, eval_data=test, epochs=2, **SIZES)
    saving: dict[str, Any] = {"snapshot_every": STEPS, "snapshot_dir": tmp_path, **ENGINES[engine]}
    trainer(engine, sinks=[StopAfterEpoch()], **saving).fit(data, eval_data=test, epochs=2, **SIZES)
    names = ["step-00000005", "step-00000005-evaluated"]
    assert sorted(path.parent.name for path in tmp_path.glob("*/manifest.json")) == names
    before, behind = (find_snapshot(tmp_path / name) for name in names)
    assert before.position == STEPS < behind.position
    assert find_snapshot(tmp_path) == behind, "the one behind the evaluation is the newer one"
    for snapshot, epochs in ((before, 2), (behind, 1)):
        again = trainer(resume=snapshot.folder).fit(data, eval_data=test, epochs=2, **SIZES)
        assert again.weights_sha256 == expected.weights_sha256
        assert figures(again) == figures(expected)[-epochs:]
