"""A user's script, without a guard around what it does: every run of `Processes` starts workers of its own.

python spawning_script.py exact|sockets OUT.json
"""

import contextlib
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from unlocked.data import load_dataset
from unlocked.models import small_conv, split
from unlocked.rules import LLS
from unlocked.runtime import MetricsSink, Processes, Trainer

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples")]

from residual import RESNET_LAYERS, ResNet
from transformer import transformer

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
images = torch.randn(32, 3, 16, 16, generator=generator), torch.arange(32) % 10
digits = [(part.images[:96].float() / 16, part.labels[:96]) for part in load_dataset("digits")]


class Scaled(nn.Module):
    """Only this script knows the class."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(x.flatten(1)))


def resnet() -> nn.Module:
    return ResNet()


def small() -> nn.Module:
    return nn.Sequential(*small_conv(1, 10, 8))


def attention() -> nn.Module:
    return nn.Sequential(*transformer(8, 10))


def own() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 64), nn.ReLU()), Scaled())


class Listening(MetricsSink):
    """Lives in the script's own process, and looks at what the workers listen on."""

    def __init__(self) -> None:
        self.heard, self.open = [], []

    def on_start(self, info: object) -> None:
        self.heard.append("start")
        for pid in children():
            inodes = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
            for table in ("tcp", "tcp6"):
                for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                    words = line.split()
                    if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:  # proc(5): the state is LISTEN
                        self.open.append(words[1].split(":")[0])

    def on_epoch(self, result: object) -> None:
        self.heard.append("epoch")

    def on_finish(self, summary: object) -> None:
        self.heard.append("finish")

    def close(self) -> None:
        self.heard.append("close")


def children() -> list[str]:
    """Those that this process has started, and itself."""
    found = [str(os.getpid())]
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found += (task / "children").read_text().split()
    return found


def train(make, data, engine, **options):
    torch.manual_seed(1)
    network = make()
    model = split(network, at=RESNET_LAYERS) if make is resnet else list(network)
    rule = lambda info: LLS(temperature=0.5)(info)  # noqa: E731 - as people write it
    one = Trainer(model, rule=rule, optimizer=partial(torch.optim.Adam, lr=1e-2), engine=engine, **options)
    result = one.fit(data, epochs=1, batch_size=16, eval_data=data)
    return one, result


def exact() -> dict:
    """Three processes, beside one: digests, and what the plain module gives."""
    found = {}
    for make, data in ((resnet, images), (attention, digits[0]), (small, digits[0])):
        one, result = train(make, data, Processes(stages=3))
        fresh = make()
        fresh.load_state_dict(result.state_dict(), strict=True)
        kept, fresh = one.module.eval(), fresh.eval()
        with torch.no_grad():
            same = torch.equal(kept(data[0]), fresh(data[0]))
        assert all(torch.equal(kept.state_dict()[name], value) for name, value in result.state_dict().items())
        one.module.train()
        _, alone = train(make, data, "sequential")
        found[make.__name__] = {
            "digests": [result.weights_sha256, alone.weights_sha256],
            "equal_logits": same,
            "kind": type(kept).__name__,
            "stages": len(result.stages),
            "test_loss": [result.test_loss, alone.test_loss],
        }
    return found


def sockets() -> dict:
    """A second fit goes on, from a loader that shuffles; the sinks are here; an interrupt gives the result so far."""
    sink, digests = Listening(), []
    for engine in (Processes(stages=2), "sequential"):
        one, first = train(own, digits[0], engine, sinks=[sink] if engine != "sequential" else ())
        torch.manual_seed(3)
        dataset = torch.utils.data.TensorDataset(*digits[0])
        second = one.fit(torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True), epochs=1)
        digests.append([first.weights_sha256, second.weights_sha256, float(torch.rand(()))])

    class Interrupt(MetricsSink):
        def on_epoch(self, result: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    torch.manual_seed(1)
    one = Trainer(
        list(own()), rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1), engine="processes", sinks=[Interrupt()]
    )
    stopped = one.fit(digits[0], epochs=100_000, batch_size=16)
    return {
        "heard": sink.heard,
        "open": sorted(set(sink.open)),
        "digests": digests,
        "stopped_by": stopped.stopped_by,
        "stopped_steps": stopped.steps,
        "children": len(children()) - 1,
    }


Path(sys.argv[2]).write_text(json.dumps({"exact": exact, "sockets": sockets}[sys.argv[1]](), allow_nan=False))
