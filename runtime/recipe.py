"""A run from names: the dataset, model, rule and optimizer that a command line can spell, with all settings."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unlocked.data import DATASETS, ImageDataset, load_dataset
from unlocked.kernels.reference import WAVEFORMS
from unlocked.kernels.schedule_free import AdamWSF
from unlocked.models import Block, check_model_options, get_model, use_average_pools, use_tanh
from unlocked.rules import GLOBAL_RULES, OUTPUT_RULES, TRAINING_MODES, Rule, get_rule
from unlocked.runtime.engines import as_engine
from unlocked.runtime.fields import LARGEST, saved, setting, values_of
from unlocked.runtime.job import Engine
from unlocked.runtime.learning_rate import LR_SCHEDULES, LrSchedule, lr_schedule, warmed_up
from unlocked.runtime.model_options import ModelOptions
from unlocked.runtime.result import RunResult
from unlocked.runtime.run_sinks import make_sinks, require_packages
from unlocked.runtime.saving.run_folder import check_experiment_name, claim_folder, find_run, folder_name, give_up_claim
from unlocked.runtime.saving.tensor_file import save_weights
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.schedules.marks import Period
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.settings import Settings
from unlocked.runtime.summary import summary_of
from unlocked.runtime.text_options import TextOptions, check_reader
from unlocked.runtime.trainer import Trainer

__all__ = ["OPTIMIZERS", "Recipe", "make_lr_factor", "make_model", "make_optimizer", "make_rule", "place", "run"]

OPTIMIZERS = ("SGD", "Adam", "AdamW", "AdamWSF", "AdamWScheduleFree", "SGDSF")
_LARGEST_SIDE = 16384  # of an image, in pixels: four times what any dataset here has
_LARGEST_RATE = 3.4e38  # float32's largest number: how large a rate a network bears is for the run to find out
_LARGEST_FACTOR = 1e6  # of decays and temperatures: beyond it float32 overflows within a step or two
_OWN = (
    "model",
    "dataset",
    "training_mode",
    "waveform",
    "optimizer",
    "seed",
    "pool",
    "classes_per_batch",
)  # by these a run of a table is found again
_MILESTONES = (50, 80, 120, 180)  # the authors', for MultiStepLR without milestones


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings, ModelOptions, TextOptions):
    """Everything that a run by names is told: the authors' settings under their names, ours, those of `Settings`,
    `ModelOptions` and `TextOptions`, and the engine with its own.

    Raises:
        ValueError: a setting is out of range, or a name not known; says what is valid.
    """

    dataset: str = setting(
        "digits",
        "digits, synthetic, MNIST, FashionMNIST, CIFAR10, CIFAR10AUG, CIFAR100, CIFAR100AUG, IMAGENETTE, "
        "IMAGENETTE_BASIC, TinyIMAGENET, VWW, folder (images in DIR/train/CLASS and DIR/test/CLASS, DIR being "
        "--dataset-dir), stdlib (the source of Python's standard library, as bytes), or text (the files in DIR)",
        choices=tuple(DATASETS),
    )
    dataset_dir: Path = setting(Path("datasets"), "folder of the datasets' official layouts", place="folder")
    image_size: int | tuple[int, ...] | None = setting(
        None,
        "side in pixels, or height and width, that --dataset folder scales its images to, and of synthetic ones",
        at_least=1,
        at_most=_LARGEST_SIDE,
    )
    model: str = setting("SmallConv", "with or without the prefix LLS_ or DFA_")
    num_epochs: int = setting(10, "passes over the training data", at_least=1, at_most=LARGEST)
    lr: float = setting(0.01, "initial learning rate", above=0, at_most=_LARGEST_RATE)
    training_mode: str = setting(
        "LLS", "the local rule; or BP or DFA, for comparison (in one stage)", choices=TRAINING_MODES
    )
    waveform: str = setting("cosine", "of the fixed basis: cosine or square", choices=WAVEFORMS)
    batch_size: int = setting(64, "rows of a training micro-batch", at_least=1, at_most=LARGEST)
    test_batch_size: int = setting(128, "rows of an evaluation micro-batch", at_least=1, at_most=LARGEST)
    weight_decay: float = setting(0.0, "of the optimizer", at_least=0, at_most=_LARGEST_FACTOR)
    momentum: float = setting(0.9, "of SGD", at_least=0, below=1)
    output_loss: str = setting("cross-entropy", "of the output layer", choices=tuple(OUTPUT_RULES))
    clip_grad_norm: float | None = setting(
        None, "scale each layer's gradients down to this norm", above=0, at_most=_LARGEST_RATE
    )
    warmup_steps: int = setting(
        0,
        "training micro-batches over which the learning rate rises from 1/N of --lr to it",
        at_least=0,
        at_most=LARGEST,
    )
    optimizer: str = setting(
        "Adam",
        "SGD, Adam, AdamW, AdamWSF (the authors' release), AdamWScheduleFree (the library's), SGDSF",
        choices=OPTIMIZERS,
    )
    milestone: tuple[int, ...] = setting(
        (),
        "epochs at which MultiStepLR multiplies by --gamma (unless given: 50 80 120 180)",
        flag=("-m", "--milestone"),
        at_least=0,
        at_most=LARGEST,
    )
    gamma: float = setting(0.3, "of MultiStepLR, and below 1 of ReduceLROnPlateau", at_least=0, at_most=_LARGEST_FACTOR)
    lr_scheduler: str = setting(
        "",
        "none, MultiStepLR, CosineAnnealingLR, ReduceLROnPlateau (drains the pipeline at the end of each epoch); "
        "unless given: MultiStepLR where there are milestones, else none",
        choices=("", *LR_SCHEDULES),
    )
    experiment_name: str | None = setting(
        None,
        "the run's folder below --save-path; a second run of that name gets NAME-2, and so on; unless given: made of "
        "model, data, rule and optimizer",
    )
    save_path: Path | None = setting(
        None,
        "log, metrics, config, snapshots and weights go into a folder of the run's below this; unless given, on the "
        "command line: experiments, or $UNLOCKED_SAVE_PATH",
        place="new folder",
    )
    run_number: int | None = setting(
        None, "of the runs of one name; None: the next that is free", is_flag=False, at_least=1, at_most=LARGEST
    )
    save_best_model: bool = setting(False, "keep the weights of the best test accuracy")
    patience: int = setting(
        10, "epochs that ReduceLROnPlateau waits for a lower test loss", at_least=0, at_most=LARGEST
    )
    temperature: float = setting(0.5, "the local scores are divided by it", above=0, at_most=_LARGEST_FACTOR)
    label_smoothing: float = setting(0.0, "of the local losses", at_least=0, below=1)
    dropout: float = setting(0.0, "between the blocks", at_least=0, below=1)
    pool: str = setting("MAX", "2x2, between the blocks: MAX or AVG", choices=("MAX", "AVG"))
    classes_per_batch: int | None = setting(
        None,
        "of so many classes a training micro-batch holds samples; unless given: of any, and all samples once an epoch",
        at_least=1,
        at_most=LARGEST,
    )
    drop_last: bool = setting(False, "leave out the last training micro-batch of an epoch where it would be smaller")
    max_steps: int | None = setting(None, "stop after that many training micro-batches", at_least=1, at_most=LARGEST)
    no_eval: bool = setting(False, "train only")
    summary: Path | None = setting(None, "write a JSON summary here", place="JSON file")
    early_stop: int | None = setting(
        None, "stop after so many epochs without a lower test loss; drains at their ends", at_least=1, at_most=LARGEST
    )
    tensorboard: Path | None = setting(None, "write TensorBoard's event files below this folder", place="new folder")
    mlflow: Path | None = setting(None, "log to MLflow's mlflow.db in this folder", place="new folder")
    wandb: Path | None = setting(None, "write an offline run of Weights & Biases here", place="new folder")
    trackio: Path | None = setting(None, "write Trackio's database into this folder", place="new folder")
    plain: bool = setting(False, "lines instead of the dashboard")
    engine: Engine | str = "sequential"
    """As `Trainer` takes it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "engine", as_engine(self.engine))
        check_model_options(_network_of(self.model), values_of(self, ModelOptions))
        check_experiment_name(self.experiment_name)
        if not self.lr_scheduler:
            object.__setattr__(self, "lr_scheduler", "MultiStepLR" if self.milestone else "none")
        object.__setattr__(self, "milestone", self.milestone or _MILESTONES)

    @property
    def run_name(self) -> str:
        """The run's folder below the save path."""
        return folder_name(self.series, self.run_number or 1)

    @property
    def series(self) -> str:
        """What the run is called, and others like it."""
        return self.experiment_name or f"{self.model}-{self.dataset}-{self.training_mode}-{self.optimizer}"

    @property
    def folder(self) -> Path | None:
        """Where the run's files go."""
        return None if self.save_path is None else self.save_path / self.run_name

    def config(self) -> dict[str, Any]:
        """All settings as JSON values, the engine's beside the others, for the run's config.json."""
        engine = as_engine(self.engine)
        return {**saved(self), "engine": engine.name, **saved(engine)}

    def load_data(self) -> tuple[ImageDataset, ImageDataset]:
        """The training and the test data.

        Raises:
            ValueError: no such dataset, or its files are missing or damaged.
        """
        told = ("image_size", *values_of(self, TextOptions))
        sizes: dict[str, Any] = {name: value for name in told if (value := getattr(self, name)) is not None}
        train, test = load_dataset(self.dataset, self.dataset_dir, **sizes)
        return train if self.classes_per_batch is None else replace(
            train, classes_per_batch=self.classes_per_batch
        ), test

    def plan(self, train: ImageDataset, test: ImageDataset) -> StreamPlan:
        """The stream that `fit` makes of the data.

        Raises:
            ValueError: a number is out of range.
        """
        return StreamPlan(
            epochs=self.num_epochs,
            train_size=len(train),
            batch_size=self.batch_size,
            eval_size=0 if self.no_eval else len(test),
            eval_batch_size=self.test_batch_size,
            statistics_batches=self.statistics_batches,
            snapshot_every=0 if self.snapshot_every is None else Period.of(self.snapshot_every).steps,
            max_steps=self.max_steps,
            drop_last=self.drop_last,
        )

    def trainer(self, data: ImageDataset, kind: Callable[..., Trainer] = Trainer, **other: Any) -> Trainer:
        """The trainer for samples like those of `data`.

        Args:
            kind: `Trainer` or a subclass of it.
            other: arguments of `Trainer` that take the place of the recipe's, "model" among them.

        Raises:
            ValueError: a name is not known, or a value out of range.
        """
        resume = self.resume if self.resumes_by_itself else _snapshots_of(self.resume)
        how: dict[str, Any] = {**values_of(self, Settings), "engine": self.engine, "progress": False, "resume": resume}
        if (folder := self.folder) is not None:
            how["snapshot_dir"] = self.snapshot_dir or folder / "snapshots"
            how["best_dir"] = self.best_dir or (folder / "best" if self.save_best_model else None)
        how["names"] = {"model": self.model, "dataset": self.dataset, "rule": self.training_mode}
        makers = {"rule": make_rule, "optimizer": make_optimizer, "lr_factor": make_lr_factor}
        how |= {name: make(self) for name, make in makers.items() if name not in other}
        how |= {"output_rule": OUTPUT_RULES[self.output_loss], "clip_grad_norm": self.clip_grad_norm}
        if "model" not in other:
            how["model"] = make_model(self, data)
        return kind(**how | other)

    def fit(self, trainer: Trainer, train: ImageDataset, test: ImageDataset) -> RunResult:
        """Trains as long, and with micro-batches as large, as the recipe says."""
        return trainer.fit(
            train,
            epochs=self.num_epochs,
            batch_size=self.batch_size,
            eval_data=None if self.no_eval else test,
            eval_batch_size=self.test_batch_size,
            max_steps=self.max_steps,
            drop_last=self.drop_last,
        )


