"""Where stages begin, by what layers and links take: against a search through all cuts, and against the simulator."""

import json
import random
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from unlocked.runtime.schedules.partition import partition
from unlocked.runtime.schedules.placement import LayerCost, Link, Machine, Placement, cut_stages, fewest_stages
from unlocked.runtime.schedules.placement_file import read_placement, write_placement
from unlocked.runtime.schedules.schedule import build_schedule
from unlocked.runtime.schedules.simulate import Costs, main, simulate
from unlocked.runtime.schedules.stream import StreamPlan

SLOW = Link(latency=0.02, bandwidth=12.5e6)
QUICK = Link(latency=1e-5, bandwidth=1e9)


def layers(*sizes: tuple[float, int]) -> list[LayerCost]:
    return [LayerCost(f"layer{k}", 0.4 * cost, 0.6 * cost, size) for k, (cost, size) in enumerate(sizes)]


FIVE = layers((0.01, 800_000), (0.01, 800_000), (0.01, 60_000), (0.01, 800_000), (0.01, 0))


def placement(**changes: Any) -> Placement:
    made: dict[str, Any] = {
        "batch_size": 64,
        "layers": tuple(FIVE),
        "machines": (Machine(2, 2), Machine(1, 4)),
        "links": (QUICK, SLOW),
        "stages": (range(2), range(2, 3), range(3, 5)),
    }
    return Placement(**made | changes)


def slowest(costs: list[LayerCost], parts: list[range], links: list[Link | None], depth: int) -> float:
    """As the definition says it, apart from the code that is tried."""
    found = []
    for stage, part in enumerate(parts):
        compute = sum(costs[i].forward + costs[i].update for i in part)
        found.append(compute)
        link = links[stage - 1] if stage else None
        if link is not None:
            passing = costs[part.start - 1].output_bytes / link.bandwidth
            found += [passing, (2 * link.latency + passing + compute) / depth]
    return max(found)


def test_the_cut_is_the_best_of_all() -> None:
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randint(2, 7)
        costs = layers(*((draw.uniform(0.001, 0.02), draw.randint(1, 10**6)) for _ in range(count)))
        stages, depth = draw.randint(1, count), draw.randint(1, 5)
        choices: list[Link | None] = [None, SLOW, QUICK, Link(draw.uniform(0, 0.05), draw.uniform(1e6, 1e9))]
        links = [draw.choice(choices) for _ in range(stages - 1)]
        found = cut_stages(costs, stages, links, queue_depth=depth)
        assert [i for part in found for i in part] == list(range(count))
        best = min(
            slowest(costs, [range(a, b) for a, b in zip((0, *ends), (*ends, count), strict=True)], links, depth)
            for ends in combinations(range(1, count), stages - 1)
        )
        assert slowest(costs, found, links, depth) == pytest.approx(best, rel=1e-9)
        assert found == cut_stages(costs, stages, links, queue_depth=depth)


def test_a_slow_link_moves_the_boundary_to_where_little_passes() -> None:
    quick = cut_stages(FIVE, 3, [QUICK, QUICK], queue_depth=4)
    assert [part.start for part in quick] != [0, 2, 3]
    assert cut_stages(FIVE, 3, [QUICK, SLOW], queue_depth=4)[2] == range(3, 5)
    assert cut_stages(FIVE, 3, [SLOW, QUICK], queue_depth=4)[1].start == 3


def test_without_links_layers_are_cut_as_ever() -> None:
    costs = layers((3.0, 10), (1.0, 10), (1.0, 10), (2.0, 10), (2.5, 0))
    for links in ([], [None, None]):
        assert cut_stages(costs, 3, links, queue_depth=1) == partition([3.0, 1.0, 1.0, 2.0, 2.5], 3)
    with pytest.raises(ValueError, match="6 stages need at least 6 layers"):
        cut_stages(costs, 6, [QUICK] * 5, queue_depth=1)


