"""The command line: the authors' flags under their names, and ours. Fills `RunOptions`, and does nothing else."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

__all__ = ["LineParser", "RunOptions", "parse"]

DATASET_HELP = (
    "digits, synthetic, MNIST, FashionMNIST, CIFAR10, CIFAR10AUG, CIFAR100, CIFAR100AUG, IMAGENETTE, IMAGENETTE_BASIC, "
    "TinyIMAGENET, VWW, or folder (images in DIR/train/CLASS and DIR/test/CLASS, DIR being --dataset-dir)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Everything a run is told on the command line; see `--help` for the meanings."""

    dataset: str
    dataset_dir: Path
    model: str
    num_epochs: int
    lr: float
    training_mode: str
    waveform: str
    batch_size: int
    test_batch_size: int
    weight_decay: float
    momentum: float
    optimizer: str
    milestone: tuple[int, ...]
    gamma: float
    lr_scheduler: str
    print_freq: int
    experiment_name: str | None
    save_path: Path | None
    save_best_model: bool
    patience: int
    temperature: float
    label_smoothing: float
    dropout: float
    engine: str
    stages: int | str | None
    queue_depth: int
    device: str
    kernels: str
    precision: str
    graphs: bool
    graph_ticks: int
    green_contexts: str
    compile: bool
    seed: int
    max_steps: int | None
    no_eval: bool
    statistics_batches: int
    summary: Path | None
    trace: Path | None
    tensorboard: Path | None
    resume: Path | None
    snapshot_every: int
    plain: bool
    coordinator_port: int
    timeout: float
    transport: str
    prefetch: int | None
    threads: int | None
    pin: bool
    image_size: int | None

    @property
    def run_name(self) -> str:
        """The run's folder below the save path."""
        return self.experiment_name or f"{self.model}-{self.dataset}-{self.training_mode}-{self.optimizer}"

    def as_dict(self) -> dict[str, object]:
        """All settings as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def parse(arguments: Sequence[str] | None, *, default_engine: str) -> RunOptions:
    """Reads the command line. A mistake ends the program with one line and exit code 2.

    Args:
        arguments: without the program's name; None: those of this process.
        default_engine: "processes" under a launcher, else "sequential".
    """
    parser = LineParser(
        prog="pipeline.py",
        description="Trains a network by local learning rules, in one process or as a pipeline of processes.",
        epilog="As a pipeline: torchrun --standalone --nproc-per-node=2 launch/pipeline.py --dataset CIFAR10 ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_training_flags(parser.add_argument_group("training (the authors' flags)"))
    _add_run_flags(parser.add_argument_group("running"), default_engine)
    values = vars(parser.parse_args(arguments))
    for flag in ("pool", "record_gpu_mem"):
        del values[flag]
    if values["lr_scheduler"] is None:
        values["lr_scheduler"] = "MultiStepLR" if values["milestone"] else "none"
    values["milestone"] = tuple(values["milestone"] or _MILESTONES)
    return RunOptions(**values)


_MILESTONES = (50, 80, 120, 180)  # the authors', for MultiStepLR without --milestone


class LineParser(argparse.ArgumentParser):
    """Raises a ValueError of one line where argparse would print its usage and exit."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(f"{message}; see --help")


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", default="digits", help=DATASET_HELP)
    add("--dataset-dir", type=_path, default=Path("datasets"), help="folder of the datasets' official layouts")
    add("--model", default="SmallConv", help="with or without the prefix LLS_ or DFA_")
    add("--num-epochs", type=int, default=10, help="passes over the training data")
    add("--lr", type=float, default=0.01, help="initial learning rate")
    add("--training-mode", default="LLS", help="the local rule; or BP or DFA, for comparison (sequential only)")
    add("--waveform", default="cosine", help="of the fixed basis: cosine or square")
    add("--batch-size", type=int, default=64, help="rows of a training micro-batch")
    add("--test-batch-size", type=int, default=128, help="rows of an evaluation micro-batch")
    add("--weight-decay", type=float, default=0.0)
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--optimizer", default="Adam", help="SGD, Adam, AdamW, AdamWSF, AdamWScheduleFree, SGDSF")
    add(
        "-m", "--milestone", type=int, nargs="+", default=None, help="epochs at which MultiStepLR multiplies by --gamma"
    )
    add("--gamma", type=float, default=0.3, help="of MultiStepLR and ReduceLROnPlateau")
    add(
        "--lr-scheduler",
        default=None,
        help="none, MultiStepLR, CosineAnnealingLR, ReduceLROnPlateau (drains the pipeline at the end of each epoch); "
        "unless given: MultiStepLR where there are milestones, else none",
    )
    add("--print-freq", type=int, default=50, help="training micro-batches between two readings of the losses")
    add("--experiment-name", default=None, help="folder below --save-path")
    add("--save-path", type=_path, default=None, help="where log, metrics, config, snapshots and weights go")
    add("--save-best-model", action="store_true", help="keep the weights of the best test accuracy")
    add("--patience", type=int, default=10, help="epochs that ReduceLROnPlateau waits for a lower test loss")
    add("--temperature", type=float, default=0.5, help="the local scores are divided by it")
    add("--label-smoothing", type=float, default=0.0, help="of the local losses")
    add("--dropout", type=float, default=0.0)
    add("--pool", choices=["MAX"], default="MAX", help="between the blocks")
    add("--record-gpu-mem", action="store_true", help="changes nothing: the summary always has the peak memory")


