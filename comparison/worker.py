"""What runs in a contender's own processes."""

import json
import os
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from unlocked.comparison.leaderboard.inspection import inspect
from unlocked.comparison.meter import MeasuredTrainer, Meter, reset_peak_memory
from unlocked.comparison.networks import network_of
from unlocked.comparison.request import LayerCosts, RankAnswer, Request, load_data
from unlocked.comparison.results import EpochFigures, SpanKind, TimelineSpan
from unlocked.comparison.rival.worker import backpropagation_costs, train_pipeline, try_forms
from unlocked.runtime.costs import measure_costs
from unlocked.runtime.job import prepare_process
from unlocked.runtime.machine import peak_memory_bytes
from unlocked.runtime.network import build_layer
from unlocked.runtime.recipe import make_optimizer, make_rule
from unlocked.runtime.result import RunResult
from unlocked.workers.actions import Action
from unlocked.workers.fused import choose_step

__all__ = ["work"]


def work(request: Request, rank: int, port: int, log: Path, answer: Connection) -> None:
    """The main function of one process: does the request's task and sends ("done", RankAnswer) or ("failed", reason).

    Args:
        port: where the contender's processes meet, free on this machine.
        log: file for everything that this process prints.
    """
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(request.spec.threads)
    world = {"RANK": rank, "WORLD_SIZE": request.spec.processes, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("OMP_NUM_THREADS", str(request.spec.threads))
    try:
        answer.send(("done", _do(request)))
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        answer.send(("failed", f"{type(error).__name__}: {text}" if text else type(error).__name__))
    finally:
        answer.close()


def _do(request: Request) -> RankAnswer:
    if request.task == "costs":
        return RankAnswer(costs=_measure_costs(request))
    if request.task == "inspect":
        return RankAnswer(inspection=inspect(request.recipe, load_data(request.data)[0]))
    if request.spec.is_bp_pipeline:
        return try_forms(request) if request.task == "trials" else train_pipeline(request)
    return _train(request)


def _train(request: Request) -> RankAnswer:
    """By the project's own engines."""
    recipe, spec = request.recipe, request.spec
    train, test = load_data(request.data)
    device = torch.device(recipe.device)
    base_memory = reset_peak_memory(device)
    meter = Meter(device)
    trace = request.data.with_name(f"trace-{os.environ['MASTER_PORT']}.json") if request.timeline else None
    trainer = recipe.trainer(
        train, MeasuredTrainer, meter=meter, trace=trace, timeout=min(recipe.timeout, request.timeout)
    )
    result = recipe.fit(trainer, train, test)
    rank, on_cpu = int(os.environ["RANK"]), device.type == "cpu"
    busy = tuple(result.busy_fraction) if len(result.busy_fraction) == spec.processes > 1 else None
    return RankAnswer(
        steps=result.steps,
        images=round(result.images_per_second * result.train_seconds),
        train_seconds=result.train_seconds,
        setup_seconds=result.setup_seconds,
        data_seconds=meter.data_seconds,
        update_seconds=meter.update_seconds,
        busy=busy,
        is_split=on_cpu,
        peak_memory_bytes=peak_memory_bytes(device),
        base_memory_bytes=base_memory,
        energy_joules=meter.energy_joules(),
        stages=tuple(tuple(layers) for layers in result.stages) if spec.engine.name != "sequential" else (),
        epochs=_epochs(result),
        weights_sha256=result.weights_sha256 or None,
        spans=_read_trace(trace) if trace is not None and rank == 0 else (),
    )


def _epochs(result: RunResult) -> tuple[EpochFigures, ...]:
    found: list[EpochFigures] = []
    seconds = 0.0
    for epoch in result.epochs:
        seconds += epoch.seconds
        found.append(
            EpochFigures(
                epoch=epoch.epoch,
                seconds=seconds,
                train_loss=epoch.train_loss,
                test_loss=epoch.eval_loss,
                test_acc1=epoch.eval_acc1,
                layer_acc1=tuple((name, value) for name, value in epoch.layer_acc1),
            )
        )
    return tuple(found)


def _read_trace(path: Path) -> tuple[TimelineSpan, ...]:
    """The actions of a Chrome trace that an engine has written; without waiting for and handing on micro-batches."""
    kinds: dict[str, SpanKind] = {"F": "forward", "U": "local update"}
    events = json.loads(path.read_text())["traceEvents"]
    actions = [(Action.parse(event["name"]), event) for event in events if event["ph"] == "X"]
    return tuple(
        TimelineSpan(
            row=action.stage,  # each process holds one
            stage=action.stage,
            kind=kinds[action.kind.value],
            microbatch=action.microbatch,
            chunk=None,
            start=event["ts"] / 1e6,
            end=(event["ts"] + event["dur"]) / 1e6,
        )
        for action, event in actions
        if action.kind.value in kinds
    )


def _measure_costs(request: Request) -> LayerCosts:
    """Of every layer, for splitting the network: backpropagation's and the local rule's, each by its own measure."""
    recipe = request.recipe
    train, _ = load_data(request.data)
    prepare_process()
    device = torch.device(recipe.device)
    optimizer = make_optimizer(recipe)

    local = network_of(recipe, train)
    rule = make_rule(replace(recipe, training_mode="LLS"))
    assert not isinstance(rule, str)
    step = choose_step(recipe.kernels, device)
    costs = measure_costs(
        lambda index: build_layer(local, index, rule=rule, optimizer=optimizer, device=device, step=step),
        local,
        batch_size=recipe.batch_size,
        device=device,
    )
    return LayerCosts(
        backpropagation=backpropagation_costs(network_of(recipe, train), optimizer, recipe.batch_size, device),
        local=tuple(costs),
    )