@pytest.mark.parametrize("depth", [2, 4])
def test_the_pace_is_that_of_the_simulator(depth: int) -> None:
    for links in ((QUICK, SLOW), (SLOW, None), ()):
        made = placement(links=links, machines=(Machine(3, 3),))
        costs = Costs(made.action_seconds(), made.link_seconds(depth))
        plan = StreamPlan(epochs=1, train_size=200 * 64, batch_size=64)
        timeline = simulate(build_schedule(3, plan), costs, depth)
        assert timeline.throughput == pytest.approx(1 / made.pace(depth), rel=0.01)
        assert timeline.makespan == pytest.approx(made.run_seconds(plan, 0, depth), rel=0.02)
        assert made.images_per_second(plan, 0, depth) == pytest.approx(200 * 64 / timeline.makespan, rel=0.02)


def test_what_is_predicted_counts_evaluations_and_leaves_out_what_is_done() -> None:
    made = placement(links=(), machines=(Machine(3, 3),))
    plan = StreamPlan(epochs=2, train_size=640, batch_size=64, eval_size=128, eval_batch_size=128, statistics_batches=5)
    filling = 0.05 - 0.02
    epoch = 10 * 0.02 + 5 * 0.008 + 2 * 0.008  # the slowest stage's two layers, and four tenths of that forward
    assert made.run_seconds(plan, 0, 4) == pytest.approx(filling + 2 * epoch)
    assert made.run_seconds(plan, plan.end_of_epoch(0), 4) == pytest.approx(filling + epoch)
    assert made.images_per_second(plan, plan.end_of_epoch(0), 4) == pytest.approx(640 / (filling + epoch))
    assert made.images_per_second(plan, len(plan), 4) == 0.0


def test_stages_that_share_fewer_cores_take_turns() -> None:
    assert placement(links=(), machines=(Machine(3, 3),)).pace(4) == pytest.approx(0.02)
    assert placement(links=(), machines=(Machine(3, 2),)).pace(4) == pytest.approx(0.025)
    assert placement(links=(), machines=(Machine(1, 1), Machine(2, 1))).pace(4) == pytest.approx(0.03)


def test_no_more_processes_than_pay() -> None:
    hot = layers((0.05, 1), (0.01, 1), (0.01, 1), (0.01, 1), (0.01, 0))
    count, paces = fewest_stages(hot, 16)
    assert count == 2
    assert paces == pytest.approx([0.09, 0.05, 0.05, 0.05, 0.05])
    assert fewest_stages(hot, 1)[0] == 1
    assert fewest_stages(layers((1.0, 1), (0.5, 1), (0.51, 0)), 3)[0] == 2  # a third would bring 1 %
    assert fewest_stages(layers((1.0, 1), (0.5, 1), (0.6, 0)), 3)[0] == 3
    assert fewest_stages(layers(*[(0.01, 1)] * 4), 3)[0] == 2  # three would have two layers in one of them, too


def test_a_file_gives_the_same_placement_back(tmp_path: Path) -> None:
    for made in (placement(), placement(links=()), placement(links=(None, SLOW))):
        write_placement(tmp_path / "new" / "placement.json", made)
        assert read_placement(tmp_path / "new" / "placement.json") == made


