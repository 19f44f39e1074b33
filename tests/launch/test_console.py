"""The command `unlocked`: its list of commands, what a shell completes, and how torchrun ends inside it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unlocked.launch import completion
from unlocked.launch.cluster import main as launch
from unlocked.launch.console import COMMANDS, main

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_unlocked unlocked "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_help_lists_every_command_at_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[3:])) <= 80
    for name, (_, what) in COMMANDS.items():
        assert any(re.fullmatch(rf"  {name} +{re.escape(what)}", line) for line in lines), name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_is_read_at_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):  # of argparse, with code 0
        assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: unlocked {name}")
    assert max(map(len, text.splitlines())) <= 84


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    file = tmp_path_factory.mktemp("completion") / "unlocked.bash"
    made = subprocess.run(
        [sys.executable, "-m", "unlocked", "completion", "bash"], capture_output=True, text=True, check=True
    )
    file.write_text(made.stdout)
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["com"], {"compare", "compare-runs", "completion"}),
        (["train", "--lr"], {"--lr", "--lr-scheduler"}),
        (["train", "--training-mode", "LLS_MxM"], {"LLS_MxM", "LLS_MxM_Random", "LLS_MxM_reduced"}),
        (["train", "--queue"], {"--queue-depth"}),
        (["evaluate", "--dataset", "CIFAR100"], {"CIFAR100", "CIFAR100AUG"}),
        (["compare", "--study", "m"], {"memory"}),
        (["completion", "z"], {"zsh"}),
        (["leaderboard", "--report"], {"--report-only"}),
        (["leaderboard", "--rules", "LLS_MxM_"], {"LLS_MxM_Random", "LLS_MxM_reduced"}),
        (["chaos", "--fault"], {"--faults", "--fault-count"}),
        (["chaos", "--queue"], {"--queue-depth"}),
    ],
)
def test_a_shell_completes_commands_flags_and_names(script: Path, words: list[str], found: set[str]) -> None:
    command = ["bash", "-c", ASK, "bash", str(script), "unlocked", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == found, done.stderr


def test_other_shells(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    for shell in completion.SHELLS:
        assert completion.main([shell]) == 0
        assert "training-mode" in capsys.readouterr().out
    assert completion.main(["powershell"]) == 2
    assert capsys.readouterr().err == "error: shell 'powershell' is not known; valid: bash, zsh, tcsh\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc-per-node=two", "--"], "nproc_per_node value: two"),
        (["--nprocs=2", "--"], "unlocked launch --help"),
        (["script.py", "--"], "torchrun takes 'script.py' for its script"),
    ],
)
def test_a_mistake_in_torchruns_flags_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(arguments) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


@pytest.mark.alone
def test_a_cluster_ends_in_lines_of_ours(tmp_path: Path) -> None:
    """Ctrl-C reaches torchrun and its workers together, as from a terminal; and a mistake of the workers."""
    command = [sys.executable, "-m", "unlocked", "launch", "--nproc-per-node=2", "--", "--plain"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": clean}
    with subprocess.Popen([*command, "--num-epochs", "100000"], start_new_session=True, **pipes) as running:  # type: ignore[call-overload]
        assert any(line.startswith("epoch 1/") for line in running.stdout)
        os.killpg(running.pid, signal.SIGINT)
        told, complaints = running.communicate(timeout=60)
    assert running.returncode == 130
    assert not complaints
    assert re.fullmatch(r"stopped by signal 2 after \d+ training micro-batches", told.splitlines()[-1])
    wrong = subprocess.run([*command, "--model", "VGG9"], check=False, timeout=60, **pipes)  # type: ignore[call-overload]
    assert wrong.returncode == 2
    assert all(re.match(r"error( \[rank 1\])?: .*VGG9", line) for line in wrong.stderr.splitlines()), wrong.stderr
