"""Which task targets are of; and one clear error, before step 0, where they are of none or can't be learnt."""

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from task_runs import CASES, LENGTH, TOKENS, language_model, perceptron, train
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from unlocked import Trainer
from unlocked.data import LoaderDataset, pad_collate
from unlocked.models import Block
from unlocked.rules import DRTP, LLS, BarlowTwins, MultiLabel, Regression, Task, Tokens
from unlocked.runtime import EarlyStopping, RunResult
from unlocked.runtime.job import Job
from unlocked.workers.errors import StageError


def fit(network: list[nn.Module], data: Any, *, task: Task | None = None, rule: Any = None, **how: Any) -> RunResult:
    optimizer = partial(torch.optim.SGD, lr=0.01)
    trainer = Trainer(network, rule=rule or LLS(), optimizer=optimizer, task=task, threads=1)
    if not isinstance(data, DataLoader | list):
        how = {"batch_size": 8, **how}
    return trainer.fit(data, epochs=1, **how)


IDS = torch.randint(1, TOKENS, (16, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(16, LENGTH, dtype=torch.int64)
GIVEN = {"input_ids": IDS, "attention_mask": MASK}
X = torch.randn(16, 7, generator=torch.Generator().manual_seed(0))


def with_targets(targets: Tensor) -> dict[str, Tensor]:
    return {**GIVEN, "labels": targets}


CLASSES = torch.arange(16) % 3
EVALUATIONS: dict[str, tuple[Any, str]] = {
    "with float labels": ((X, CLASSES.float()), r"evaluation targets are float32 \[N\]; .* int64 \[N\].*\(.long\(\)\)"),
    "with one-hot labels": ((X, CLASSES[:, None] == torch.arange(3)), r"targets are bool \[N, 3\]; .*\.argmax\(1\)"),
    "with one-hot numbers": ((X, F.one_hot(CLASSES)), r"targets are int64 \[N, 3\]; .*\.argmax\(1\)"),
    "without labels": ({"samples": X}, "targets are none; .* class numbers: give them"),
    "with tokens": ((X.long(), CLASSES), r"samples are read as int64, training samples as float32; .*\.float\(\)"),
    "batches with float labels": ([(X, CLASSES.float())], r"targets are float32 \[N\]; .*\(.long\(\)\)"),
    "batches without labels": ([(X,)], "targets are none; .* class numbers: give them"),
    "batches with tokens": ([(X.long(), CLASSES)], "samples are read as int64, training samples as float32"),
}


def _classify(eval_data: Any) -> RunResult:
    return fit(perceptron(7, 3), (X, CLASSES), eval_data=eval_data)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "a mask of another length": (
        lambda: fit(language_model(), {**GIVEN, "attention_mask": MASK[:, :-1]}),
        rf"attention_mask has the shape \[16, {LENGTH - 1}\], input_ids \[16, {LENGTH}\]",
    ),
    "a target beyond the vocabulary": (
        lambda: fit(language_model(), with_targets(IDS + 1)),
        rf"the train data: targets from 2 to {TOKENS}; valid: 0 to {TOKENS - 1}",
    ),
    "an id beyond the vocabulary": (
        lambda: fit(language_model(), {**GIVEN, "input_ids": IDS + 5}),
        "a value is out of range: the data gives .* which layer embedding can't take: its tokens = Embedding",
    ),
    "all positions ignored": (
        lambda: fit(language_model(), with_targets(IDS.index_fill(0, torch.tensor([3]), -100))),
        "the train data: sample 3 has no position that counts",
    ),
    "a target of NaN": (
        lambda: fit(perceptron(7, 2), (X, X[:, :2].index_fill(0, torch.tensor([5]), float("nan")))),
        r"the train data: targets hold nan, at \[5, 0\]",
    ),
    "targets of no task": (
        lambda: fit(perceptron(7, 2), (X, X[:, :3])),
        r"gives \(2,\) per sample and the targets are float32 \[N, 3\], which fits no task",
    ),
    "numbers or labels": (
        lambda: fit(perceptron(7, 2), (X, (X[:, :2] > 0).float())),
        r"all of them 0 or 1; say whether .* task=MultiLabel\(\) or task=Regression\(\)",
    ),
    "a task of other targets": (
        lambda: fit(perceptron(7, 2), (X, X[:, :2]), task=Tokens()),
        r"the task tokens takes targets int64 \[N, T\], or none .* got targets float32 \[N, 2\] and .* gives \(2,\)",
    ),
    "labels that are not 0 or 1": (
        lambda: fit(perceptron(7, 2), (X, X[:, :2]), task=MultiLabel()),
        "labels are 0 or 1 for the task multi-label, got values from",
    ),
    "no targets": (
        lambda: fit(perceptron(7, 2), {"x": X}, task=Task()),
        "there are no targets, which the task own needs",
    ),
    "a tensor that is not there": (
        lambda: fit(language_model(), IDS),
        "layer attention1 reads attention_mask beside its input, but the data has one tensor per sample",
    ),
    "a tensor of another name": (
        lambda: fit(language_model(), {"input_ids": IDS, "mask": MASK}),
        "layer attention1 reads attention_mask beside its input, which the data does not bring; there is mask",
    ),
    "a rule of classes alone": (
        lambda: fit(perceptron(7, 2), (X, X[:, :2]), rule=DRTP),
        "the rule DRTP of layer sequential1 takes the targets of classification, not of the task regression",
    ),
    "a rule with its own views": (
        lambda: fit(language_model(), GIVEN, rule=BarlowTwins),
        "makes its own rows of the samples, which have no attention_mask",
    ),
    "other keys in evaluation": (
        lambda: fit(perceptron(7, 2), (X, X[:, :2]), eval_data={"x": X, "y": X, "labels": X[:, :2]}),
        "evaluation data brings y beside its samples, training data nothing",
    ),
    **{
        f"evaluation {name}": (partial(_classify, eval_data=data), message)
        for name, (data, message) in EVALUATIONS.items()
    },
    "evaluation numbers that are no labels": (
        lambda: fit(perceptron(7, 2), (X, X[:, :2] > 0), eval_data=(X, X[:, :2].abs() + 2)),
        r"the test data: targets hold \d\.\d+, those of training are read as bool \[N, 2\]",
    ),
    "evaluation numbers of a loader that are no labels": (
        lambda: fit(perceptron(7, 2), (X, X[:, :2] > 0), eval_data=[(X, X[:, :2])]),
        r"evaluation targets are float32 \[N, 2\], those of training are read as bool \[N, 2\]",
    ),
    "evaluation targets of another size": (
        lambda: fit(perceptron(7, 2), (X, X[:, :2]), eval_data=[(X, X[:, :3])]),
        r"evaluation targets are float32 \[N, 3\], those of training are read as float32 \[N, 2\]",
    ),
    "a mask of another length in evaluation": (
        lambda: fit(language_model(), GIVEN, eval_data=[{**GIVEN, "attention_mask": MASK[:, :, None]}]),
        r"evaluation data has attention_mask \[12, 1\] per sample, training data \[12\]",
    ),
    "feedback alignment": (
        lambda: fit(perceptron(7, 2), (X, X[:, :2]), rule="DFA"),
        "DFA is for classification of samples of one tensor; the task is regression",
    ),
    "a task that is a class": (lambda: fit(perceptron(7, 2), (X, X[:, :2]), task=Regression), r"write Regression\(\)"),  # type: ignore[arg-type]
    "a figure of another task": (
        lambda: Trainer(
            perceptron(7, 2),
            rule=LLS(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            sinks=[EarlyStopping(1, figure="eval_perplexity")],
        ).fit((X, X[:, :2]), epochs=1, batch_size=8, eval_data=(X, X[:, :2])),
        "figure 'eval_perplexity' is not known to the task regression; valid: .*eval_mae",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_the_first_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, message = MISTAKES[name]
    if name != "a figure of another task":  # the sinks are made by the engine
        monkeypatch.setattr(Job, "stage", lambda *_, **__: pytest.fail("a stage was built"))
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_so_it_is_when_a_trained_network_is_evaluated(name: str) -> None:
    trainer = Trainer(perceptron(7, 3), rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.01), threads=1)
    trainer.fit((X, CLASSES), epochs=1, batch_size=8)
    data, message = EVALUATIONS[name]
    with pytest.raises(ValueError, match=message.replace("training samples as", "the network reads")) as caught:
        trainer.evaluate(data, batch_size=None if isinstance(data, list) else 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [lambda y: y, lambda y: y.float(), lambda y: y.int(), lambda y: y.numpy() * 1.0])
def test_evaluation_targets_of_another_type_with_the_same_values_are_read(kind: Any) -> None:
    truth = X[:, :2] > 0
    results = [fit(perceptron(7, 2), (X, truth), eval_data=(X, one)) for one in (truth, kind(truth))]
    assert results[0].test_figures == results[1].test_figures


@pytest.mark.parametrize("data", [(X, X[:, :2]), [(X, X[:, :2])]], ids=["tensors", "a loader"])
def test_what_the_first_block_refuses_is_refused_for_every_task(data: Any) -> None:
    def check(samples: Tensor, beside: Any) -> None:
        raise ValueError(f"sample {int(samples[:, 0].argmax())} is the largest")

    first, *others = perceptron(7, 2)
    first.check_samples = check  # type: ignore[assignment]
    with pytest.raises((ValueError, StageError), match=f"sample {int(X[:, 0].argmax())} is the largest"):
        fit([Block("first", first), *others], data)


@pytest.mark.parametrize("task", [None, Regression()])
@pytest.mark.parametrize("width", [1, 2])
def test_whole_numbers_are_numbers_where_those_of_training_are(width: int, task: Task | None) -> None:
    """Not classes, as they would be alone: also below 0."""
    numbers = (X[:, :width] * 3).round()
    given = {1: [numbers, numbers[:, 0]], 2: [numbers]}[width]
    for real in given:
        network = perceptron(7, width)
        trainer = Trainer(network, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.01), task=task, threads=1)
        found = trainer.fit((X, real), epochs=1, batch_size=8, eval_data=(X, real.long()), eval_batch_size=16)
        expected = F.mse_loss(trainer.predict(X).flatten(), real.flatten())
        assert found.test_loss == pytest.approx(float(expected))
        assert trainer.evaluate((X, real.long())).loss == pytest.approx(float(expected))


def batches() -> Iterator[dict[str, Tensor]]:
    for rows in range(0, 16, 8):
        yield {name: value[rows : rows + 8] for name, value in GIVEN.items()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda batch: {**batch, "more": batch["input_ids"]},
            "has attention_mask, more, those before had",
        ),
        (lambda batch: {**batch, "labels": batch["input_ids"]}, "has attention_mask, targets, those before had"),
        (lambda batch: {"input_ids": batch["input_ids"]}, "the batch has nothing, those before had attention_mask"),
        (lambda batch: {name: one[:, :-1] for name, one in batch.items()}, r"shape \(11,\).*unlocked.data.pad_collate"),
        (
            lambda batch: {**batch, "attention_mask": batch["attention_mask"] * 0},
            "sample 0 has no position that counts",
        ),
        (lambda batch: {**batch, "input_ids": batch["input_ids"] + TOKENS}, "targets from .*valid: 0 to 16"),
    ],
)
def test_a_loaders_later_batch_is_held_to_the_first(changed: Any, message: str) -> None:
    first, second = batches()
    with pytest.raises(StageError, match=f"train micro-batch 1 of epoch 0.*{message}") as caught:
        fit(language_model(), [first, changed(second)])
    assert "stage 0" in str(caught.value)


