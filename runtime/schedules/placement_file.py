"""A placement as a file: a run writes what it measured and chose, a later run or the simulator reads it.

It may come from anywhere: what is read is held to bounds, and nothing in it is more than a number or a name.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.schedules.partition import check_ownership
from unlocked.runtime.schedules.placement import LayerCost, Link, Machine, Placement

__all__ = ["read_placement", "write_placement"]

_FORMAT = "unlocked placement 1"
_MOST_BYTES = 4 << 20  # of a file: 10,000 layers
_MOST_ENTRIES = 1 << 16  # of a list
_LONGEST_NAME = 1000
_MOST_SECONDS = 1e6
_MOST_ROWS = 2**31 - 1
_MOST_SIZE = 2**50  # bytes, and bytes per second


def write_placement(path: Path, placement: Placement) -> None:
    """Raises: OSError: it can't be written."""
    names = [layer.name for layer in placement.layers]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "format": _FORMAT,
            "batch_size": placement.batch_size,
            "layers": [
                {
                    "name": layer.name,
                    "forward_seconds": layer.forward,
                    "update_seconds": layer.update,
                    "output_bytes": layer.output_bytes,
                }
                for layer in placement.layers
            ],
            "machines": [{"processes": one.processes, "cores": one.cores} for one in placement.machines],
            "links": [
                None if link is None else {"latency_seconds": link.latency, "bytes_per_second": link.bandwidth}
                for link in placement.links
            ],
            "stages": [[names[i] for i in part] for part in placement.stages],
        },
    )


def read_placement(path: Path) -> Placement:
    """What `write_placement` has written.

    Raises:
        ValueError: there is no such file, or it is not one of these: names the file and what is wrong.
    """
    try:
        return _placement(_object(_content(path), "the file", _KEYS))
    except OSError as error:
        raise ValueError(
            f"placement {path} can't be read ({error.strerror}); give a file that a run has written"
        ) from (error)
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"placement {path} is damaged, or no placement: {said}; remove it to have it measured anew"
        ) from error


_KEYS = ("format", "batch_size", "layers", "machines", "links", "stages")


def _content(path: Path) -> Any:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    return json.loads(data, parse_constant=_refuse)


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON's")


def _placement(told: Mapping[str, Any]) -> Placement:
    if told["format"] != _FORMAT:
        raise ValueError(f"its format is {_shown(told['format'])}, not {_FORMAT!r}")
    layers = tuple(_layer(one, place) for place, one in enumerate(_list(told["layers"], "layers")))
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        raise ValueError("two layers have one name")
    machines = tuple(_machine(one, place) for place, one in enumerate(_list(told["machines"], "machines")))
    links = tuple(_link(one, place) for place, one in enumerate(_list(told["links"], "links")))
    stages = _stages(_list(told["stages"], "stages"), names)
    if links and len(links) != len(stages) - 1:
        raise ValueError(f"{len(links)} links are between {len(stages)} stages, which have {len(stages) - 1}")
    if sum(machine.processes for machine in machines) != len(stages):
        raise ValueError(f"its machines don't have the processes of its {len(stages)} stages")
    return Placement(
        batch_size=_whole(told["batch_size"], "batch_size", 1, _MOST_ROWS),
        layers=layers,
        machines=machines,
        links=links,
        stages=stages,
    )


def _layer(told: Any, place: int) -> LayerCost:
    where = f"layers[{place}]"
    one = _object(told, where, ("name", "forward_seconds", "update_seconds", "output_bytes"))
    cost = LayerCost(
        _name(one["name"], f"{where}.name"),
        _number(one["forward_seconds"], f"{where}.forward_seconds", _MOST_SECONDS),
        _number(one["update_seconds"], f"{where}.update_seconds", _MOST_SECONDS),
        _whole(one["output_bytes"], f"{where}.output_bytes", 0, _MOST_SIZE),
    )
    if not cost.seconds:
        raise ValueError(f"{where} takes no time")
    return cost


def _machine(told: Any, place: int) -> Machine:
    where = f"machines[{place}]"
    one = _object(told, where, ("processes", "cores"))
    return Machine(*(_whole(one[name], f"{where}.{name}", 1, _MOST_ENTRIES) for name in ("processes", "cores")))


def _link(told: Any, place: int) -> Link | None:
    if told is None:
        return None
    where = f"links[{place}]"
    one = _object(told, where, ("latency_seconds", "bytes_per_second"))
    latency = _number(one["latency_seconds"], f"{where}.latency_seconds", _MOST_SECONDS)
    bandwidth = _number(one["bytes_per_second"], f"{where}.bytes_per_second", _MOST_SIZE)
    if bandwidth < 1:
        raise ValueError(f"{where}.bytes_per_second is {bandwidth}; it must be at least 1")
    return Link(latency, bandwidth)


def _stages(told: list[Any], names: list[str]) -> tuple[range, ...]:
    numbers = {name: number for number, name in enumerate(names)}
    parts = []
    for place, one in enumerate(told):
        stage = [_name(name, f"stages[{place}]") for name in _list(one, f"stages[{place}]")]
        unknown = [name for name in stage if name not in numbers]
        if unknown or not stage:
            raise ValueError(f"stages[{place}] has {_shown(unknown[0]) if unknown else 'no layer'}")
        part = range(numbers[stage[0]], numbers[stage[0]] + len(stage))
        if [numbers[name] for name in stage] != list(part):
            raise ValueError(f"stages[{place}] has its layers in another order than the network")
        parts.append(part)
    check_ownership(parts, len(names))
    return tuple(parts)


def _object(told: Any, where: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(told, dict):
        raise ValueError(f"{where} is no object")
    if missing := [key for key in keys if key not in told]:
        raise ValueError(f"{where} lacks {missing[0]}")
    if foreign := [key for key in told if key not in keys]:
        raise ValueError(f"{where} has {_shown(foreign[0])}, which nothing reads")
    return told


def _list(told: Any, where: str) -> list[Any]:
    if not isinstance(told, list) or len(told) > _MOST_ENTRIES:
        raise ValueError(f"{where} is no list of at most {_MOST_ENTRIES}")
    return told


def _name(told: Any, where: str) -> str:
    if not isinstance(told, str) or not 0 < len(told) <= _LONGEST_NAME:
        raise ValueError(f"{where} is {_shown(told)}; it must be a name")
    return told


def _number(told: Any, where: str, most: float) -> float:
    valid = isinstance(told, int | float) and not isinstance(told, bool) and 0 <= told <= most and math.isfinite(told)
    if not valid:
        raise ValueError(f"{where} is {_shown(told)}; it must be a number of 0 to {most:g}")
    return float(told)


def _whole(told: Any, where: str, least: int, most: int) -> int:
    if not isinstance(told, int) or isinstance(told, bool) or not least <= told <= most:
        raise ValueError(f"{where} is {_shown(told)}; it must be a whole number of {least} to {most}")
    return told


def _shown(told: Any) -> str:
    text = repr(told)
    return text if len(text) <= 80 else f"{text[:80]}..."
