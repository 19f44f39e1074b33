"""What a layer minimises: the local rules (`LOCAL_RULES`), cross-entropy, and the base of a rule of one's own."""

from unlocked.rules.auxiliary import DGL, AugLocal
from unlocked.rules.barlow_twins import BarlowTwins
from unlocked.rules.base import (
    CrossEntropy,
    HeadArguments,
    LayerInfo,
    LocalRule,
    Rule,
    TaskLoss,
    has_scores,
    needs_pass,
)
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
from unlocked.rules.passes import Carried, Draw, LayerPass, OutputHead, Views
from unlocked.rules.predictive_similarity import PredictiveSimilarity
from unlocked.rules.registry import GLOBAL_RULES, LOCAL_RULES, OTHER_RULES, RULES, TRAINING_MODES, get_rule
from unlocked.rules.soft_hebb import SoftHebb
from unlocked.rules.task_kinds import TASKS, Classification, MultiLabel, Regression, Segmentation, Tokens, infer_task
from unlocked.rules.tasks import CLASS_NUMBER, NO_TARGETS, Figures, TargetForm, Task
from unlocked.rules.zero_lock import FrozenHeadConsistency, TaskAndConsistency

__all__ = [
    "CLASS_NUMBER",
    "DGL",
    "DRTP",
    "GLOBAL_RULES",
    "LLS",
    "LLS_M",
    "LOCAL_RULES",
    "NO_TARGETS",
    "OTHER_RULES",
    "OUTPUT_RULES",
    "RULES",
    "TASKS",
    "TRAINING_MODES",
    "AugLocal",
    "BarlowTwins",
    "Carried",
    "Classification",
    "CrossEntropy",
    "DistanceForward",
    "Draw",
    "Figures",
    "ForwardForward",
    "FrozenHeadConsistency",
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
    "MultiLabel",
    "OutputHead",
    "PredictiveSimilarity",
    "Regression",
    "Rule",
    "Segmentation",
    "SoftHebb",
    "SquaredError",
    "TargetForm",
    "Task",
    "TaskAndConsistency",
    "TaskLoss",
    "Tokens",
    "Views",
    "get_rule",
    "has_scores",
    "infer_task",
    "needs_pass",
]