def place(recipe: Recipe) -> Recipe:
    """The recipe with the number of its run, whose folder it claims: the next number of its name that is free, or that
    of the run which is to go on. All processes of a run come to the same.

    Raises:
        ValueError: the save path can't be written.
    """
    if recipe.save_path is None or recipe.run_number is not None:
        return recipe
    mine = {name: getattr(recipe, name) for name in _OWN} if recipe.resumes_by_itself else None
    number = find_run(recipe.save_path, recipe.series, settings=mine, resume=recipe.resume)
    return replace(recipe, run_number=claim_folder(recipe.save_path, recipe.series, number))


def run(recipe: Recipe) -> RunResult:
    """One run with its dashboard, logs and files. Only a complete result (`RunResult.is_complete`) is written.

    Raises:
        ValueError: what is wrong with the recipe, its data or its files.
        StageError, RunFailed, TimeoutError: as `Trainer.fit`.
    """
    with contextlib.ExitStack() as held:
        recipe = place(recipe)
        if recipe.folder is not None:
            held.push(partial(_leave_folder, recipe.folder))
        elif recipe.snapshot_every or recipe.save_best_model:
            raise ValueError("--snapshot-every and --save-best-model need --save-path, the folder to write to")
        if recipe.early_stop is not None and recipe.no_eval:
            raise ValueError("--early-stop needs the test loss, which --no-eval leaves out; leave out one of them")
        require_packages(recipe)
        ready: dict[str, Any] = {
            "rule": make_rule(recipe),
            "optimizer": make_optimizer(recipe),
            "lr_factor": make_lr_factor(recipe),
        }
        train, test = recipe.load_data()
        trainer = recipe.trainer(train, **ready, sinks=partial(make_sinks, recipe, recipe.folder, held))
        result = recipe.fit(trainer, train, test)
        if result.is_complete:
            if recipe.summary is not None:
                recipe.summary.parent.mkdir(parents=True, exist_ok=True)
                write_json(recipe.summary, summary_of(values_of(recipe), result))
            if recipe.folder is not None:
                save_weights(recipe.folder / "model_final.pt", result.weights)
    return result


