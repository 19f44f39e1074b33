"""What is said of a GPU without one: a step's kernels are counted, priced, and compared from placement to placement."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unlocked.data import load_dataset

ROOT = Path(__file__).parents[1]


def test_placements_are_compared_and_one_that_differs_is_told(load: Any, tmp_path: Path) -> None:
    placements = load("gpu_placements")
    path = tmp_path / "placements.json"
    flags = ["--device", "cpu", "--what", "options", "--only", "SGD", "--json", str(path)]
    assert placements.main(flags) == 0
    (row,) = json.loads(path.read_text())["cases"]
    assert row["runs"][0] == row["runs"][1]
    assert row["digest"] == row["runs"][0][0]
    rates = itertools.count(1)  # every optimizer that is made has another
    chance = replace(
        next(iter(placements.cases("rules", "cpu"))),
        options={"optimizer": lambda params: torch.optim.SGD(params, lr=1e-3 * next(rates))},
    )
    data = load_dataset("digits")
    found = placements.compare(chance, data, "cpu")
    assert len(found["runs"]) == 2
    assert "digest" not in found
    wrong = placements.compare(replace(chance, batch_size=-1), data, "cpu")
    assert "batch_size" in wrong["error"]


def test_the_joined_kernels_stand_for_two_in_each_convolution(load: Any) -> None:
    """Of the first layer in any case: few elements make a kernel of its."""
    step_trace = load("step_trace")
    joined, apart = (step_trace.trace_local("SmallConv", 64, joined=joined) for joined in (True, False))
    assert len(apart.nodes) - len(joined.nodes) == 2
    assert joined.stages[0] == apart.stages[0]
    instead = ["norm_act_backward: reduction", "BatchNorm backward, weight gradient", "weight gradient's sum"]
    for stage in joined.stages[:3]:
        names = [node.name for node in stage]
        assert names[names.index("local_head") + 1 : -1] == instead
        product, total = stage[-3:-1]
        # What one leaves for the other; and no program does without a tile of the product.
        assert total.bytes == pytest.approx(total.flops * 4, rel=0.15)
        assert product.programs <= 132
    assert joined.stages[3:] == apart.stages[3:]
    # At least the product's multiplications, and no gradient as large as the output.
    for stage, other in zip(joined.stages[1:3], apart.stages[1:3], strict=True):
        (product,) = [n for n in stage if n.name == instead[1]]
        (library,) = [n for n in other if n.name == "convolution weight gradient"]
        assert library.flops <= product.flops <= 1.4 * library.flops


def test_backpropagation_has_input_gradients_and_lls_has_none(load: Any) -> None:
    step_trace = load("step_trace")
    local, whole = step_trace.trace_local("SmallConv", 64), step_trace.trace_backpropagation("SmallConv", 64)
    inputs = [[n.flops for n in t.nodes if n.name == "convolution input gradient"] for t in (local, whole)]
    assert inputs[0] == []
    # The second and the third convolution; nobody asks for the gradient of the images.
    assert sorted(inputs[1]) == [2 * 64 * 8 * 8 * 128 * 64 * 9, 2 * 64 * 16 * 16 * 64 * 32 * 9]


def test_a_step_in_bfloat16_has_the_kernels_of_one_in_float32(load: Any) -> None:
    """But for the output layer's input, which is float32; and it moves about half of the bytes."""
    step_trace = load("step_trace")
    wide, half = (step_trace.trace_local("SmallConv", 64, precision=name) for name in ("fp32", "bf16"))
    assert [n.name for n in half.nodes if n.name != "_to_copy"] == [n.name for n in wide.nodes]
    assert [n.layer for n in half.nodes if n.name == "_to_copy"] == ["output"]
    assert 0.5 < sum(n.bytes for n in half.nodes) / sum(n.bytes for n in wide.nodes) < 0.6
    assert sum(n.bytes for n in wide.nodes) == pytest.approx(105.4e6, rel=0.01)


def test_plans_move_the_bytes_that_they_say(load: Any) -> None:
    plans = {plan.name[:2].strip(): plan for plan in load("plans").PLANS if not plan.bf16}
    trace = load("step_trace").trace_local("SmallConv", 64)
    sizes = [4 * 64 * 32 * 32 * 32, 4 * 64 * 64 * 16 * 16, 4 * 64 * 128 * 8 * 8]  # of the convolutions' outputs
    moved = {name: sum(n.bytes for n in plan.apply(trace).nodes) for name, plan in plans.items()}
    # A: conv1's output is read once less, and its input of three float32 channels is not read.
    assert moved["as"] - moved["A:"] == pytest.approx(sizes[0] + 4 * 64 * 3 * 32 * 32, rel=0.02)
    # B: a gradient as large as the output is neither written nor read, in the two layers that are not joined as it is.
    assert moved["as"] - moved["B:"] == pytest.approx(2 * sum(sizes[1:]), rel=0.02)
    joined = [[n.name for n in stage if "," in n.name] for stage in plans["B:"].apply(trace).stages]
    assert joined == [["BatchNorm backward, weight gradient"]] * 3 + [[], []]


def test_a_node_takes_its_latency_and_its_bytes(load: Any) -> None:
    model, step_trace = load("cost_model"), load("step_trace")
    node = step_trace.Node("conv1", "F", "copy", "fused", 4_100_000, 0, 10_000, trips=1)
    assert model.floor_us(node, model.H200) == pytest.approx(1.0)
    assert model.node_us(node, model.H200) == pytest.approx(model.H200.node + model.H200.trip + 1.0)
    # One program draws twice one multiprocessor's share of the bandwidth.
    alone = step_trace.Node("conv1", "F", "copy", "fused", 4_100_000, 0, 1, trips=0)
    assert model.node_us(alone, model.H200) == pytest.approx(model.H200.node + 132 / 2)
    # A convolution takes its ramp; of three channels it is off the tensor cores, at a share of the plain units' rate.
    whole, few = (
        step_trace.Node("conv1", "F", "convolution forward", "conv", 0, 494_000_000, 132, 0, few_channels)
        for few_channels in (False, True)
    )
    base = model.H200.node + model.H200.ramp
    assert model.node_us(whole, model.H200) == pytest.approx(base + 1 / model.H200.efficiency_tf32)
    assert model.node_us(few, model.H200) == pytest.approx(base + 494 / 67 / model.H200.efficiency_few)


def test_the_pipeline_lies_between_its_bounds(load: Any) -> None:
    model, step_trace = load("cost_model"), load("step_trace")
    found = model.predict(step_trace.trace_local("SmallConv", 64), model.H200)
    assert found.serial == pytest.approx(sum(found.stages))
    bounds = (*found.stages, found.device, found.serial / model.H200.overlap)
    assert found.streamed == pytest.approx(max(bounds), rel=0.02)
    assert found.device < found.streamed < found.serial
    steps = model.EPOCHS * model.STEPS_PER_EPOCH
    assert found.run_seconds(model.H200, streamed=False) > 1e-6 * steps * found.serial


def test_the_document_has_every_table_and_no_unknown_one(load: Any) -> None:
    predict = load("predict")
    text = (ROOT / "docs" / "feasibility.md").read_text()
    for name in predict.TABLES:
        assert text.count(f"<!-- table: {name} -->") == 1
    updated = predict.update_document("before\n<!-- table: assumptions -->\nold\n<!-- end -->\nafter\n")
    assert "old" not in updated
    assert "vendor datasheet" in updated
    assert updated == predict.update_document(updated)
    with pytest.raises(ValueError, match="'nonsense' is not known"):
        predict.update_document("<!-- table: nonsense -->\n<!-- end -->")
