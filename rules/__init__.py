"""What a layer minimises: the LLS family, LocalLosses, DRTP, cross-entropy, and the base of a rule of one's own."""

from unlocked.rules.base import CrossEntropy, HeadArguments, LayerInfo, LocalRule, Rule
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
from unlocked.rules.registry import GLOBAL_RULES, LOCAL_RULES, RULES, TRAINING_MODES, get_rule

__all__ = [
    "DRTP",
    "GLOBAL_RULES",
    "LLS",
    "LLS_M",
    "LOCAL_RULES",
    "RULES",
    "TRAINING_MODES",
    "CrossEntropy",
    "HeadArguments",
    "LLSConfig",
    "LLS_M_Random",
    "LLS_MxM",
    "LLS_MxM_Random",
    "LLS_MxM_reduced",
    "LLS_Random",
    "LayerInfo",
    "LocalLosses",
    "LocalRule",
    "Rule",
    "get_rule",
]
