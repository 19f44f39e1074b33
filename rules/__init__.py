"""What a layer minimises: the local rules (`LOCAL_RULES`), cross-entropy, and the base of a rule of one's own."""

from unlocked.rules.auxiliary import DGL, AugLocal
from unlocked.rules.barlow_twins import BarlowTwins
from unlocked.rules.base import CrossEntropy, HeadArguments, LayerInfo, LocalRule, Rule, has_scores, needs_pass
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
from unlocked.rules.output import OUTPUT_RULES, Margin, SquaredError
from unlocked.rules.passes import Carried, Draw, LayerPass, Views
from unlocked.rules.predictive_similarity import PredictiveSimilarity
from unlocked.rules.registry import GLOBAL_RULES, LOCAL_RULES, OTHER_RULES, RULES, TRAINING_MODES, get_rule
from unlocked.rules.soft_hebb import SoftHebb
from unlocked.rules.zero_lock import TaskAndConsistency

__all__ = [
    "DGL",
    "DRTP",
    "GLOBAL_RULES",
    "LLS",
    "LLS_M",
    "LOCAL_RULES",
    "OTHER_RULES",
    "OUTPUT_RULES",
    "RULES",
    "TRAINING_MODES",
    "AugLocal",
    "BarlowTwins",
    "Carried",
    "CrossEntropy",
    "DistanceForward",
    "Draw",
    "ForwardForward",
    "HeadArguments",
    "InfoPro",
    "InfoProContrastive",
    "LLSConfig",
    "LLS_M_Random",
    "LLS_MxM",
    "LLS_MxM_Random",
    "LLS_MxM_reduced",
    "LLS_Random",
    "LayerInfo",
    "LayerPass",
    "LocalLosses",
    "LocalRule",
    "Margin",
    "MonoForward",
    "PredictiveSimilarity",
    "Rule",
    "SoftHebb",
    "SquaredError",
    "TaskAndConsistency",
    "Views",
    "get_rule",
    "has_scores",
    "needs_pass",
]
