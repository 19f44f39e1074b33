"""Which rank runs which stage, and which layers each stage has: settled in set-up, on rank 0, and told to all."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from unlocked.data.cores import usable_cores
from unlocked.runtime.control.interfaces import own_address
from unlocked.runtime.control.messages import RunFailed, stage_name
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.pipeline import AUTO
from unlocked.runtime.engines.processes.link_speed import links_of
from unlocked.runtime.engines.processes.options import ProcessesOptions
from unlocked.runtime.engines.processes.rendezvous import gather
from unlocked.runtime.job import Job
from unlocked.runtime.schedules.placement import Link, Machine, Placement, cut_stages, fewest_stages
from unlocked.runtime.schedules.placement_file import read_placement, write_placement

__all__ = ["Placer", "auto_stages", "filed_placement", "order_by_machine"]


def order_by_machine(store: dist.Store, world: World, timeout: float) -> tuple[World, list[Machine]]:
    """This process's place where the ranks of each machine are neighbours, as torchrun numbers them and others may
    not; and the machines in that order. Rank 0 stays rank 0.

    Raises:
        TimeoutError: names the ranks that did not come in time.
        RunFailed: rank 0 is gone.
    """
    if world.is_local:
        return world, [Machine(world.size, usable_cores())]
    mine = {"machine": own_address(world), "cores": usable_cores()}
    try:
        told = [json.loads(one) for one in gather(store, world, "machine", json.dumps(mine, allow_nan=False), timeout)]
    except RuntimeError as error:
        raise RunFailed(f"{stage_name(0)} is lost: it ended during its set-up") from error
    names = [one["machine"] for one in told]
    places = list(dict.fromkeys(names))  # by their first rank
    order = sorted(range(world.size), key=lambda rank: (places.index(names[rank]), rank))
    if world.rank == 0 and order != sorted(order):
        print(
            f"the ranks of a machine are no neighbours: stages 0, 1, ... are run by ranks {', '.join(map(str, order))}",
            file=sys.stderr,
            flush=True,
        )
    machines = [Machine(names.count(name), told[names.index(name)]["cores"]) for name in places]
    return replace(world, rank=order.index(world.rank)), machines


def filed_placement(options: ProcessesOptions) -> Placement | None:
    """What the file that was named has; None: there is none yet, and a run is to write it.

    Raises:
        ValueError: it is damaged.
    """
    path = options.placement
    if path is None or not path.is_file() or not path.stat().st_size:
        return None
    return read_placement(path)


def auto_stages(options: ProcessesOptions, job: Job) -> tuple[int, int]:
    """How many processes on this machine's CPUs train fastest, and how many threads each is to have.

    The threads follow from the machine and the number of layers alone: numbers that depended on what was measured would
    not come out again.

    Raises:
        ValueError: the placement that was named is damaged.
    """
    layers, cores = len(job.network.blocks), usable_cores()
    threads = job.settings.threads or max(1, min(torch.get_num_threads(), cores // min(layers, cores)))
    placement = filed_placement(options)
    if placement is not None:
        return len(placement.stages), threads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        costs = job.layer_costs()
    finally:
        torch.set_num_threads(before)
    count, paces = fewest_stages(costs, max(1, cores // threads))
    rates = ", ".join(f"{job.plan.batch_size / pace:.0f}" for pace in paces)
    slowest = max(costs, key=lambda layer: layer.seconds)
    share = slowest.seconds / sum(layer.seconds for layer in costs)
    print(
        f"stages auto: {count} of at most {len(paces)} on {cores} cores; images/s predicted for 1, 2, ...: {rates}; "
        f"layer {slowest.name} takes {100 * share:.0f} % of the time",
        file=sys.stderr,
        flush=True,
    )
    return count, threads


class Placer:
    """Rank 0's decision. Use: construct, `read`, `place`."""

    def __init__(self, job: Job, options: ProcessesOptions, world: World, machines: Sequence[Machine]) -> None:
        self._job, self._options, self._world, self._machines = job, options, world, tuple(machines)
        self._filed: Placement | None = None

    def read(self) -> dict[str, bool]:
        """Takes the placement that was named, if there is one; whether links must be measured.

        Raises:
            ValueError: it is damaged, or of another network, other micro-batches or other machines.
        """
        self._filed = filed_placement(self._options)
        if self._filed is not None:
            self._check(self._filed)
        by_group = self._options.transport != "shared" and self._job.device.type == "cpu"
        return {"measure": self._filed is None and not self._world.is_local and by_group}

    def place(self, device: torch.device, store: dist.Store, measured: bool) -> Placement | None:
        """The placement, which the named file has from now on; None: one stage, for which nobody asked.

        Args:
            measured: all ranks are measuring their links, or have.

        Raises:
            ValueError: a list of stages that is not the network's.
            RuntimeError: a layer fails.
            OSError: the file can't be written.
        """
        job, options = self._job, self._options
        if self._filed is not None:
            return self._filed
        links = self._links(store) if measured else []
        if self._world.size == 1 and options.placement is None:
            return None
        costs = job.layer_costs(device)
        listed = self._listed()
        parts = listed or cut_stages(costs, self._world.size, links, queue_depth=options.queue_depth)
        placement = Placement(
            batch_size=job.plan.batch_size,
            layers=tuple(costs),
            machines=self._machines,
            links=tuple(links),
            stages=tuple(parts),
        )
        if options.placement is not None:
            write_placement(options.placement, placement)
        return placement

    def _listed(self) -> list[range] | None:
        stages = self._options.stages
        return self._job.partition([], stages) if isinstance(stages, str) and stages != AUTO else None

    def _links(self, store: dist.Store) -> list[Link | None]:
        links, problem = links_of(store, self._world, self._options.start_timeout)
        told = [
            f"{k}-{k + 1} {1e3 * link.latency:.2f} ms, {1e-6 * link.bandwidth:.1f} MB/s"
            for k, link in enumerate(links)
            if link is not None
        ]
        if problem:
            told.append(f"not measured, and taken for quick: {problem}")
        print(f"links between ranks: {'; '.join(told)}", file=sys.stderr, flush=True)
        return links

    def _check(self, filed: Placement) -> None:
        names, told = self._job.network.names, [layer.name for layer in filed.layers]
        rows, here = self._job.plan.batch_size, [one.processes for one in self._machines]
        there = [one.processes for one in filed.machines]
        sizes = [self._job.slot_layout(i).nbytes(rows) for i in range(len(names) - 1)]
        problem = ""
        if told != names:
            problem = f"is of another network: its layers are {', '.join(told)}, this one's {', '.join(names)}"
        elif there != here:
            problem = f"is for {_machines(there)}, this run has {_machines(here)}"
        elif filed.batch_size != rows:
            problem = f"was measured with micro-batches of {filed.batch_size} rows, this run has {rows}"
        elif wrong := [i for i, size in enumerate(sizes) if filed.layers[i].output_bytes != size]:
            i = wrong[0]
            problem = f"has {filed.layers[i].output_bytes} bytes leave layer {names[i]}, this run {sizes[i]}"
        elif (listed := self._listed()) is not None and tuple(listed) != filed.stages:
            problem = f"has other stages than {self._options.stages!r}"
        if problem:
            raise ValueError(
                f"placement {self._options.placement} {problem}; name another file, or remove it to have it measured "
                "anew"
            )


def _machines(processes: Sequence[int]) -> str:
    total = f"{sum(processes)} {'process' if sum(processes) == 1 else 'processes'}"
    return f"{total} on one machine" if len(processes) == 1 else f"{' + '.join(map(str, processes))} processes"
