"""Which layers form which stage: contiguous groups with the slowest as fast as possible, each layer owned once."""

import math
from collections.abc import Sequence
from itertools import accumulate

__all__ = ["check_ownership", "parse_stages", "partition", "stages_from"]


def partition(costs: Sequence[float], num_stages: int) -> list[range]:
    """Split layers into contiguous stages so that the most expensive stage is as cheap as possible.

    Among the splits with the smallest largest stage it takes the one with the smallest sum of squared stage costs, so
    that the other stages are balanced too. Sums are exact, so that the answer is the same on every machine.

    Args:
        costs: the cost of each layer (seconds, or any unit), each positive and finite.
        num_stages: how many stages to make, each with at least one layer.

    Returns:
        The layers of each stage, such as `[range(0, 2), range(2, 3)]`.

    Raises:
        ValueError: no layers, fewer than one stage, more stages than layers, or a cost that is not positive and finite.
    """
    num_layers = len(costs)
    if num_layers == 0:
        raise ValueError("there are no layers to split. Give at least one layer cost.")
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages} is not valid. Give at least 1 stage.")
    if num_stages > num_layers:
        raise ValueError(
            f"{num_stages} stages need at least {num_stages} layers, but there are only {num_layers}. "
            f"Ask for at most {num_layers} stages."
        )
    prefix = [0, *accumulate(_as_integers(costs))]
    return _least_squares(prefix, num_stages, limit=_smallest_limit(prefix, num_stages))


def check_ownership(parts: Sequence[range], num_layers: int) -> None:
    """Check that the stages own layers 0, ..., `num_layers` - 1 in order, each exactly once, and that none is empty.

    Raises:
        ValueError: names the first stage and layer for which this does not hold.
    """
    if not parts:
        raise ValueError(f"there are no stages, but {num_layers} layers. Give at least one stage.")
    expected = 0
    for stage, part in enumerate(parts):
        if len(part) == 0:
            raise ValueError(f"stage {stage} owns no layer. Give every stage at least one layer, or use fewer stages.")
        for layer in part:
            if not 0 <= layer < num_layers:
                raise ValueError(
                    f"stage {stage} claims layer {layer}, but the model has only layers 0 to {num_layers - 1}."
                )
            if layer > expected:
                raise ValueError(
                    f"stage {stage} has layer {layer} where layer {expected} should come. "
                    f"Stages own the layers in order, without gaps."
                )
            if layer < expected:
                raise ValueError(
                    f"stage {stage} claims layer {layer}, which already has an owner. "
                    "Every layer belongs to exactly one stage, in order."
                )
            expected += 1
    if expected < num_layers:
        raise ValueError(
            f"no stage owns layer {expected} of the model's {num_layers} layers (0 to {num_layers - 1}). "
            "Add the rest to the last stage, or a stage for it."
        )


def parse_stages(text: str, names: Sequence[str]) -> list[range]:
    """The stages that an explicit list describes: `"0-1,2,3-4"` is three stages, ends included.

    Layers may also be given by name (`"conv1-conv2,head"`); where a name is itself a number, the number wins.

    Args:
        text: stages separated by commas, each one layer or `first-last`.
        names: the model's layer names in order.

    Raises:
        ValueError: a part that is neither, or stages that do not own every layer exactly once.
    """
    layers = {name: number for number, name in enumerate(names)}
    parts = [_parse_stage(part.strip(), layers, text) for part in text.split(",")]
    try:
        check_ownership(parts, len(names))
    except ValueError as error:
        listing = ", ".join(f"{number} {name}" for number, name in enumerate(names))
        raise ValueError(f"stages {text!r}: {error} The layers are: {listing}.") from None
    return parts


def _as_integers(costs: Sequence[float]) -> list[int]:
    """The costs over one common denominator: floats are fractions with a power of two below, so this loses nothing."""
    for layer, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost > 0):
            raise ValueError(
                f"the cost of layer {layer} is {cost}. Costs must be positive and finite; measure it again."
            )
    ratios = [float(cost).as_integer_ratio() for cost in costs]
    common = max(denominator for _, denominator in ratios)
    return [numerator * (common // denominator) for numerator, denominator in ratios]


def _smallest_limit(prefix: Sequence[int], num_stages: int) -> int:
    """The smallest possible cost of the largest stage, by binary search over the limit."""
    num_layers = len(prefix) - 1

    def fits(limit: int) -> bool:
        # Filling every stage to the limit uses the fewest stages; with layers to spare, fewer can be split up to more.
        stages, start = 1, 0
        for layer in range(num_layers):
            if prefix[layer + 1] - prefix[start] > limit:
                stages, start = stages + 1, layer
        return stages <= num_stages

    low, high = max(prefix[i + 1] - prefix[i] for i in range(num_layers)), prefix[-1]
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _least_squares(prefix: Sequence[int], num_stages: int, *, limit: int) -> list[range]:
    """The split with the smallest sum of squares among those with no stage above `limit`, by dynamic programming."""
    num_layers = len(prefix) - 1
    best: list[int | None] = [0] + [None] * num_layers  # best[end]: the first `end` layers in `stage` stages
    cuts: list[list[int]] = []  # cuts[stage][end]: where that split's last stage starts
    for stage in range(num_stages):
        following: list[int | None] = [None] * (num_layers + 1)
        cut = [0] * (num_layers + 1)
        for end in range(stage + 1, num_layers - (num_stages - stage - 1) + 1):
            for start in range(end - 1, stage - 1, -1):
                cost = prefix[end] - prefix[start]
                if cost > limit:
                    break
                before, known = best[start], following[end]
                if before is not None and (known is None or before + cost * cost < known):
                    following[end], cut[end] = before + cost * cost, start
        best = following
        cuts.append(cut)
    return stages_from(cuts, num_layers)


def stages_from(cuts: Sequence[Sequence[int]], num_layers: int) -> list[range]:
    """The stages of a dynamic program: `cuts[stage][end]` says where the stage begins that ends before layer `end`."""
    parts: list[range] = []
    end = num_layers
    for cut in reversed(cuts):
        parts.append(range(cut[end], end))
        end = cut[end]
    return parts[::-1]


def _parse_stage(part: str, layers: dict[str, int], text: str) -> range:
    if (single := _parse_layer(part, layers)) is not None:
        return range(single, single + 1)
    # A name may hold a dash itself, so every dash is tried.
    for dash in (place for place, letter in enumerate(part) if letter == "-"):
        first, last = _parse_layer(part[:dash], layers), _parse_layer(part[dash + 1 :], layers)
        if first is not None and last is not None:
            if first > last:
                raise ValueError(f"stages {text!r}: {part!r} runs backwards. Write {part[dash + 1 :]}-{part[:dash]}.")
            return range(first, last + 1)
    raise ValueError(
        f"stages {text!r}: {part!r} is neither a layer nor first-last. "
        "Write layer numbers or names separated by commas, such as 0-1,2,3-4."
    )


def _parse_layer(word: str, layers: dict[str, int]) -> int | None:
    word = word.strip()
    return int(word) if word.isascii() and word.isdigit() else layers.get(word)