def _add_run_flags(group: argparse._ArgumentGroup, default_engine: str) -> None:
    add = group.add_argument
    add("--engine", default=default_engine, help="sequential, streams or processes (the default under torchrun)")
    add("--stages", type=_stages, default=None, help='number of stages, or a list such as "0-1,2,3-4"')
    add("--queue-depth", type=int, default=4, help="micro-batches a stage may run ahead of the next one")
    add("--device", default="cpu", help="cpu, cuda or cuda:INDEX")
    add("--kernels", default="auto", help="auto, torch, cpp (CPU), triton or cuda (GPU)")
    add("--precision", default="fp32", help="fp32, tf32 (GPU) or bf16; weights and statistics stay float32")
    add("--no-graphs", dest="graphs", action="store_false", help="plain launches instead of CUDA graphs")
    add("--graph-ticks", type=int, default=32, help="micro-batches in one CUDA graph of all stages (0: a graph each)")
    add("--green-contexts", default="off", help="per stage, on a GPU: off, sms (a share of it) or queues")
    add("--compile", action="store_true", help="torch.compile for what trains through autograd (BP)")
    add("--seed", type=int, default=0, help="keys initialisation, shuffling, augmentation and dropout")
    add("--max-steps", type=int, default=None, help="stop after that many training micro-batches")
    add("--no-eval", action="store_true", help="train only")
    add("--statistics-batches", type=int, default=50, help="re-estimate BatchNorm from so many before an evaluation")
    add("--summary", type=_path, default=None, help="write a JSON summary here")
    add("--trace", type=_path, default=None, help="write a Chrome trace of every action here")
    add("--tensorboard", type=_path, default=None, help="write TensorBoard's event files below this folder")
    add("--resume", type=_path, default=None, help="go on from the newest snapshot in this folder")
    add("--snapshot-every", type=int, default=0, help="training micro-batches between snapshots (0: none)")
    add("--plain", action="store_true", help="lines instead of the dashboard")
    add("--coordinator-port", type=int, default=0, help="port of the coordinator (0: any free one)")
    add("--transport", default="auto", help="between processes: auto, shared (memory) or group (Gloo, NCCL)")
    add("--image-size", type=int, default=None, help="side in pixels that --dataset folder scales its images to")
    add("--prefetch", type=int, default=None, help="micro-batches to assemble ahead on the host (0: none)")
    add("--threads", type=int, default=None, help="intra-op threads of each process (default: torch's choice)")
    add("--no-pin", dest="pin", action="store_false", help="let processes of one machine share its cores freely")
    add("--timeout", type=float, default=300.0, help="seconds that a stage waits for a neighbour")


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _stages(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