def test_a_loader_trains_as_the_same_tensors_do() -> None:
    """In order, without a shuffle; ragged sequences by a collate function."""
    case = CASES["tokens"]
    rows = [ids[mask.bool()] for ids, mask in zip(case.train["input_ids"], case.train["attention_mask"], strict=True)]
    loader = DataLoader(rows, batch_size=8, collate_fn=pad_collate(LENGTH))  # type: ignore[arg-type]
    by_loader = fit(language_model(), loader)
    padded = [{name: one[i : i + 8] for name, one in case.train.items()} for i in range(0, 43, 8)]
    assert by_loader.weights_sha256 == fit(language_model(), padded).weights_sha256
    labelled = [
        {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in padded
    ]
    assert by_loader.weights_sha256 == fit(language_model(), labelled).weights_sha256, "labels that repeat the inputs"
    shifted = [
        {**batch, "labels": torch.cat([batch["labels"][:, 1:], torch.full((len(batch["labels"]), 1), -100)], 1)}
        for batch in labelled
    ]
    assert by_loader.weights_sha256 == fit(language_model(), shifted).weights_sha256, "labels that are shifted already"
    assert by_loader.weights_sha256 != fit(language_model(), labelled, task=Tokens(shift=False)).weights_sha256


KEPT = 9


def masked(rows: int = 43) -> dict[str, Tensor]:
    """Two tokens of each sample are to be guessed, hidden by another token; but the `KEPT` first samples show them."""
    places = (torch.arange(rows) % (LENGTH - 4))[:, None] + torch.tensor([0, 3])
    ids = torch.randint(1, TOKENS - 1, (rows, LENGTH), generator=torch.Generator().manual_seed(4))
    labels = torch.full_like(ids, -100).scatter(1, places, ids.gather(1, places))
    shown = ids.clone()
    shown[KEPT:] = ids[KEPT:].scatter(1, places[KEPT:], TOKENS - 1)
    return {"input_ids": shown, "attention_mask": torch.ones_like(ids), "labels": labels}


def rows_of(data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: one[row] for name, one in data.items()} for row in range(len(data["input_ids"]))]


