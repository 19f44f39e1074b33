"""A command line whose mistakes are one line each and whose help is read at 80 columns."""

import argparse
import difflib
import shutil
from collections.abc import Iterable
from typing import Any

__all__ = ["LineParser", "nearest"]


class LineParser(argparse.ArgumentParser):
    """Raises a ValueError of one line where argparse would print its usage and exit, and names the flag that was meant.

    Its help is made for 80 columns.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **options})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            flag = word.partition("=")[0]
            if flag.startswith("-"):
                raise ValueError(f"there is no flag {flag}{nearest(flag, self._option_string_actions)}; see --help")
        if unknown:
            raise ValueError(f"nothing takes the argument {unknown[0]!r:.80}; see --help")
        return known

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(f"{message}; see --help")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause with the valid name that `name` most likely stands for; empty if none is like it."""
    plain = {one.lstrip("-").replace("-", "_"): one for one in valid}
    told = name.lstrip("-").replace("-", "_").lower()
    if _MEANT.get(told) in plain:
        return f"; did you mean {plain[_MEANT[told]]}?"
    close = difflib.get_close_matches(told, plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[close[0]]}?" if close else ""


class _Help(argparse.HelpFormatter):
    """Flags in a narrow column, each with what it takes once; texts of at most 80 columns."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=26, width=max(40, min(columns, 80)))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        takes = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {takes}"


_MEANT = {
    **dict.fromkeys(("learning_rate", "learningrate", "alpha"), "lr"),
    **dict.fromkeys(("epochs", "max_epochs", "n_epochs", "epoch"), "num_epochs"),
    **dict.fromkeys(("bs", "train_batch_size", "batchsize", "batch", "per_device_train_batch_size"), "batch_size"),
    **dict.fromkeys(("eval_batch_size", "val_batch_size"), "test_batch_size"),
    **dict.fromkeys(("rule", "mode", "algorithm"), "training_mode"),
    **dict.fromkeys(("scheduler", "schedule", "lr_schedule"), "lr_scheduler"),
    **dict.fromkeys(("name", "run_name", "experiment"), "experiment_name"),
    **dict.fromkeys(("output", "output_dir", "out", "save_dir", "log_dir", "logdir"), "save_path"),
    **dict.fromkeys(("data", "data_dir", "data_path"), "dataset_dir"),
    **dict.fromkeys(("arch", "network", "architecture", "net"), "model"),
    **dict.fromkeys(("wd", "decay", "l2"), "weight_decay"),
    **dict.fromkeys(("opt", "optim"), "optimizer"),
    **dict.fromkeys(("workers", "num_stages", "world_size", "nproc_per_node", "nproc"), "stages"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("amp", "dtype", "fp16", "bf16", "half"), "precision"),
    **dict.fromkeys(("log_interval", "print_frequency", "log_every", "print_every"), "print_freq"),
    **dict.fromkeys(("checkpoint_every", "save_every", "save_freq"), "snapshot_every"),
    **dict.fromkeys(("milestones", "lr_milestones", "lr_steps"), "milestone"),
}
"""What other programs call a setting -> what it is called here."""
