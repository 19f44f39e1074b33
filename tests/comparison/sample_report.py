"""A made-up report with everything in it that a page can show: for tests of the page, never of a claim."""

from dataclasses import replace

from unlocked.comparison.logged import LoggedRun, LoggedTraining
from unlocked.comparison.memory.results import ChainSettings, MemoryPoint, MemoryStudy
from unlocked.comparison.results import (
    ComparisonSettings,
    Contender,
    Environment,
    EpochFigures,
    Report,
    Run,
    SpanKind,
    StepSplit,
    TimelineExcerpt,
    TimelineSpan,
)
from unlocked.comparison.stages.results import MeasuredStages, StagesSettings, StagesStudy
from unlocked.comparison.stages.scaling_model import CostModel, Line, Link, predict

STAGES = (("conv1", "conv2"), ("conv3", "linear1", "output"))


def sample_report() -> Report:
    return Report(
        environment=Environment(
            cpu="Made-up CPU @ 2.00GHz",
            cores=2,
            memory_bytes=8 * 2**30,
            gpus=(),
            platform="Linux",
            python="3.11",
            versions={"unlocked": "0", "torch": "0"},
            commit="abc1234+",
            started_at="2026-01-01T00:00:00+00:00",
        ),
        settings=ComparisonSettings(
            command="python launch/compare.py --made-up",
            dataset="digits",
            model="SmallConv",
            layers=("conv1", "conv2", "conv3", "linear1", "output"),
            train_images=1437,
            test_images=360,
            image_shape=(1, 8, 8),
            device="cpu",
            batch_size=64,
            test_batch_size=128,
            optimizer="Adam",
            lr=0.01,
            weight_decay=0.0,
            momentum=0.9,
            temperature=0.5,
            label_smoothing=0.0,
            waveform="cosine",
            epochs=6,
            speed_steps=100,
            repeats=3,
            seeds=(0, 1),
            processes=2,
        ),
        contenders=(
            _contender("BP, sequential, 1 thread", "BP", "sequential", 2400, 98.0),
            _contender("BP, sequential, 2 threads", "BP", "sequential", 3900, None, threads=2),
            _contender("BP, GPipe, 2 processes", "BP", "GPipe", 2600, None, processes=2),
            _contender("BP, 1F1B, 2 processes", "BP", "1F1B", 2700, 97.5, processes=2),
            replace(
                _contender("BP, zero-bubble, 2 processes", "BP", "ZBV", 1, None, processes=2),
                status="failed",
                reason="RuntimeError: a <made-up> failure & its reason",
                runs=(),
            ),
            replace(
                _contender("BP, CUDA graph", "BP", "CUDA graph", 1, None),
                status="not run",
                reason="needs a CUDA device; torch sees none",
                runs=(),
            ),
            _contender("LLS, sequential", "LLS", "sequential", 2500, 96.9),
            _contender("LLS, 2 processes", "LLS", "processes", 4500, 96.9, processes=2),
            _contender("LLS_M, 2 processes", "LLS_M", "processes", 4450, 97.1, processes=2),
            _contender("LLS_MxM, 2 processes", "LLS_MxM", "processes", 4400, 97.3, processes=2),
        ),
        timelines=(_local_timeline(), _backpropagation_timeline()),
        logged=_logged(),
    )


def _logged() -> LoggedRun:
    return LoggedRun(
        note="made up",
        command="python main.py",
        model="LLS_SmallConv",
        dataset="CIFAR10",
        epochs=25,
        batch_size=64,
        steps_per_epoch=782,
        trainings={
            "BP": LoggedTraining(
                total_minutes=9.0,
                seconds_per_step=0.0235,
                data_seconds_per_step=0.018,
                test_acc1=81.1,
                test_acc5=99.0,
            ),
            "LLS": LoggedTraining(
                total_minutes=11.0,
                seconds_per_step=0.0295,
                data_seconds_per_step=0.018,
                test_acc1=77.7,
                test_acc5=97.6,
            ),
        },
    )


def sample_memory() -> MemoryStudy:
    points = [
        MemoryPoint(method=method, depth=depth, activation_bytes=size, persistent_bytes=1000 * depth, held_bytes=0)
        for depth in (4, 8, 16, 32, 64, 128, 256)
        for method, size in (
            ("BP", 780_000 * depth + 350_000),
            ("BP, checkpointed", round(900_000 * depth**0.5)),
            ("LLS", 1_065_484),
        )
    ]
    return MemoryStudy(settings=ChainSettings(), points=points)