def batches_of(data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: one[row : row + 8] for name, one in data.items()} for row in range(0, 43, 8)]


LOADERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a list": batches_of,
    "a DataLoader": lambda data: DataLoader(rows_of(data), batch_size=8),  # type: ignore[arg-type]
    "its batch sampler": lambda data: DataLoader(
        rows_of(data),  # type: ignore[arg-type]
        batch_sampler=BatchSampler(SequentialSampler(range(43)), 8, drop_last=False),
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_first_sample_that_keeps_its_tokens_does_not_decide(kind: str) -> None:
    """The targets of a masked language model are of their own positions, from a loader as from tensors."""
    data, batches = masked(), batches_of(masked())
    expected = fit(language_model(), batches, task=Tokens(shift=False))
    found = fit(language_model(), LOADERS[kind](data))
    assert found.weights_sha256 == expected.weights_sha256
    whole, told = (fit(language_model(), data, task=task) for task in (None, Tokens(shift=False)))
    assert whole.weights_sha256 == told.weights_sha256


def test_looking_at_more_samples_draws_nothing() -> None:
    class Drawing(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(index)

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    loader = DataLoader(Drawing(rows_of(masked())), batch_size=8)  # type: ignore[arg-type]
    assert not LoaderDataset.wrap(loader).repeats_inputs
    one = LoaderDataset.wrap(DataLoader(Drawing(rows_of(masked())[KEPT:])))  # type: ignore[arg-type]
    assert not one.repeats_inputs, "the first sample alone tells"
    found = random.random(), np.random.rand(), float(torch.rand(1))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    (random.random(), np.random.rand()), (random.random(), np.random.rand())  # of the first samples
    assert found == (random.random(), np.random.rand(), float(torch.rand(1)))


def test_what_could_not_be_looked_at_is_held_to_the_answer() -> None:
    class Passing:
        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[Any]:
            return iter(batches_of(masked())[:5])

    with pytest.raises(StageError, match=r"train micro-batch 1 of epoch 0.*targets are not the inputs.*shift=False"):
        fit(language_model(), cast(list[Any], Passing()), batch_size=None)
    with pytest.raises(
        ValueError, match=r"the test data: targets are not the inputs, .*Tokens\(shift=True\)"
    ) as caught:
        fit(language_model(), GIVEN, eval_data=masked())
    assert "\n" not in str(caught.value)
    fit(language_model(), GIVEN, eval_data=masked(), task=Tokens(shift=True))


def test_the_best_weights_are_the_tasks_best(tmp_path: Any) -> None:
    _, result = train("tokens", "sequential", best_dir=tmp_path)
    losses = [epoch.eval_loss for epoch in result.epochs]
    record = json.loads((tmp_path / "best.json").read_text())
    assert record["epoch"] == losses.index(min(losses))  # type: ignore[type-var]


def test_a_task_tells_its_settings_to_a_resume(tmp_path: Any) -> None:
    train("tokens", "sequential", snapshot_dir=tmp_path, snapshot_every=4)
    case = CASES["tokens"]
    trainer = Trainer(
        case.network(),
        rule=LLS(temperature=0.3),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        seed=3,
        threads=1,
        task=Tokens(bytes_per_token=2.0),
        resume=tmp_path,
    )
    with pytest.raises(ValueError, match="task"):
        trainer.fit(case.train, epochs=3, batch_size=8, eval_data=case.test, eval_batch_size=5)