def test_the_simulator_plays_what_a_file_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "placement.json"
    made = placement(links=(SLOW, QUICK))  # into the second stage, what takes longest
    write_placement(path, made)
    given = ["--placement", str(path), "--microbatches", "50"]
    assert main([*given, "--queue-depth", "4"]) == 0
    told = re.search(r"([\d.]+) micro-batches/s", capsys.readouterr().out)
    assert told is not None
    assert float(told[1]) == pytest.approx(1 / made.pace(4), rel=0.01)
    assert main([*given, "--stages", "4"]) == 2
    assert capsys.readouterr().err == "error: --stages is the placement's to say; leave it out, or --placement\n"
    assert main(["--placement", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"error: placement {tmp_path / 'none'} can't be read (No such file")


def damaged() -> dict[str, tuple[Any, str]]:
    """What is wrong with a file -> its content, and what is said of it."""
    text = json.dumps({"format": "unlocked placement 1"})
    whole = json.loads(_text(placement()))

    def changed(*path: Any, to: Any) -> str:
        content = json.loads(json.dumps(whole))
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        return json.dumps(content)

    return {
        "nothing": ("", "Expecting value"),
        "half": (_text(placement())[:300], "damaged, or no placement"),
        "bytes": (b"\xff\xfe\x00", "damaged, or no placement"),
        "a list": ("[]", "the file is no object"),
        "too little": (text, "the file lacks batch_size"),
        "depth": ("[" * 100_000, "damaged, or no placement"),
        "a long number": ('{"format": ' + "9" * 10_000 + "}", "damaged, or no placement"),
        "size": (" " * (5 << 20), "it has more than 4194304 bytes"),
        "NaN": (changed("layers", 0, "forward_seconds", to=float("nan")), "NaN is no number"),
        "infinity": (changed("links", 0, "bytes_per_second", to=float("inf")), "Infinity is no number"),
        "a huge number": (changed("links", 0, "latency_seconds", to=0).replace("0}", "1e999}", 1), "it must be"),
        "negative": (changed("layers", 0, "update_seconds", to=-1), "update_seconds is -1; it must be a number of 0"),
        "no time": (changed("layers", 0, "update_seconds", to=0), ""),
        "a word": (changed("layers", 1, "output_bytes", to="many"), "layers[1].output_bytes is 'many'"),
        "true": (changed("batch_size", to=True), "batch_size is True"),
        "a fraction": (changed("layers", 1, "output_bytes", to=1.5), "it must be a whole number"),
        "no speed": (changed("links", 0, "bytes_per_second", to=0), "it must be at least 1"),
        "one link too few": (changed("links", to=[None]), "1 links are between 3 stages"),
        "no processes": (changed("machines", to=[]), "don't have the processes"),
        "another layer": (changed("stages", 0, to=["layer7"]), "stages[0] has 'layer7'"),
        "an order": (changed("stages", 0, to=["layer1", "layer0"]), "in another order"),
        "an empty stage": (changed("stages", 0, to=[]), "stages[0] has no layer"),
        "a layer left out": (changed("stages", 2, to=["layer3"]), "no stage owns layer 4"),
        "two of a name": (changed("layers", 1, "name", to="layer0"), "two layers have one name"),
        "an unknown key": (changed("weights", to=1), "the file has 'weights', which nothing reads"),
        "another format": (changed("format", to="2"), "its format is '2'"),
        "a name of many lines": (changed("stages", 0, to=["a\nb" * 500]), "must be a name"),
    }


def _text(made: Placement) -> str:
    path = Path("placement.json")
    write_placement(path, made)
    return path.read_text()


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.json"
    for what, (content, words) in damaged().items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if what == "no time":  # its forward takes some
            assert read_placement(path).layers[0].update == 0
            continue
        with pytest.raises(ValueError, match=r"^placement .*given\.json is damaged, or no placement: ") as error:
            read_placement(path)
        assert words in str(error.value), (what, str(error.value))
        assert len(str(error.value).splitlines()) == 1, what
        assert len(str(error.value)) < 500 + len(str(path)), what


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    with path.open("wb") as file:
        file.truncate(1 << 43)  # of which nothing is on the disk
    with pytest.raises(ValueError, match="more than 4194304 bytes"):
        read_placement(path)


def test_a_files_numbers_are_taken_as_they_are(tmp_path: Path) -> None:
    made = placement(layers=tuple(replace(one, forward=1 / 3) for one in FIVE))
    write_placement(tmp_path / "placement.json", made)
    assert read_placement(tmp_path / "placement.json").layers[0].forward == 1 / 3
