"""What backpropagation's pipelines minimise and count: the task's own, of whole predictions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.runtime.network import Network
from unlocked.workers.layer import count_correct

__all__ = ["mean_loss", "tally"]


def mean_loss(network: Network, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over what counts of a network's outputs [B, ...] and targets [B, ...]; autograd follows it."""
    return network.task.loss(*network.task.rows(outputs, targets))


def tally(network: Network, outputs: Tensor, targets: Tensor) -> Tensor:
    """The sums that the task's figures are read from, float64 [`network.num_sums`]; of a classification the loss, the
    hits, and the hits among five."""
    if network.task.name != "classification":
        return network.task.tally(*network.task.rows(outputs, targets))
    loss = F.cross_entropy(outputs, targets, reduction="sum").double()
    return torch.cat([loss[None], count_correct(outputs, targets)])  # what every contender counts by
