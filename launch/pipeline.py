"""Trains by the command line's wishes: `torchrun ... launch/pipeline.py FLAGS` or `python launch/pipeline.py FLAGS`."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlocked.launch.network import build_model
from unlocked.launch.options import RunOptions, parse

if TYPE_CHECKING:
    from unlocked.data import ImageDataset
    from unlocked.models import Block
    from unlocked.rules import Rule
    from unlocked.runtime.metrics.records import MetricsSink

__all__ = ["main", "make_model", "make_rule", "optimizer_factory", "run", "summary"]

OPTIMIZERS = ("SGD", "Adam", "AdamW", "AdamWSF", "AdamWScheduleFree", "SGDSF")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, and turns every failure into one line and an exit code: 2 for a user's mistake, 1 for a failed run, 130
    and 143 after an orderly stop."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        under_launcher = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        options = parse(arguments, default_engine="processes" if under_launcher else "sequential")
        return run(options)
    except ValueError as error:
        return _complain(rank, error, 2)
    except KeyboardInterrupt:
        return _complain(rank, "interrupted during set-up", 130)
    except Exception as error:
        from unlocked.workers.errors import LinkLostError, NonFiniteLossError, StageError

        cause = error.cause if isinstance(error, StageError) else error
        if not isinstance(cause, ValueError | LinkLostError | NonFiniteLossError) and not _was_told(error):
            traceback.print_exc()
        return _complain(rank, error, 1)


def run(options: RunOptions) -> int:
    """One run; returns the exit code."""
    from unlocked.data import load_dataset
    from unlocked.runtime import Trainer
    from unlocked.runtime.learning_rate import lr_schedule
    from unlocked.runtime.metrics.dashboard import Dashboard
    from unlocked.runtime.metrics.tensorboard import TensorBoard, require_tensorboard

    rule = make_rule(options)
    folder = None if options.save_path is None else options.save_path / options.run_name
    if folder is None and (options.snapshot_every or options.save_best_model):
        raise ValueError("--snapshot-every and --save-best-model need --save-path, the folder to write to")
    if options.tensorboard is not None:
        require_tensorboard()
    optimizer = optimizer_factory(options)
    lr_factor = lr_schedule(
        options.lr_scheduler,
        epochs=options.num_epochs,
        milestones=options.milestone,
        gamma=options.gamma,
        patience=options.patience,
        lr=options.lr,
    )
    for flag, path in (("--summary", options.summary), ("--trace", options.trace)):
        _check_writable(flag, path)
    sizes: dict[str, Any] = {} if options.image_size is None else {"image_size": options.image_size}
    train, test = load_dataset(options.dataset, options.dataset_dir, **sizes)
    sinks: list[MetricsSink] = []
    trainer = Trainer(
        make_model(options, train),
        rule=rule,
        optimizer=optimizer,
        engine=options.engine,
        seed=options.seed,
        stages=options.stages,
        queue_depth=options.queue_depth,
        device=options.device,
        kernels=options.kernels,
        precision=options.precision,
        graphs=options.graphs,
        graph_ticks=options.graph_ticks,
        green_contexts=options.green_contexts,
        compile=options.compile,
        lr_factor=lr_factor,
        statistics_batches=options.statistics_batches,
        snapshot_every=options.snapshot_every,
        snapshot_dir=None if folder is None else folder / "snapshots",
        resume=_snapshots_of(options.resume),
        print_freq=options.print_freq,
        trace=options.trace,
        timeout=options.timeout,
        prefetch=options.prefetch,
        threads=options.threads,
        pin=options.pin,
        transport=options.transport,
        coordinator_port=options.coordinator_port,
        best_dir=folder / "best" if folder is not None and options.save_best_model else None,
        sinks=partial(_make_sinks, options, folder, sinks),
        names={"model": options.model, "dataset": options.dataset, "rule": options.training_mode},
    )
    try:
        result = trainer.fit(
            train,
            epochs=options.num_epochs,
            batch_size=options.batch_size,
            eval_data=None if options.no_eval else test,
            eval_batch_size=options.test_batch_size,
            max_steps=options.max_steps,
        )
    finally:
        for sink in sinks:  # a live dashboard gives the terminal back before anything is said about a failure
            if isinstance(sink, Dashboard | TensorBoard):
                sink.close()
    if result.is_complete:
        _write_results(options, result, folder)
    if result.stopped_by is not None:
        if result.is_complete:
            print(f"stopped by signal {result.stopped_by} after {result.steps} training micro-batches", flush=True)
        return 128 + result.stopped_by
    return 0


def make_rule(options: RunOptions) -> "Rule | str":
    """The local rule that the options name, or "BP".

    Raises:
        ValueError: the name is not known.
    """
    from unlocked.rules import GLOBAL_RULES, get_rule

    if options.training_mode in GLOBAL_RULES:
        return options.training_mode
    return get_rule(
        options.training_mode,
        temperature=options.temperature,
        label_smoothing=options.label_smoothing,
        waveform=options.waveform,
    )


def make_model(options: RunOptions, data: "ImageDataset") -> "list[Block]":
    """The network that the options name, for images like those of `data`.

    Raises:
        ValueError: the name is not known, or the images are too small for it.
    """
    return build_model(options.model, options.training_mode, data, options.dropout)


def summary(options: RunOptions, result: Any) -> dict[str, Any]:
    """What `--summary` writes."""
    import torch

    return {
        "engine": result.engine,
        "stages": result.stages,
        "model": options.model,
        "training_mode": options.training_mode,
        "dataset": options.dataset,
        "epochs": len(result.epochs),
        "steps": result.steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "device": options.device,
        "precision": options.precision,
        "torch": torch.__version__,
        "train_seconds": result.train_seconds,
        "setup_seconds": result.setup_seconds,
        "images_per_second": result.images_per_second,
        "test_acc1": result.test_acc1,
        "test_loss": result.test_loss,
        "local_losses": result.local_losses,
        "weights_sha256": result.weights_sha256,
        "peak_memory_bytes": result.peak_memory_bytes,
        "busy_fraction": result.busy_fraction,
        "predicted_stage_seconds": result.predicted_stage_seconds,
        "measured_stage_seconds": result.measured_stage_seconds,
        "stopped_by": result.stopped_by,
        "epoch_results": [
            {"train_loss": e.train_loss, "train_acc1": e.train_acc1, "test_loss": e.eval_loss, "test_acc1": e.eval_acc1}
            for e in result.epochs
        ],
    }


def optimizer_factory(options: RunOptions) -> Callable[[Any], Any]:
    """Builds each layer's optimizer.

    Raises:
        ValueError: the name is not known, a value is out of range, or its library is not installed.
    """
    import torch

    if not options.lr > 0:
        raise ValueError(f"--lr is {options.lr}; it must be positive")
    if options.weight_decay < 0 or not 0 <= options.momentum < 1:
        raise ValueError(
            f"--weight-decay is {options.weight_decay} and --momentum {options.momentum}; valid: at least 0, and [0, 1)"
        )
    common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    name = options.optimizer
    if name == "SGD":
        return partial(torch.optim.SGD, momentum=options.momentum, fused=True, **common)
    if name == "Adam":
        return partial(torch.optim.Adam, fused=True, **common)
    if name == "AdamW":
        return partial(torch.optim.AdamW, fused=True, **common)
    if name == "AdamWSF":
        from unlocked.kernels.schedule_free import AdamWSF

        return partial(AdamWSF, **common)
    if name in ("AdamWScheduleFree", "SGDSF"):
        try:
            import schedulefree
        except ImportError as error:
            raise ValueError(f"optimizer {name} needs the package schedulefree; pip install schedulefree") from error
        if name == "AdamWScheduleFree":
            return partial(schedulefree.AdamWScheduleFree, **common)
        return partial(schedulefree.SGDScheduleFree, momentum=options.momentum, **common)
    raise ValueError(f"optimizer {name!r} is not known; valid: {', '.join(OPTIMIZERS)}")


def _make_sinks(options: RunOptions, folder: Path | None, made: "list[MetricsSink]") -> "list[MetricsSink]":
    """Called where the run reports: in the only process, or in rank 0's."""
    from unlocked.runtime.metrics.dashboard import Dashboard
    from unlocked.runtime.metrics.run_log import RunLog

    made.append(Dashboard(plain=True if options.plain else None))
    if folder is not None:
        made.append(RunLog(folder, options.as_dict(), resume=options.resume is not None))
    if options.tensorboard is not None:
        from unlocked.runtime.metrics.tensorboard import TensorBoard

        made.append(TensorBoard(options.tensorboard / options.run_name))
    return made


