"""unlocked: trains networks by local learning rules as a pipeline, exactly as the plain loop would.

Names are imported on first use: `import unlocked` alone needs neither torch nor a second of time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlocked.data import load_dataset
    from unlocked.kernels.schedule_free import AdamWSF
    from unlocked.rules import (
        DRTP,
        LLS,
        LLS_M,
        LayerInfo,
        LLS_M_Random,
        LLS_MxM,
        LLS_MxM_Random,
        LLS_MxM_reduced,
        LLS_Random,
        LocalLosses,
        LocalRule,
    )
    from unlocked.runtime import Evaluation, Processes, ReduceLROnPlateau, RunResult, Sequential, Streams, Trainer
    from unlocked.runtime.exporting import export
    from unlocked.runtime.saving.model_file import load

__all__ = [
    "DRTP",
    "LLS",
    "LLS_M",
    "LLS_M_Random",
    "LLS_MxM",
    "LLS_MxM_Random",
    "LLS_MxM_reduced",
    "LLS_Random",
    "AdamWSF",
    "Evaluation",
    "LayerInfo",
    "LocalLosses",
    "LocalRule",
    "Processes",
    "ReduceLROnPlateau",
    "RunResult",
    "Sequential",
    "Streams",
    "Trainer",
    "__version__",
    "export",
    "load",
    "load_dataset",
]
__version__ = "0.1.0"

_HOMES = {
    "AdamWSF": "unlocked.kernels.schedule_free",
    **dict.fromkeys(
        ("Evaluation", "Processes", "ReduceLROnPlateau", "RunResult", "Sequential", "Streams", "Trainer"),
        "unlocked.runtime",
    ),
    "export": "unlocked.runtime.exporting",
    "load": "unlocked.runtime.saving.model_file",
    "load_dataset": "unlocked.data",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(_HOMES.get(name, "unlocked.rules")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
