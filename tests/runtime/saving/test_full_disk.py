"""A full disk is said, with the file's name, and leaves no half of anything."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import needs_mounts, on_small_disks

ROOT = Path(__file__).parents[3]
WRITES = """
import sys
from pathlib import Path
from unlocked.runtime.saving.whole_file import DiskFullError, append_line, whole_file, write_whole

folder = Path(sys.argv[1])
write_whole(folder / "kept.txt", "old")
append_line(folder / "grows.log", "first")


def complaint(write):
    try:
        write()
    except DiskFullError as error:
        return str(error)


def library():  # as torch does: the disk's error becomes another one
    with whole_file(folder / "weights.pt") as temporary, temporary.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")


print(complaint(lambda: write_whole(folder / "kept.txt", "new" * 1000000)))
print(complaint(library))
print(complaint(lambda: append_line(folder / "grows.log", "x" * 1000000)))
print(sorted(path.name for path in folder.iterdir()))
print((folder / "kept.txt").read_text(), (folder / "grows.log").read_text().splitlines())
"""
RUN = 'python "$@"; echo "code $?"; cd "$DISK"; find . -type f | sort; tail -c 1 run/train.log | od -An -c'


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from unlocked.runtime.saving.tensor_file import load_tensors, save_tensors

path = Path(sys.argv[1])
save_tensors({"w": torch.arange(3)}, path)
print(load_tensors(path)["w"].tolist())
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_tensors({"w": torch.ones(5000)}, path)
except OSError as error:
    print(error)
"""


def test_why_tensors_could_not_be_written(tmp_path: Path) -> None:
    """torch says: unexpected pos 4096 vs 3990."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "weights.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = str(tmp_path / "weights.pt")
    assert done.stdout.splitlines() == ["[0, 1, 2]", f"[Errno 27] File too large: {path!r}"], done


@needs_mounts
def test_files_on_a_full_disk(tmp_path: Path) -> None:
    command = [*on_small_disks({tmp_path: "64k"}), sys.executable, "-c", WRITES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *complaints, names, contents = done.stdout.splitlines()
    for complaint, name in zip(complaints, ["kept.txt", "weights.pt", "grows.log"], strict=True):
        assert complaint.startswith(f"the disk is full: {tmp_path / name} can't be written")
    assert names == "['grows.log', 'kept.txt']"
    assert contents == "old ['first']"


@pytest.mark.alone
@needs_mounts
def test_a_run_on_a_full_disk(tmp_path: Path) -> None:
    flags = ["--plain", "--max-steps", "30", "--no-eval", "--print-freq", "1", "--snapshot-every", "10"]
    where = ["--save-path", str(tmp_path), "--experiment-name", "run"]
    shell = ["sh", "-c", f'DISK={tmp_path}; python() {{ "{sys.executable}" "$@"; }}; {RUN}', "sh"]
    command = [*on_small_disks({tmp_path: "300k"}), *shell, str(ROOT / "launch" / "pipeline.py"), *flags, *where]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "code 1\n" in done.stdout, done
    [line] = done.stderr.splitlines()
    assert "stage 0 (rank 0: conv1, conv2, conv3, linear1, output) failed in 0SNAP9" in line
    assert f"the disk is full: {tmp_path}/run/snapshots/step-00000010/layer-" in line
    files = done.stdout.partition("code 1\n")[2].splitlines()
    assert files[:-1] == ["./run/config.json", "./run/train.log"]
    assert "\\n" in files[-1], "the log ends with a whole line"
