"""The last way of the weights: by a file where there is a place for one, else by a group of the two ranks."""

import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes import gathering


def no_folder(*_: Any) -> str:
    raise FileNotFoundError(2, "No usable temporary directory found")


@pytest.mark.parametrize("missing", ["folders", "temporary folder"])
def test_without_a_place_for_a_file_they_come_by_a_group(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setattr(gathering, "memory_folders", lambda: [nowhere])
    monkeypatch.setattr(tempfile, "gettempdir", no_folder if missing == "temporary folder" else lambda: nowhere)
    store, timeout = dist.HashStore(), 20.0
    worlds = [
        World(rank=rank, size=2, local_rank=rank, local_size=2, master_address="127.0.0.1", master_port=1)
        for rank in range(2)
    ]
    sent = {"1.weight": torch.arange(12.0).reshape(3, 4), "1.steps": torch.tensor(7)}
    errors: list[BaseException] = []

    def bring() -> None:
        try:
            gathering.bring_weights(store, worlds[1], sent, timeout)
        except BaseException as error:
            errors.append(error)
            store.set("weights/1/offer", "")  # ends the other side's wait

    thread = threading.Thread(target=bring, daemon=True)
    thread.start()
    found = gathering.gather_weights(store, worlds[0], {"0.weight": torch.ones(2)}, timeout, ["stage 0", "stage 1"])
    thread.join(timeout)
    assert not errors
    assert found.keys() == {"0.weight", *sent}
    assert all(torch.equal(found[name], tensor) for name, tensor in sent.items())
