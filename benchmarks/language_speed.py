"""The speed part of benchmarks/language.py: tokens/s and memory, in turns, each run in processes of its own."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from unlocked.comparison.contenders import Spec
from unlocked.comparison.environment import environment
from unlocked.comparison.measure import make_run
from unlocked.comparison.pool import Pool
from unlocked.comparison.request import Form, Request, save_data
from unlocked.comparison.rival.forms import forms_to_try
from unlocked.runtime import Processes
from unlocked.runtime.recipe import Recipe
from unlocked.runtime.typed import to_plain

__all__ = ["measure_speed", "specs_of"]

_NEVER = 1_000_000  # more micro-batches than any run has
_TRIAL_STEPS = 4
Figures = dict[str, Any]


def measure_speed(
    options: argparse.Namespace, held: Callable[[], Figures], add: Callable[[str, list[Figures]], None], parts: int
) -> None:
    """Every turn that the file lacks, of every contender.

    Args:
        held: what the file holds.
        add: adds figures of a kind to it.
        parts: processes of a pipeline, and the fewest parts of a network.
    """
    machine = environment()
    recipe = recipe_of(options)
    with Pool() as pool:
        data = pool.folder / "data.pt"
        save_data(data, recipe.load_data())
        shared = Request(spec=Spec(name="", family="BP"), task="train", recipe=recipe, data=data)
        specs = specs_of(options.only, cores=machine.cores, processes=parts)
        form = _form(shared, specs, pool, held, add, parts)
        for turn in range(options.turns):
            for spec, trains in specs if turn % 2 == 0 else reversed(specs):
                key = {"contender": spec.name, "turn": turn}
                if any(one.items() >= key.items() for one in held()["speed"]):
                    continue
                cut = parts if trains.endswith(f"/{parts}") else None
                own = replace(
                    recipe, training_mode=spec.family, engine=spec.engine, local_module_num=cut, kernels=spec.kernels
                )
                run = make_run("speed", turn, pool.run(replace(shared, spec=spec, recipe=own, form=form)))
                rate = run.images_per_second * options.length
                figures = key | {
                    "trains": trains,
                    "tokens_per_second": round(rate, 1),
                    "peak_memory_bytes": list(run.peak_memory_bytes),
                    "own_memory_bytes": [
                        peak - base for peak, base in zip(run.peak_memory_bytes, run.base_memory_bytes, strict=True)
                    ],
                    "environment": to_plain(machine),
                }
                add("speed", [figures])
                print(f"turn {turn + 1}, {spec.name}: {rate:,.0f} tokens/s", flush=True)


def specs_of(contenders: list[str], *, cores: int, processes: int) -> list[tuple[Spec, str]]:
    """Who is timed, and the contender whose bits per byte are theirs."""
    found: list[tuple[Spec, str]] = []
    for contender in contenders:
        if contender == "BP":
            threads = sorted({1, cores})
            found += [(Spec(name=f"BP, {n} thread{'s' * (n > 1)}", family="BP", threads=n), contender) for n in threads]
            name = f"BP 1F1B, {processes} processes"
            found.append((Spec(name=name, family="BP", schedule="1F1B", processes=processes), contender))
            continue
        found.append(
            (
                Spec(
                    name=f"{contender}, {processes} processes",
                    family=contender.partition("/")[0],
                    engine=Processes(max_recoveries=0),  # the meter lives in the process that trains
                    processes=processes,
                ),
                contender,
            )
        )
    return found


def recipe_of(options: argparse.Namespace) -> Recipe:
    return Recipe(
        dataset="stdlib",
        model="gpt-mini",
        width=options.width,
        depth=options.depth,
        sequence_length=options.length,
        num_train=options.speed_steps * options.batch,
        num_test=options.batch,
        batch_size=options.batch,
        optimizer="AdamW",
        lr=options.lr[0],
        weight_decay=0.01,  # torch's own for AdamW
        temperature=1.0,
        num_epochs=_NEVER,
        max_steps=options.speed_steps,
        no_eval=True,
        plain=True,
        print_freq=_NEVER,
    )


def _form(
    shared: Request,
    specs: list[tuple[Spec, str]],
    pool: Pool,
    held: Callable[[], Figures],
    add: Callable[[str, list[Figures]], None],
    processes: int,
) -> Form | None:
    """The fastest way to cut 1F1B, kept in the file; None: nobody needs it."""
    rivals = [spec for spec, _ in specs if spec.is_bp_pipeline]
    if not rivals:
        return None
    if not held()["forms"]:
        costs = pool.run(replace(shared, spec=Spec(name="costs", family="BP"), task="costs"))[0].costs
        assert costs is not None
        size = shared.recipe.batch_size
        forms = forms_to_try("1F1B", costs, processes=processes, batch_size=size, chunks=None)
        few = replace(shared.recipe, max_steps=_TRIAL_STEPS)
        trials = pool.run(replace(shared, spec=rivals[0], recipe=few, task="trials", forms=tuple(forms)))[0].trials
        told = [to_plain(form) | to_plain(trial) for form, trial in zip(forms, trials, strict=True)]
        add("forms", told)
        print(f"1F1B, {len(forms)} forms tried: {[(t['chunks'], t['images_per_second']) for t in told]}", flush=True)
    tried = held()["forms"]
    best = max(tried, key=lambda trial: trial["images_per_second"] or 0.0)
    if not best["images_per_second"]:
        raise ValueError(f"1F1B runs in no form: {best['reason']}")
    return Form(chunks=best["chunks"], parts=tuple((begin, end) for begin, end in best["parts"]))
