"""The count of allocations, to the byte."""

import torch

from unlocked.comparison.memory.allocations import count_allocations


def test_the_count_is_exact() -> None:
    with count_allocations(torch.device("cpu")) as count:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(250)
    assert (count.peak, count.now) == (6000, 3000)
    assert second.numel() + third.numel() == 750