def make_rule(recipe: Recipe) -> Rule | str:
    """The local rule that the recipe names, or "BP" or "DFA".

    Raises:
        ValueError: a value is out of range.
    """
    if recipe.training_mode in GLOBAL_RULES:
        return recipe.training_mode
    return get_rule(
        recipe.training_mode,
        temperature=recipe.temperature,
        label_smoothing=recipe.label_smoothing,
        waveform=recipe.waveform,
    )


def make_model(recipe: Recipe, data: ImageDataset) -> list[Block]:
    """The network that the recipe names, for images like those of `data`.

    For DRTP the authors take tanh, as its inventors do, where the other rules have LeakyReLU.

    Raises:
        ValueError: the name is not known, or the images don't fit.
    """
    name = _network_of(recipe.model)
    check_reader(name, recipe.dataset, data)
    channels, *sides = (1, *data.image_shape) if data.num_tokens else data.image_shape
    blocks = get_model(
        name,
        in_channels=channels,
        num_classes=data.num_tokens or data.num_classes,
        image_size=sides,
        dropout=recipe.dropout,
        seed=recipe.seed,
        **values_of(recipe, ModelOptions),
    )
    if recipe.training_mode == "DRTP":
        use_tanh(blocks)
    if recipe.pool == "AVG":
        use_average_pools(blocks)
    return blocks


