"""Every layer's rule is tried once before a run: what does not fit is said before the first step."""

from dataclasses import replace

import torch
from torch import Tensor

from unlocked.models.generators import SOURCES, GlobalGenerators
from unlocked.rules import LayerInfo, LocalRule, Rule
from unlocked.runtime.layer_rules import Rules, choose_rule, make_rule, misfit, rule_name
from unlocked.runtime.network import Network

__all__ = ["check_rules", "check_trainable"]


def check_rules(network: Network, rules: Rules) -> Network:
    """Builds every layer's rule and asks it for a loss of made-up samples and its gradient, so that what doesn't fit is
    said before training starts. What is built is thrown away, and the global random states are left as they were.

    Returns:
        The network, whose layers also draw from what their rules were seen to draw from.

    Raises:
        ValueError: rules for other layers than there are, or a rule that doesn't fit its layer; names the layer, the
            rule and the activations' shape.
    """
    generators = GlobalGenerators(SOURCES, torch.device("cpu"))
    draws = []
    for index, info in enumerate(network.infos):
        chosen = choose_rule(network.infos, index, rules)
        with generators.keyed(info.seed):
            rule = make_rule(chosen, info)
            activations = torch.randn(2, *info.activation_shape, requires_grad=True)
            before = generators.states()
            _try_rule(rule, activations, chosen, info)
            draws.append(network.draws[index] | generators.moved(before))
    return replace(network, draws=draws)


def check_trainable(network: Network, rules: Rules | str) -> None:
    """Raises a ValueError that names the layers if none of them has anything to train.

    Args:
        rules: the local rules, whose own parameters count; or the name of a global one, which has none.
    """
    parameters = [p for block in network.blocks for p in block.parameters()]
    if any(p.requires_grad for p in parameters):
        return
    if not isinstance(rules, str):
        with torch.random.fork_rng(devices=[]):
            made = [make_rule(choose_rule(network.infos, i, rules), info) for i, info in enumerate(network.infos)]
        if any(p.requires_grad for rule in made for p in rule.parameters()):
            return
    problem = "all their parameters are frozen (requires_grad=False)" if parameters else "they have no parameters"
    raise ValueError(f"no layer has anything to train: {', '.join(network.names)}; {problem}")


def _try_rule(rule: LocalRule, activations: Tensor, chosen: Rule, info: LayerInfo) -> None:
    depends = False
    try:
        with torch.enable_grad():
            loss = rule(activations, torch.zeros(2, dtype=torch.int64))
            if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
                depends = torch.autograd.grad(loss, activations, allow_unused=True)[0] is not None
    except (Exception, SystemExit) as error:
        raise misfit(info, chosen, error) from error
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the rule {rule_name(chosen)} of layer {info.name} gives a loss of {got}; it must be a scalar "
            "tensor, the mean over the micro-batch"
        )
    if not depends:
        raise ValueError(
            f"the rule {rule_name(chosen)} of layer {info.name} gives a loss that does not depend on the activations, "
            "so the layer can't learn from it"
        )
