"""Law 1: processes compute what the plain loop computes, bit for bit."""

import json
from pathlib import Path

import pytest
from ranks import ranks, torchrun
from train_worker import main as train

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("train_worker.py"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("sequential") / "out.jsonl"
    train("sequential", out)
    lines = read(out)
    hashes = [line["sha256"] for line in lines]
    assert len(set(hashes)) == 4, "four rules, whose queue depths agree with each other"
    return lines


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def compare(lines: list[dict], expected: list[dict], size: int) -> None:
    truth = {line["rule"]: line for line in expected}
    assert len(lines) == 10  # three rules, two depths, LLS by two transports; DRTP by two transports
    for line in lines:
        assert len(line["stages"]) == size
        assert line["sha256"] == truth[line["rule"]]["sha256"], line["rule"]
        assert line["epochs"] == truth[line["rule"]]["epochs"], line["rule"]


@pytest.mark.parametrize("size", [1, 3, 5])  # two: under torchrun, below
def test_processes_equal_the_plain_loop(size: int, expected: list[dict], tmp_path: Path) -> None:
    """LLS, LLS_M, LLS_MxM in bfloat16; partial last batches, evaluation, queue depth 1 and 8, dropout, augmentation.

    And DRTP with a schedule-free optimizer and a learning rate that waits for the test loss.
    """
    out = tmp_path / "out.jsonl"
    with ranks(size, [WORKER, "processes", str(out)]) as started:
        texts = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [0] * size, texts
    compare(read(out), expected, size)


def test_the_same_under_torchrun(expected: list[dict], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with torchrun(2, [WORKER, "processes", str(out)]) as process:
        _, text = process.communicate(timeout=300)
        assert process.returncode == 0, text
    compare(read(out), expected, 2)
