"""The house stands as it was drawn: arrows run one way only, nothing runs in a circle, and everything fits a screen.

Every check is a function that returns what is wrong in a checkout, by a name that stays the same while lines move. It
finds nothing here, and finds what was planted in a small checkout of its own.
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from source_tree import ROOMS, Source, circles, function_lengths

ROOT = Path(__file__).parents[1]
# Each room and the rooms it may import.
ALLOWED = {
    "kernels": set(),
    "models": {"kernels"},
    "data": {"kernels"},
    "rules": {"kernels"},
    "workers": {"rules", "kernels", "models", "data"},
    "runtime": {"workers", "rules", "kernels", "models", "data"},
    "comparison": {"runtime", "workers", "rules", "kernels", "models", "data"},
    "launch": {"comparison", "runtime", "workers", "rules", "kernels", "models", "data"},
}
# Inside a room, from the ground up: a file imports from its own layer and from those below it.
LAYERS = {
    "runtime": [
        [
            "schedules",
            "typed",
            "paths",
            "line_parser",
            "fields",
            "settings",
            "layouts",
            "saving.whole_file",
            "metrics.records",
        ],
        ["saving.tensor_file", "saving.run_folder", "tensors"],
        ["batch_statistics", "faults", "learning_rate", "machine", "model_options", "text_options", "signals"],
        ["saving.model_file", "metrics.html", "exporting"],
        ["fault_fixtures"],
        ["named_inputs", "learned", "model_blocks", "pixels"],
        ["block_trials", "shapes"],
        ["layer_rules", "layer_optimizers", "rule_declarations", "side_channel"],
        ["metrics", "control", "result", "network", "input", "whole"],
        ["saving", "costs", "rule_trial"],
        ["job", "arguments", "keeping", "summary"],
        ["run_sinks", "config_file", "explaining"],
        ["saving.scoring", "engines", "before_run"],
        ["prediction"],
        ["trainer"],
        ["recipe"],
        ["conformance"],
    ],
    "runtime.engines": [
        ["one_process", "pipeline"],
        ["saver"],
        ["processes", "streams"],
        ["sequential"],
    ],
    "comparison": [
        ["logged", "contenders", "command_line", "energy", "environment", "meter", "reading", "results"],
        ["saved_runs"],
        ["cells", "significance", "networks", "leaderboard.results"],
        ["request"],
        ["excerpts"],
        ["report"],
        ["rival", "memory", "stages", "scale", "chaos", "runs_page"],
        ["leaderboard.inspection"],
        ["worker", "pool"],
        ["measure"],
        ["leaderboard"],
    ],
}
WITHOUT_TORCH = ("runtime.schedules", "runtime.control")
MOST_LINES = {"file": 400, "function": 80}
# Cut in two, it compiles to other floating-point code; what that costs in time only a device can tell.
WHOLE = {"long: kernels/cuda/norm_act_forward.cu: apply_kernel"}
SUFFIXES = (".py", ".cu", ".cuh", ".cpp")
FOLDERS = (*ROOMS, "src/unlocked", "tests", "benchmarks", "examples", "scripts")

Findings = dict[str, str]  # what is wrong, and more about it


def arrows_between_rooms(source: Source) -> Findings:
    found = {}
    for room in ROOMS:
        for file in source.below(room):
            for name in sorted(i.name for i in source.imports(source.files[file])):
                parts = name.split(".")
                if parts[0] == "unlocked" and (len(parts) == 1 or parts[1] not in {room, *ALLOWED[room]}):
                    found[f"arrow: {_short(file)} -> {_short(name)}"] = f"{room} may import {sorted(ALLOWED[room])}"
    return found


def arrows_inside_rooms(source: Source) -> Findings:
    found = {}
    for room, layers in LAYERS.items():
        for file in source.below(room):
            if file == f"unlocked.{room}":
                continue  # the room's face may offer whatever the room holds
            height = _height(file, room, layers)
            if height is None:
                found[f"layer: {_short(file)}"] = f"say in LAYERS[{room!r}] where it stands"
                continue
            for name in sorted(i.name for i in source.imports(source.files[file])):
                other = _height(name, room, layers)
                if other is not None and other > height:
                    found[f"arrow: {_short(file)} -> {_short(name)}"] = f"layer {height} -> layer {other} of {room}"
    return found


def entry_points_imported(source: Source) -> Findings:
    """Outside the rooms; tests alone may import what a user starts."""
    found = {}
    for folder in ("benchmarks", "examples", "scripts"):
        for path in sorted((source.root / folder).rglob("*.py")):
            for name in sorted(i.name for i in source.imports(path)):
                if name.startswith("unlocked.launch"):
                    found[f"arrow: {path.relative_to(source.root)} -> {_short(name)}"] = "nothing imports launch"
    return found


def circles_between_files(source: Source) -> Findings:
    graph = source.graph()
    found = {}
    for group in circles(graph):
        arrows = [f"{_short(a)} -> {_short(b)}" for a in group for b in sorted(graph[a]) if b in group]
        found[f"circle: {', '.join(map(_short, group))}"] = "; ".join(arrows)
    return found


def torch_below(source: Source) -> Findings:
    found = {}
    for file in (file for room in WITHOUT_TORCH for file in source.below(room)):
        for name, way in source.needs(file).items():
            if name.split(".")[0] == "torch":
                found[f"torch: {_short(file)}"] = " -> ".join(way)
    return found


def too_long(source: Source) -> Findings:
    found = {}
    for path in sorted(p for folder in FOLDERS for p in (source.root / folder).rglob("*") if p.suffix in SUFFIXES):
        name = path.relative_to(source.root)
        if (lines := len(path.read_text().splitlines())) > MOST_LINES["file"]:
            found[f"long: {name}"] = f"{lines} lines; at most {MOST_LINES['file']}"
        for function, lines in function_lengths(path):
            if lines > MOST_LINES["function"]:
                found[f"long: {name}: {function}"] = f"{lines} lines; at most {MOST_LINES['function']}"
    return {what: more for what, more in found.items() if what not in WHOLE}


def loose_json(source: Source) -> Findings:
    """JSON has no word for NaN or infinity, and Python writes one: there is one writer, and elsewhere it is refused."""
    found = {}
    for path in sorted(p for folder in FOLDERS for p in (source.root / folder).rglob("*.py")):
        name = path.relative_to(source.root)
        if name.parts[0] == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("json.dump", "json.dumps"):
                assert isinstance(node, ast.Call)
                strict = any(k.arg == "allow_nan" and ast.unparse(k.value) == "False" for k in node.keywords)
                if not strict:
                    found[f"json: {name}"] = f"line {node.lineno}: write_json, json_text, or allow_nan=False"
    return found


def _short(name: str) -> str:
    return name.removeprefix("unlocked.")


def _height(file: str, room: str, layers: list[list[str]]) -> int | None:
    """The layer of a file, by the longest name that begins its own."""
    known = {f"unlocked.{room}.{name}": height for height, layer in enumerate(layers) for name in layer}
    parts = file.split(".")
    return next((known[n] for k in range(len(parts), 2, -1) if (n := ".".join(parts[:k])) in known), None)


CHECKS = [
    arrows_between_rooms,
    arrows_inside_rooms,
    entry_points_imported,
    circles_between_files,
    torch_below,
    too_long,
    loose_json,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_stands_as_it_was_drawn(check: Callable[[Source], Findings]) -> None:
    source = Source(ROOT)
    assert all(source.below(room) for room in ROOMS)
    assert not check(source)


BODY = "\n".join(["    pass"] * 80)
PLANTED: dict[str, tuple[Callable[[Source], Findings], dict[str, str]]] = {
    "arrow: kernels.wrong -> runtime": (
        arrows_between_rooms,
        {"kernels/wrong.py": "def f():\n    from unlocked.runtime import Trainer\n"},
    ),
    "arrow: rules.wrong -> unlocked": (
        arrows_between_rooms,
        {"rules/wrong.py": "import unlocked\n"},
    ),
    "arrow: models.wrong -> workers.loop": (
        arrows_between_rooms,
        {
            "workers/loop.py": "",
            "models/wrong.py": "import importlib\nimportlib.import_module('unlocked.workers.loop')\n",
        },
    ),
    "arrow: comparison.results -> launch.pipeline": (
        arrows_between_rooms,
        {"launch/pipeline.py": "", "comparison/results.py": "from unlocked.launch.pipeline import main\n"},
    ),
    "arrow: runtime.control.client -> runtime.engines.streams": (
        arrows_inside_rooms,
        {
            "runtime/control/client.py": "from unlocked.runtime.engines.streams import Streams\n",
            "runtime/engines/streams.py": "",
        },
    ),
    "arrow: comparison.report.page -> comparison.memory.study": (
        arrows_inside_rooms,
        {
            "comparison/report/page.py": "from unlocked.comparison.memory import study\n",
            "comparison/memory/study.py": "",
        },
    ),
    "layer: runtime.drawer": (arrows_inside_rooms, {"runtime/drawer.py": "import os\n"}),
    "arrow: benchmarks/wrong.py -> launch.pipeline": (
        entry_points_imported,
        {"launch/pipeline.py": "", "benchmarks/wrong.py": "from unlocked.launch.pipeline import main\n"},
    ),
    "circle: runtime.a, runtime.b": (
        circles_between_files,
        {
            "runtime/a.py": "def f():\n    from unlocked.runtime.b import g\n",
            "runtime/b.py": "import typing\nif typing.TYPE_CHECKING:\n    from unlocked.runtime.a import f\n",
        },
    ),
    "circle: data, data.a, data.b": (
        circles_between_files,
        {
            "data/__init__.py": "from unlocked.data.b import y\n",
            "data/b.py": "from unlocked.data.a import y\n",
            "data/a.py": "from unlocked.data import x\n",
        },
    ),
    "torch: runtime.schedules.wrong": (
        torch_below,
        {
            "runtime/schedules/wrong.py": "def f():\n    from unlocked.workers.actions import Item\n",
            "workers/__init__.py": "from unlocked.workers.loop import f\n",
            "workers/actions.py": "",
            "workers/loop.py": "import torch.nn\n",
        },
    ),
    "json: data/wrong.py": (
        loose_json,
        {
            "data/wrong.py": "import json\ndef f():\n    json.dump(1, open('x', 'w'), allow_nan=True)\n",
            "data/right.py": "import json\njson.dumps(1, allow_nan=False)\n",
        },
    ),
    "long: data/long.py": (too_long, {"data/long.py": "\n" * 401}),
    "long: tests/long.py: f": (too_long, {"tests/long.py": f"def f():\n{BODY}\n"}),
    "long: kernels/long.cu: work": (
        too_long,
        {
            "kernels/long.cu": "namespace {\nstruct S { int a; };\n__global__ void __launch_bounds__(8) work(\n"
            + "    int a) {\n"
            + "  if (a) { a = '}'; }  // }\n" * 80
            + "}\n}  // namespace\n"
        },
    ),
}


def _plant(root: Path, files: dict[str, str]) -> Source:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Source(root)


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_is_found(what: str, tmp_path: Path) -> None:
    check, files = PLANTED[what]
    assert list(check(_plant(tmp_path, files))) == [what]


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    files = {
        "src/unlocked/__init__.py": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import torch\n",
        "kernels/operation.py": "import torch\n",
        "runtime/__init__.py": "import typing\nif typing.TYPE_CHECKING:\n    from unlocked.runtime import job\n",
        "runtime/job.py": "from unlocked.kernels import operation\n",
        "runtime/engines/streams.py": "from unlocked.runtime.job import x\n",
        "runtime/schedules/__init__.py": "",
        "runtime/schedules/stream.py": "from unlocked.runtime.schedules import schedule\n",
        "runtime/schedules/schedule.py": "import os\n",
        "launch/compare.py": "from unlocked.runtime.engines import streams\n",
        "tests/short.py": "def f():\n" + "\n".join(["    pass"] * 79),
        "kernels/short.cpp": "namespace n {\n" + "int f(int a) { return a; }\n" * 200 + "}\n",
    }
    source = _plant(tmp_path, files)
    assert not {check.__name__: found for check in CHECKS if (found := check(source))}


def test_what_needs_no_torch_is_imported_without_it() -> None:
    names = [name for room in WITHOUT_TORCH for name in Source(ROOT).below(room)]
    assert len(names) > 10
    names += ["unlocked", "unlocked.runtime", "unlocked.runtime.metrics.dashboard", "unlocked.runtime.metrics.run_log"]
    code = "\n".join(["import sys", "sys.modules['torch'] = None", *(f"import {name}" for name in names)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_namespace_is_links_to_the_rooms() -> None:
    package = ROOT / "src" / "unlocked"
    for room in ROOMS:
        assert (package / room).is_symlink()
        assert (package / room).resolve() == ROOT / room


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest would take one for the other, and collect nothing at all."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert [name for name, count in Counter(names).items() if count > 1] == []