def make_optimizer(recipe: Recipe) -> Callable[[Any], Any]:
    """Builds each layer's optimizer from its parameters.

    Raises:
        ValueError: its library is not installed.
    """
    common: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    name = recipe.optimizer
    if name == "SGD":
        return partial(torch.optim.SGD, momentum=recipe.momentum, fused=True, **common)
    if name == "Adam":
        return partial(torch.optim.Adam, fused=True, **common)
    if name == "AdamW":
        return partial(torch.optim.AdamW, fused=True, **common)
    if name == "AdamWSF":
        return partial(AdamWSF, **common)
    try:
        import schedulefree
    except ImportError as error:
        raise ValueError(f"optimizer {name} needs the package schedulefree; pip install schedulefree") from error
    if name == "AdamWScheduleFree":
        return partial(schedulefree.AdamWScheduleFree, **common)
    return partial(schedulefree.SGDScheduleFree, momentum=recipe.momentum, **common)


def make_lr_factor(recipe: Recipe) -> LrSchedule:
    """What the learning rate is multiplied by, epoch by epoch.

    Raises:
        ValueError: a value of the schedule is out of range.
    """
    told: dict[str, Any] = {name: getattr(recipe, name) for name in ("patience", "gamma", "lr")}
    schedule = lr_schedule(recipe.lr_scheduler, epochs=recipe.num_epochs, milestones=recipe.milestone, **told)
    return warmed_up(schedule, recipe.warmup_steps)


def _leave_folder(folder: Path, kind: object, *_: object) -> None:
    if kind is not None or os.environ.get("RANK", "0") == "0":
        give_up_claim(folder, failed=kind is not None)


def _network_of(model: str) -> str:
    """The authors call the networks of their DFA runs DFA_SmallConvL and DFA_SmallConvLMNIST; both are SmallConvL."""
    return model.removeprefix("DFA_").removesuffix("MNIST") if model.startswith("DFA_") else model


def _snapshots_of(path: Path | None) -> Path | None:
    """A run is resumed from its folder or from its folder of snapshots."""
    if path is not None and (path / "snapshots").is_dir():
        return path / "snapshots"
    return path
