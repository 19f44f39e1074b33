"""Rules by the names of the command line's --training-mode."""

from unlocked.rules.auxiliary import DGL, AugLocal
from unlocked.rules.barlow_twins import BarlowTwins
from unlocked.rules.base import Rule
from unlocked.rules.distance_forward import DistanceForward
from unlocked.rules.drtp import DRTP
from unlocked.rules.forward_forward import ForwardForward
from unlocked.rules.info_pro import InfoPro, InfoProContrastive
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
from unlocked.rules.mono_forward import MonoForward
from unlocked.rules.predictive_similarity import PredictiveSimilarity
from unlocked.rules.soft_hebb import SoftHebb
from unlocked.rules.zero_lock import TaskAndConsistency

__all__ = ["GLOBAL_RULES", "LOCAL_RULES", "OTHER_RULES", "RULES", "TRAINING_MODES", "get_rule"]

RULES: dict[str, type[LLSConfig]] = {
    rule.__name__: rule
    for rule in (LLS, LLS_M, LLS_MxM, LLS_MxM_reduced, LLS_Random, LLS_M_Random, LLS_MxM_Random, LocalLosses)
}
"""The LLS family, whose members all take a temperature, a label smoothing and a waveform."""
OTHER_RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        *(DRTP, MonoForward, PredictiveSimilarity, DGL, AugLocal, SoftHebb, ForwardForward, TaskAndConsistency),
        *(BarlowTwins, InfoPro, InfoProContrastive, DistanceForward),
    )
}
"""Rules with settings of their own, or none: by name they have the defaults, in Python `partial(Rule, setting=...)`."""
GLOBAL_RULES = ("BP", "DFA")
"""Not local, so there is no rule of a layer to build: `Trainer(rule="BP")`, in one stage only."""
LOCAL_RULES = (*RULES, *OTHER_RULES)
"""Every name of a rule that a layer can train by on its own."""
TRAINING_MODES = (*LOCAL_RULES, *GLOBAL_RULES)
"""Every value of --training-mode."""


def get_rule(name: str, *, temperature: float, label_smoothing: float, waveform: str) -> Rule:
    """The configured local rule of that name. Only the LLS family has a temperature, a
    label smoothing and a waveform to be configured.

    Raises:
        ValueError: the name is not known (lists the valid ones), or a value lies outside its range.
    """
    if name in OTHER_RULES:
        return OTHER_RULES[name]
    if name not in RULES:
        raise ValueError(f"training mode {name!r} is not known; valid: {', '.join(TRAINING_MODES)}")
    return RULES[name](temperature=temperature, label_smoothing=label_smoothing, waveform=waveform)