def _check_writable(flag: str, path: Path | None) -> None:
    """What is written when all is done must not fail then."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        problem = "is a folder" if path.is_dir() else "" if os.access(path.parent, os.W_OK) else "can't be written"
    except OSError as error:
        problem = f"can't be written ({error})"
    if problem:
        raise ValueError(f"{flag} {path} {problem}; give a file in a folder of yours")


def _write_results(options: RunOptions, result: Any, folder: Path | None) -> None:
    import torch

    content = summary(options, result)
    if options.summary is not None:
        options.summary.parent.mkdir(parents=True, exist_ok=True)
        options.summary.write_text(json.dumps(content, indent=1))
    if folder is not None:
        torch.save(result.weights, folder / "model_final.pt")
    if result.epochs and result.test_acc1 is not None:
        print(f"test accuracy {result.test_acc1:.2f} % after {len(result.epochs)} epochs", flush=True)
    rate = result.images_per_second
    print(f"{result.steps} micro-batches in {result.train_seconds:.1f} s, {rate:.0f} images/s", flush=True)
    if result.predicted_stage_seconds:
        print(_stage_times(result), flush=True)


def _stage_times(result: Any) -> str:
    """One line: how long each stage's part of a training step was expected to take, and took."""
    pairs = zip(result.predicted_stage_seconds, result.measured_stage_seconds, strict=True)
    times = " | ".join(f"{1e3 * predicted:.2f} -> {1e3 * measured:.2f}" for predicted, measured in pairs)
    return f"ms per step and stage, predicted -> measured: {times}"


def _snapshots_of(path: Path | None) -> Path | None:
    """--resume takes a run's folder or its folder of snapshots."""
    if path is not None and (path / "snapshots").is_dir():
        return path / "snapshots"
    return path


def _was_told(error: BaseException) -> bool:
    """The failure is another worker's, which has reported it with its own trace."""
    from unlocked.runtime.control.messages import RunFailed

    return isinstance(error, RunFailed | TimeoutError)


def _complain(rank: int, error: object, code: int) -> int:
    """One line on standard error, at once."""
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"error: {text}" if rank == 0 else f"error [rank {rank}]: {text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Native threads of a broken process group may never end; everything of ours is closed or lost by now.
    if code == 0 or "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    os._exit(code)
