"""The examples run as they stand, and learn."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_rule_of_ones_own_learns() -> None:
    command = [sys.executable, str(EXAMPLES / "prediction_similarity.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    accuracy = float(last.split("test accuracy ")[1].split(" %")[0])
    assert accuracy > 90, done.stdout


@pytest.mark.alone
def test_a_transformer_learns_by_local_rules_in_one_process_and_in_two() -> None:
    example = str(EXAMPLES / "transformer.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    commands = [[sys.executable, example], [sys.executable, *launcher, example]]
    started = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    texts = []
    for process in started:
        printed, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        texts.append(printed)
    assert "in 1 stages" in texts[0]
    assert "in 2 stages" in texts[1]
    hashes = {re.search(r"weights_sha256 (\w{64})", text)[1] for text in texts}  # type: ignore[index]
    assert len(hashes) == 1, texts
    epochs = [line for line in texts[0].splitlines() if line.startswith("epoch")]
    losses = [[float(value) for value in re.findall(r"\w+ (\d+\.\d{3})", line)] for line in (epochs[0], epochs[-1])]
    assert len(losses[0]) == 5
    assert all(last < 0.5 * first for first, last in zip(*losses, strict=True)), texts[0]
    assert float(epochs[-1].split("test accuracy ")[1].split(" %")[0]) > 80  # of ten classes


@pytest.mark.alone
def test_adapters_of_a_llama_learn_and_write_the_same_text_from_one_process_and_from_three() -> None:
    example = str(EXAMPLES / "lora_llama.py")
    commands = [[sys.executable, example], [sys.executable, example, "--processes", "3"]]
    started = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    texts = []
    for process in started:
        printed, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        texts.append(printed.splitlines()[-3:])
    assert [lines[0] for lines in texts] == [f"13,824 of 295,232 weights trained, in {n} stages" for n in (1, 3)]
    assert texts[0][1:] == texts[1][1:]
    before, after = re.search(r"loss (\d\.\d+) -> (\d\.\d+) nats", texts[0][1]).groups()  # type: ignore[union-attr]
    assert float(after) < 0.65 * float(before)


def test_a_sink_of_ones_own_writes_a_line_per_epoch(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    command = [sys.executable, str(EXAMPLES / "own_sink.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "metrics:" not in done.stderr
    first, *epochs, last = map(json.loads, file.read_text().splitlines())
    assert first["layers"][-1] == "output"
    assert [epoch["epoch"] for epoch in epochs] == [0, 1]
    assert last["finished"] is True


def test_a_learning_rate_is_found_that_learns() -> None:
    command = [sys.executable, str(EXAMPLES / "learning_rate_finder.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "metrics:" not in done.stderr
    found = re.search(r"tried (\d+) rates; (.*)\nat the suggested rate of (\S+): test accuracy (\S+) %", done.stdout)
    assert found, done.stdout
    assert 10 < int(found[1]) < 40
    assert found[2].startswith("the loss grows beyond a rate of ")
    assert float(found[2].split()[-1]) > float(found[3]) > 1e-4
    assert float(found[4]) > 85


def test_every_task_learns_in_seconds() -> None:
    command = [sys.executable, str(EXAMPLES / "any_task.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {line.split(":")[0]: line for line in done.stdout.splitlines()}
    figures = {
        name: {key: float(value) for key, value in re.findall(r"(\w+) (-?\d+\.\d+)", line)}
        for name, line in found.items()
    }
    assert figures["regression"]["r2"] > 0.4
    assert figures["labels"]["micro_f1"] > 55
    assert figures["segmentation"]["mean_iou"] > 80
    assert figures["sequences"]["accuracy"] > 90


@pytest.mark.alone
def test_a_language_model_is_the_same_from_one_process_and_from_three() -> None:
    """Its digest, and what it writes, token for token."""
    example, texts = str(EXAMPLES / "language_model.py"), []
    for stages in ("1", "3"):
        done = subprocess.run(
            [sys.executable, example, stages], capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    one, three = ([line for line in text.splitlines() if "in " not in line] for text in texts)
    assert one == three
    assert one[-1].startswith("generated b'def ")
    assert len({re.search(r"weights_sha256 (\w{64})", text)[1] for text in texts}) == 1  # type: ignore[index]
    bits = [float(line.split(": ")[1].split(" bits")[0]) for line in one if line.startswith("epoch")]
    assert bits[-1] < min(bits[0], 4.5)
