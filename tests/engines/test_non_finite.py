"""Values that are not numbers: never a hit, never the best, never the end of a run that looks well."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import fit, trainer
from torch import nn

from unlocked.launch import evaluate, pipeline
from unlocked.runtime import Trainer
from unlocked.workers.errors import NonFiniteLossError, StageError

ENGINES = ["sequential", "streams"]


class Poison(nn.Module):
    """Passes on what it gets; in evaluation mode, NaN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training else x * float("nan")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_of_weights_that_blew_up_ends_the_run(engine: str, tmp_path: Path) -> None:
    """The only step's loss is finite; what it leaves behind is not."""
    one = trainer(engine, optimizer=partial(torch.optim.SGD, lr=1e38), best_dir=tmp_path)
    with pytest.raises(StageError) as caught:
        fit(one, max_steps=1)
    assert isinstance(caught.value.cause, NonFiniteLossError)
    assert not list(tmp_path.glob("**/model_best.pt"))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_error_names_epoch_and_layer(engine: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), Poison()), nn.Linear(8, 3))
    data = torch.randn(20, 3, 2, 2), torch.arange(20) % 3
    one = Trainer(model, rule=trainer().rule, optimizer=partial(torch.optim.SGD, lr=0.1), engine=engine)
    with pytest.raises(
        StageError, match=r"failed in \dE\d+: the loss of layer linear2? is nan in the evaluation"
    ) as caught:
        one.fit(data, epochs=1, batch_size=5, eval_data=data)
    assert "after epoch 0" in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("when", [0, 2])
def test_an_input_that_is_not_a_number_ends_the_run_where_it_enters(engine: str, when: int) -> None:
    samples = torch.randn(20, 12)
    batches = [(samples[i : i + 5].clone(), torch.arange(5) % 3) for i in range(0, 20, 5)]
    batches[when][0][3, 7] = float("nan")
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 8), nn.ReLU()), nn.Linear(8, 3))
    one = Trainer(model, rule=trainer().rule, optimizer=partial(torch.optim.SGD, lr=0.1), engine=engine)
    with pytest.raises(StageError, match=rf"failed in \d[FU]{when} "):
        one.fit(batches, epochs=1)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_command_line_says_so_in_one_line(engine: str, tmp_path: Path, capsys: Any) -> None:
    flags = ["--engine", engine, "--max-steps", "1", "--lr", "1e30", "--plain", "--save-path", str(tmp_path)]
    summary = tmp_path / "summary.json"
    assert pipeline.main([*flags, "--save-best-model", "--summary", str(summary)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert "100.00" not in out
    assert not summary.exists()
    assert not list(tmp_path.glob("**/model_best.pt"))


def test_weights_that_are_not_numbers_get_no_score(tmp_path: Path, capsys: Any) -> None:
    flags = ["--max-steps", "2", "--no-eval", "--plain", "--save-path", str(tmp_path), "--experiment-name", "run"]
    assert pipeline.main(flags) == 0
    file = tmp_path / "run" / "model_final.pt"
    torch.save({name: torch.full_like(value, float("nan")) if value.is_floating_point() else value
                for name, value in torch.load(file).items()}, file)  # fmt: skip
    file.with_name("model_final.pt.sha256").unlink()
    capsys.readouterr()
    assert evaluate.main([str(file)]) != 0
    out, err = capsys.readouterr()
    assert "evaluation loss is nan" in err
    assert "100" not in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())
