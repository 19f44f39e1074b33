"""The check of a GPU in three calls: fits its time, is complete on disk at any moment, and needs no GPU to be tried."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")


def load(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("scripts", "gpu_steps", monkeypatch)


def test_every_call_fits_its_time_and_brings_few_files(steps: ModuleType) -> None:
    assert sorted(steps.CALLS) == [1, 2, 3]
    for call in steps.CALLS.values():
        assert sum(step.limit for step in call) <= steps.LONGEST_CALL
        files = {word for step in call for word in step.command if word.startswith("{folder}")}
        assert len(files) + len(("call_N.log", "call_N.json", "caches.tar.gz")) <= 8


def test_the_contenders_of_the_plan_exist_and_fit(steps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    single_gpu = load("benchmarks", "single_gpu", monkeypatch)
    known = {contender.name: contender for contender in single_gpu.CONTENDERS}
    for call in steps.CALLS.values():
        for step in call:
            if "benchmarks/single_gpu.py" in step.command:
                names = step.command[step.command.index("--only") + 1 :]
                assert set(names) <= set(known)
                # The first compiles all kernels, which must fit as well.
                assert known[names[0]].budget < step.limit - 12


def test_checks_side_by_side_are_told_apart_and_one_failure_counts(tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "side_by_side.py")
    words = ["good:", "-c", "print(6 * 7)", "+", "bad:", "-c", "import sys; print('why'); sys.exit(3)"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "---- good\n42\n" in done.stdout
    assert "---- bad\nwhy\n" in done.stdout
    assert done.stdout.endswith("good: exit status 0\nbad: exit status 3\n")
    for wrong in (["-c", "1"], ["one:", "-c", "1", "+", "one:", "-c", "1"]):
        refused = subprocess.run([sys.executable, script, *wrong], capture_output=True, text=True, check=False)
        assert "begins with a new name" in refused.stderr


def test_the_scripts_of_the_plan_exist(steps: ModuleType) -> None:
    words = {word for call in steps.CALLS.values() for step in call for word in (*step.command, *step.dry)}
    paths = {word.split("::")[0] for word in words if word.startswith(("benchmarks/", "scripts/", "tests/"))}
    assert paths
    assert all((ROOT / path).exists() for path in paths)


@no_gpu
def test_it_refuses_with_one_line(tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    for flags, told in ((["1"], "finds no CUDA device"), (["4"], "invalid choice"), ([], "call")):
        result = subprocess.run(
            [str(SCRIPT), *flags, *([str(tmp_path)] if flags else [])],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode in (2, 3)
        assert told in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


INTERRUPTED = """
import json, sys, pathlib
sys.path.insert(0, {scripts!r})
import gpu_steps
code = '''
import os, pathlib, sys, time
print("begun", flush=True)
part = pathlib.Path({marks!r}, "part")
part.write_text(str(os.getpid()))
part.rename(pathlib.Path({marks!r}, sys.argv[1]))
time.sleep(600)
'''
quick = "print('quick')"
names = ("one", "two", "three")
steps = [
    gpu_steps.Step(name=n, limit=60, command=("-c", code if n == {at!r} else quick, n), dry=(), checks=True)
    for n in names
]
sys.exit(gpu_steps.Driver(pathlib.Path({folder!r}), "call_1", dry=False).run(steps))
"""


@pytest.mark.alone
@pytest.mark.parametrize("at", ["one", "two", "three"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_its_files_are_complete_when_it_is_interrupted_at_any_step(at: str, number: int, tmp_path: Path) -> None:
    marks, folder = tmp_path / "marks", tmp_path / "out"
    marks.mkdir()
    folder.mkdir()
    scripts = str(ROOT / "scripts")
    code = INTERRUPTED.format(scripts=scripts, marks=str(marks), folder=str(folder), at=at)
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert running.stdout is not None
    for line in running.stdout:  # the steps before it are told when they end
        if line.startswith(f"==== {at} ".encode()):
            break
    while not (marks / at).exists():
        assert running.poll() is None
    found = json.loads((folder / "call_1.json").read_text())["steps"]
    states = {row["name"]: row["state"] for row in found}
    order = ["one", "two", "three"]
    before = order[: order.index(at)]
    assert [states[name] for name in before] == ["ok"] * len(before)
    assert states[at] == "running"
    running.send_signal(number)
    running.communicate(timeout=60)
    rows = {row["name"]: row for row in json.loads((folder / "call_1.json").read_text())["steps"]}
    log = (folder / "call_1.log").read_text()
    assert "begun" in log
    assert log.count("quick\n") == len(before)
    if number == signal.SIGKILL:  # then nobody is left to end the step
        os.kill(int((marks / at).read_text()), signal.SIGKILL)
    else:
        assert running.returncode == 130
        assert rows[at]["state"] == "interrupted"
        assert "KeyboardInterrupt" in "\n".join(rows[at]["last_lines"])  # it could say where it was


@pytest.mark.alone
def test_a_step_over_its_limit_says_where_it_was_and_the_next_one_runs(steps: ModuleType, tmp_path: Path) -> None:
    code = "import time\nprint('begun', flush=True)\ntime.sleep(600)"
    call = [
        steps.Step(name="slow", limit=3, command=("-c", code), dry=()),
        steps.Step(name="wrong", limit=60, command=("-c", "raise SystemExit(4)"), dry=(), checks=True),
        steps.Step(name="right", limit=60, command=("-c", "print(6 * 7)"), dry=()),
    ]
    driver = steps.Driver(tmp_path, "call_1", dry=False)
    assert driver.run(call) == 1
    slow, wrong, right = json.loads((tmp_path / "call_1.json").read_text())["steps"]
    assert (slow["state"], wrong["state"], right["state"]) == ("out of time", "failed (4)", "ok")
    assert "KeyboardInterrupt" in slow["last_lines"][-1]
    assert right["last_lines"] == ["42"]
    assert driver.run(call[:1]) == 2


def test_caches_travel_from_one_call_to_the_next(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    first, out, second = tmp_path / "first", tmp_path / "out", tmp_path / "second"
    out.mkdir()
    second.mkdir()
    steps.use_caches(first)
    kernel = Path(os.environ["TRITON_CACHE_DIR"]) / "key" / "kernel.cubin"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(bytes(range(256)))
    steps.pack_caches(out)
    (second / "caches.tar.gz").write_bytes((out / "caches.tar.gz").read_bytes())
    steps.use_caches(second)
    assert (Path(os.environ["TRITON_CACHE_DIR"]) / "key" / "kernel.cubin").read_bytes() == bytes(range(256))
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(second)


@no_gpu
@pytest.mark.alone
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_dry_run_runs_every_step(call: int, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(SCRIPT), str(call), str(tmp_path), "--dry-run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    rows: list[dict[str, Any]] = json.loads((tmp_path / f"call_{call}.json").read_text())["steps"]
    assert done.returncode == 0, json.dumps(rows, indent=1)
    assert {row["state"] for row in rows} == {"ok"}
    assert len(list(tmp_path.iterdir())) <= 8


@no_gpu
def test_on_a_gpu_tritons_kernels_are_compared_with_the_reference(tmp_path: Path) -> None:
    """Tests that take the interpreter elsewhere."""
    (tmp_path / "with_a_gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    found = []
    for plugins in ([], ["-p", "with_a_gpu"]):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *plugins,
            "-m",
            "gpu",
            "--collect-only",
            "-q",
        ]
        command.append("tests/kernels/test_triton_norm_act.py")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]
        found.append(done.stdout)
    assert int(found[0].rsplit("test_triton_norm_act.py: ", 1)[1].split()[0]) < 10
    assert int(found[1].rsplit("test_triton_norm_act.py: ", 1)[1].split()[0]) > 40


@no_gpu
def test_gpu_tests_are_found_where_schedulefree_is_missing(tmp_path: Path) -> None:
    """A machine that is lent has what it has."""
    (tmp_path / "schedulefree.py").write_text("raise ModuleNotFoundError('not here')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    folders = ["tests/kernels", "tests/engines", "tests/workers"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", *folders],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_cuda_engines.py" in done.stdout
