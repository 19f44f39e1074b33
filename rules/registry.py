"""Rules by the names of the command line's --training-mode."""

from unlocked.rules.base import Rule
from unlocked.rules.drtp import DRTP
from unlocked.rules.lls import (
    LLS,
    LLS_M,
    LLS_M_Random,
    LLS_MxM,
    LLS_MxM_Random,
    LLS_MxM_reduced,
    LLS_Random,
    LLSConfig,
    LocalLosses,
)

__all__ = ["GLOBAL_RULES", "LOCAL_RULES", "RULES", "TRAINING_MODES", "get_rule"]

RULES: dict[str, type[LLSConfig]] = {
    rule.__name__: rule
    for rule in (LLS, LLS_M, LLS_MxM, LLS_MxM_reduced, LLS_Random, LLS_M_Random, LLS_MxM_Random, LocalLosses)
}
"""The LLS family, whose members all take a temperature, a label smoothing and a waveform."""
GLOBAL_RULES = ("BP", "DFA")
"""Not local, so there is no rule of a layer to build: `Trainer(rule="BP")`, in one stage only."""
LOCAL_RULES = (*RULES, "DRTP")
"""Every name of a rule that a layer can train by on its own."""
TRAINING_MODES = (*LOCAL_RULES, *GLOBAL_RULES)
"""Every value of --training-mode."""


def get_rule(name: str, *, temperature: float, label_smoothing: float, waveform: str) -> Rule:
    """The configured local rule of that name. DRTP has no temperature, label smoothing or waveform to be configured.

    Raises:
        ValueError: the name is not known (lists the valid ones), or a value lies outside its range.
    """
    if name == "DRTP":
        return DRTP
    if name not in RULES:
        raise ValueError(f"training mode {name!r} is not known; valid: {', '.join(TRAINING_MODES)}")
    return RULES[name](temperature=temperature, label_smoothing=label_smoothing, waveform=waveform)