def sample_stages() -> StagesStudy:
    model = CostModel(
        step=Line(intercept=0.0005, slope=0.0035, largest_residual=0.012),
        forward_share=0.45,
        output=0.0001,
        hop=Line(intercept=2e-5, slope=6e-11, largest_residual=0.04),
        backpropagation={"F": 0.0018, "B": 0.0017, "W": 0.0015, "U": 0.0001},
    )
    settings = StagesSettings(
        chain=ChainSettings(channels=32, image_size=16, batch_size=32),
        blocks_per_stage=2,
        rule="LLS",
        cores=2,
        repeats=3,
        microbatches=32,
        spread=0.1,
        speed=1.0,
        link_latency=None,
        link_bandwidth=None,
        torch="0",
        growing_limit=16,
    )
    measured = [
        MeasuredStages(stages=n, images_per_second=x, low=x - 90, high=x + 60, repeats=3, oversubscribed=n > 2)
        for n, x in ((1, 4290.0), (2, 3850.0), (4, 1800.0))
    ]
    link = Link(seconds=model.hop.at(settings.hop_bytes), occupies_sender=True)
    predictions = [
        predict(model, name, n, blocks=2, link=link, microbatches=32, spread=spread)
        for name in ("LLS", "GPipe", "1F1B", "ZB-H1")
        for spread in (0.0, 0.1)
        for n in (1, 2, 4, 8)
    ]
    predictions.append(predict(model, "1F1B", 16, blocks=2, link=link, microbatches=64))
    return StagesStudy(settings=settings, model=model, measured=measured, predictions=predictions)


def _contender(
    name: str, family: str, engine: str, rate: float, accuracy: float | None, *, processes: int = 1, threads: int = 1
) -> Contender:
    step = 64 / rate
    split = StepSplit(data=0.04 * step, compute=0.7 * step, wait=(processes - 1) * 0.1 * step, update=0.16 * step)

    def run(kind: str, seed: int, factor: float, epochs: tuple[EpochFigures, ...] = ()) -> Run:
        return Run(
            kind=kind,  # type: ignore[arg-type]
            seed=seed,
            steps=100,
            train_seconds=100 * step / factor,
            setup_seconds=0.5,
            images_per_second=rate * factor,
            split=(split,) * processes,
            peak_memory_bytes=(300 * 2**20,) * processes,
            bubble_share=0.08 if processes > 1 else None,
            energy_joules=None,
            epochs=epochs,
        )

    runs = [run("speed", 0, factor) for factor in (0.93, 1.0, 1.04)]
    if accuracy is not None:
        for seed in (0, 1):
            epochs = tuple(
                EpochFigures(
                    epoch=n,
                    seconds=(n + 1) * 23 * step * 1.2,
                    train_loss=1.0 / (n + 1),
                    test_loss=1.1 / (n + 1),
                    test_acc1=accuracy - 30 * 0.4**n + seed * 0.4,
                )
                for n in range(6)
            )
            runs.append(run("accuracy", seed, 0.8, epochs))
    return Contender(
        name=name,
        family=family,
        engine=engine,
        processes=processes,
        threads=threads,
        status="measured",
        stages=STAGES if processes > 1 else (),
        chunks=4 if engine in ("GPipe", "1F1B", "ZBV") else None,
        note="chosen as the fastest of 1, 2, 4 and 8 chunks" if engine == "1F1B" else "",
        runs=tuple(runs),
    )


def _local_timeline() -> TimelineExcerpt:
    spans = []
    for m in range(6):
        for row in range(2):
            start = 0.012 * m + 0.004 * row
            parts: list[tuple[SpanKind, float, float]] = [
                ("forward", 0.0, 0.004),
                ("send" if row == 0 else "receive", 0.004, 0.0045),
                ("local update", 0.0045, 0.0115),
            ]
            spans += [_span(row, kind, m, None, start + a, start + b) for kind, a, b in parts]
    return TimelineExcerpt(contender="LLS, 2 processes", rows=_rows(), seconds=0.08, spans=tuple(spans))


def _backpropagation_timeline() -> TimelineExcerpt:
    spans = []
    for m in range(4):
        for chunk in range(4):
            for row in range(2):
                start = 0.024 * m + 0.002 * chunk + 0.0025 * row
                spans.append(_span(row, "forward", m, chunk, start, start + 0.002))
                start = 0.024 * m + 0.011 + 0.0026 * chunk + 0.0026 * (1 - row)
                spans.append(_span(row, "backward", m, chunk, start, start + 0.0025))
    return TimelineExcerpt(contender="BP, 1F1B, 2 processes", rows=_rows(), seconds=0.09, spans=tuple(spans))


def _rows() -> tuple[str, ...]:
    return tuple(f"process {n}: {', '.join(stage)}" for n, stage in enumerate(STAGES))


def _span(row: int, kind: SpanKind, m: int, chunk: int | None, start: float, end: float) -> TimelineSpan:
    return TimelineSpan(row=row, kind=kind, microbatch=m, chunk=chunk, stage=row, start=start, end=end)
