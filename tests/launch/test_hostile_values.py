"""Every flag of every command, with values that nobody should give: it runs, or says in one line what is wrong.

The flags are read from each command's own help, and the commands are found in the source: what is added is tried.
"""

import ast
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from source_tree import ROOMS

from unlocked.comparison import command_line as comparison
from unlocked.comparison.leaderboard import options as leaderboard
from unlocked.comparison.memory import study as memory
from unlocked.comparison.stages import study as stages
from unlocked.kernels.triton import aot
from unlocked.launch import chaos, check_rule, compare_runs, evaluate, pipeline
from unlocked.models import small_conv
from unlocked.runtime.metrics import dashboard_demo
from unlocked.runtime.schedules import simulate

ROOT = Path(__file__).parents[2]
NUMBERS = ("nan", "inf", "-inf", "0", "-1", "1" + 30 * "0", "1e400", "0.0")
WORDS = ("", "abc", "None", "[]", "~nosuchuser", 300 * "\N{SNOWMAN}")
PLACES = ("folder", "file", "file/below", "missing/below")
_HEADING = re.compile(r"^(?:engines? (\w+).*|\S.*):$")
_FLAG = re.compile(r"^  (?:-.*, )?(--[\w-]+)( .*)?$")


@dataclass(frozen=True)
class Command:
    """What runs a command, and the flags that make it small; a flag that is tried comes after them."""

    run: Callable[[list[str]], object]
    flags: Sequence[str] = ()


PARSERS = ("parse_args", "parse_known_args")
TINY = ("--plain", "--num-epochs", "1", "--max-steps", "1", "--no-eval", "--batch-size", "16")
# What a comparison or a study is told is all read before the first contender or chain trains: here it is read only, and
# tests of their own run them.
COMMANDS = {
    "launch/command_line.py": Command(pipeline.main, TINY),
    "launch/chaos.py": Command(lambda given: chaos.parse(given) and 0, ("--stages", "2")),
    "launch/check_rule.py": Command(check_rule.main, ("LLS",)),
    "launch/compare_runs.py": Command(compare_runs.main, ("folder",)),
    "launch/evaluate.py": Command(evaluate.main, ("weights.pt", "--model", "SmallConv")),
    "comparison/command_line.py": Command(comparison.parse),
    "comparison/leaderboard/options.py": Command(leaderboard.parse),
    "comparison/memory/study.py": Command(memory.parse),
    "comparison/stages/study.py": Command(stages.parse),
    "runtime/schedules/simulate.py": Command(simulate.main),
    "runtime/metrics/dashboard_demo.py": Command(dashboard_demo.main, ("--plain", "--seconds", "0.01")),
    "kernels/triton/aot.py": Command(aot.main, ("--match", "no such kernel")),
}

OTHERS = {
    "launch/cluster.py",
    "launch/completion.py",
    "runtime/line_parser.py",
}  # of torchrun's flags, and of none (see tests/launch/test_console.py); the parser of all the others


def test_every_command_is_here() -> None:
    found = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            if any(isinstance(call, ast.Attribute) and call.attr in PARSERS for call in calls):
                found.add(str(path.relative_to(ROOT)))
    assert found - OTHERS == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_runs_or_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    _prepare(tmp_path)
    for variable, value in _world_of_one().items():
        monkeypatch.setenv(variable, value)
    flags = list(_flags(command, capsys))
    assert flags
    problems = []
    for flag, takes_value, engine in flags:
        for value in (*NUMBERS, *WORDS, *PLACES):
            first = command.flags if engine is None else (*command.flags, "--engine", engine)
            given = [flag, value] if takes_value else [f"{flag}={value}"]
            if problem := _problem(command, [*first, *given], capsys):
                problems.append(f"{flag} {value[:40]!r}: {problem}")
    assert not problems, "\n".join(problems)


def _prepare(folder: Path) -> None:
    """The places that a value may name, and weights to score."""
    (folder / "folder").mkdir()
    (folder / "file").write_text("something else")
    blocks = small_conv(1, 10, 8)
    tensors = {f"{block.name}.block.{key}": value for block in blocks for key, value in block.state_dict().items()}
    torch.save(tensors, folder / "weights.pt")


def _world_of_one() -> dict[str, str]:
    """What a launcher of one process sets; only the processes engine reads it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _flags(command: Command, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, bool, str | None]]:
    """Every flag that the help lists, whether it takes a value, and the first of the engines that use it."""
    with pytest.raises(SystemExit, match="0"):
        command.run(["--help"])
    engine = None
    for line in capsys.readouterr().out.splitlines():
        assert not line.startswith("  -") or _FLAG.match(line) or line.startswith("  -h, --help"), line
        if heading := _HEADING.match(line):
            engine = heading[1]
        elif (flag := _FLAG.match(line)) and flag[1] != "--help":
            yield flag[1], flag[2] is not None and not flag[2].startswith("  "), engine


def _problem(command: Command, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with how the command ended; None: it ran, or said its mistake in one line."""
    try:
        code = command.run(arguments)
    except ValueError as error:  # of what is only read; the command prints it, see its own tests
        code, text = 2, f"error: {error}\n"
    except SystemExit as error:
        code, text = error.code, capsys.readouterr().err
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        text = capsys.readouterr().err
    if "Traceback" in text:
        return text.splitlines()[-1]
    if code in (1, 2) and not (text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")):
        return f"exit code {code} and {text!r}"
    return None
