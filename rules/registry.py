"""Rules by the names of the command line's --training-mode."""

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

__all__ = ["RULES", "get_rule"]

RULES: dict[str, type[LLSConfig]] = {
    rule.__name__: rule
    for rule in (LLS, LLS_M, LLS_MxM, LLS_MxM_reduced, LLS_Random, LLS_M_Random, LLS_MxM_Random, LocalLosses)
}


def get_rule(name: str, *, temperature: float, label_smoothing: float, waveform: str) -> LLSConfig:
    """The configured rule of that name.

    Raises:
        ValueError: the name is not known (lists the valid ones), or a value lies outside its range.
    """
    if name not in RULES:
        raise ValueError(f"training mode {name!r} is not known; valid: {', '.join(RULES)}, BP")
    return RULES[name](temperature=temperature, label_smoothing=label_smoothing, waveform=waveform)
