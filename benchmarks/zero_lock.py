"""ZeroLock's own task (arXiv 2608.07974): a Llama with adapters in three chunks, its rule, three processes.

    python benchmarks/zero_lock.py                                  # against a plain loop of blocking sends over Gloo
    python benchmarks/zero_lock.py --runner CHECKOUT --json out.json    # against the authors' public runner

TinyLlama's shape with its sizes divided by 8 and 6 of its 22 layers, random weights, LoRA with r = 4 on the maps of
queries and values, sequences of 128 tokens, 8 a batch, cross-entropy at every chunk and agreement with the chunk before
(alpha 0.7). The contenders take turns; tokens per second are those of the training phase, without set-up. CHECKOUT is
one of github.com/unnameduser5000/unlock_trainer, whose tools/sim/run_bpfree_lora_pipeline_dist.py is run as it is, on
a model and tensors that are written for it. Its divergence is the other way round, KL(before || own), which costs the
same. Before that, the losses of the first steps are compared with a plain loop's in one process.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.comparison.environment import environment
from unlocked.data.order import epoch_order
from unlocked.models import Block, from_transformers, frozen_head
from unlocked.rules import FrozenHeadConsistency
from unlocked.runtime import Processes, RunResult, Trainer
from unlocked.runtime.engines import engine_class
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

SEED, ALPHA, RATE, STAGES = 0, 0.7, 3e-4, 3
RUNNER = "tools/sim/run_bpfree_lora_pipeline_dist.py"


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    told = {name: value for name, value in vars(options).items() if name not in ("json", "runner")}
    rival_name = "the authors' runner" if options.runner else "blocking sends"
    result: dict[str, Any] = {"environment": to_plain(environment()), "sizes": told, "rival": rival_name}
    result["first_losses"] = first_losses(options)
    print(f"losses of the first steps: {result['first_losses']}", flush=True)
    rival = partial(authors, Path(options.runner)) if options.runner else blocking
    contenders: dict[str, Callable[[argparse.Namespace], float]] = {"ours": ours, "rival": rival}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(options.turns):
        for name in contenders if turn % 2 == 0 else reversed(contenders):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = contenders[name](options)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            rate = options.steps * options.batch * options.tokens / seconds
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found[name].append({"tokens_per_second": round(rate, 1), "processor_seconds": round(cpu, 1)})
            print(f"{name}: {rate:,.0f} tokens/s, {cpu:.0f} processor seconds with set-up", flush=True)
    rates = {name: statistics.median(one["tokens_per_second"] for one in all_) for name, all_ in found.items()}
    ratios = [o["tokens_per_second"] / r["tokens_per_second"] for o, r in zip(*found.values(), strict=True)]
    result |= {"turns": found, "median_tokens_per_second": rates, "ratio": round(statistics.median(ratios), 3)}
    print(f"median {rates}, ratio {result['ratio']} ({min(ratios):.2f} to {max(ratios):.2f})")
    if options.json:
        write_json(Path(options.json), result)
    return 0


def llama(options: argparse.Namespace) -> Any:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def adapted(options: argparse.Namespace) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model: nn.Module = get_peft_model(
        llama(options), LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )
    return model


def tokens(options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = options.steps * options.batch
    return torch.randint(options.vocabulary, (rows, options.tokens), generator=generator)


def trained(engine: str, options: argparse.Namespace, steps: int) -> RunResult:
    model = adapted(options)
    rule = partial(FrozenHeadConsistency, head=frozen_head(model), alpha=ALPHA, hand_on=options.hand_on)
    trainer = Trainer(
        from_transformers(model, -(-options.layers // STAGES)),
        rule=rule,
        output_rule=partial(rule, on_scores=True),
        optimizer=partial(torch.optim.AdamW, lr=RATE),
        engine=Processes(stages=STAGES) if engine == "processes" else engine_class(engine)(),
        seed=SEED,
        progress=False,
    )
    return trainer.fit({"input_ids": tokens(options)}, epochs=1, batch_size=options.batch, max_steps=steps)


def ours(options: argparse.Namespace) -> float:
    return trained("processes", options, options.steps).train_seconds


def first_losses(options: argparse.Namespace, steps: int = 3) -> dict[str, list[float]]:
    """Each chunk's mean loss over the first steps: ours, and those of a plain loop by whole scores and autograd."""
    local = trained("sequential", options, steps).local_losses
    model = adapted(options)
    head = frozen_head(model)
    chunks = [Chunk(block, head, i) for i, block in enumerate(from_transformers(model, -(-options.layers // STAGES)))]
    optimizers = [torch.optim.AdamW([p for p in c.parameters() if p.requires_grad], lr=RATE) for c in chunks]
    sums = [0.0] * STAGES
    data = tokens(options)
    for rows in epoch_order(len(data), SEED, 0).split(options.batch)[:steps]:
        x, before = data[rows], None
        for k, (chunk, optimizer) in enumerate(zip(chunks, optimizers, strict=True)):
            loss, x, before = chunk(x, data[rows], before)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums[k] += float(loss.detach()) / steps
    found = {"ours": list(local.values()), "plain": sums}
    found["difference"] = [abs(a - b) for a, b in zip(local.values(), sums, strict=True)]
    return found


class Chunk(nn.Module):
    """A chunk as one would write it: whole scores, log-probabilities handed on."""

    def __init__(self, block: Block, head: nn.Module, index: int) -> None:
        super().__init__()
        self.block, self.head, self.last = block, head, index == STAGES - 1

    def forward(self, x: Tensor, ids: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        output = self.block(x)
        scores = output if self.last else self.head(output)
        own, targets = scores.log_softmax(-1), ids[:, 1:].flatten()
        shifted = own[:, :-1].flatten(0, 1)
        loss = F.nll_loss(shifted, targets)
        if before is not None:
            apart = F.kl_div(before[:, :-1].flatten(0, 1), shifted, reduction="batchmean", log_target=True)
            loss = ALPHA * loss + (1 - ALPHA) * apart
        return loss, output.detach(), own.detach()


def blocking(options: argparse.Namespace) -> float:
    """Three processes that receive, step and send, each after the other."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answers: Any = spawn.SimpleQueue()
        workers = [spawn.Process(target=chunk_worker, args=(k, options, folder, answers)) for k in range(STAGES)]
        for one in workers:
            one.start()
        for one in workers:
            one.join()
        if any(one.exitcode for one in workers):
            raise SystemExit("a worker of the plain loop failed")
        return float(answers.get())


def chunk_worker(rank: int, options: argparse.Namespace, folder: str, answers: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", STAGES)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=STAGES)
    model = adapted(options)
    chunk = Chunk(from_transformers(model, -(-options.layers // STAGES))[rank], frozen_head(model), rank)
    optimizer = torch.optim.AdamW([p for p in chunk.parameters() if p.requires_grad], lr=RATE)
    hidden = torch.empty(options.batch, options.tokens, options.width)
    scores = torch.empty(options.batch, options.tokens, options.vocabulary)
    dist.barrier()
    began = time.perf_counter()
    for ids in tokens(options).split(options.batch):
        if rank:
            dist.recv(hidden, rank - 1)
            dist.recv(scores, rank - 1)
        loss, output, own = chunk(hidden if rank else ids, ids, scores if rank else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank < STAGES - 1:
            dist.send(output, rank + 1)
            dist.send(own, rank + 1)
    dist.barrier()
    if rank == 0:
        answers.put(time.perf_counter() - began)
    dist.destroy_process_group()


def authors(checkout: Path, options: argparse.Namespace) -> float:
    """The authors' runner, on the CPU over Gloo, with whole log-probabilities handed on."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder)
        model = llama(options)
        model.save_pretrained(written / "model")
        manifest = written / "train.jsonl"
        manifest.write_text(
            "".join(json.dumps(one, allow_nan=False) + "\n" for one in records(model, options, written))
        )
        command = [sys.executable, str(checkout / RUNNER), "--model_name", str(written / "model")]
        command += ["--train_manifest", str(manifest), "--eval_manifest", str(manifest), "--output_dir", folder]
        command += [
            "--stage_devices",
            "cpu,cpu,cpu",
            "--dist_backend",
            "gloo",
            "--skip_eval_before",
            "--skip_eval_after",
        ]
        command += ["--belief_transport_mode", "full", "--alpha", str(ALPHA), "--learning_rate", str(RATE)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise SystemExit(f"the authors' runner failed:\n{done.stderr[-2000:]}")
        (phase,) = json.loads((written / "summary.json").read_text())["phases"]
        return float(phase["wall_ms"]) / 1000


def records(model: Any, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """What its manifest lists: the tensors of every batch, as little-endian files; the embedding is not its chunks'."""
    places = torch.arange(options.tokens).expand(options.batch, -1).contiguous()
    hidden = torch.full((options.tokens, options.tokens), torch.finfo(torch.float32).min).triu(1)
    mask = hidden.expand(options.batch, 1, -1, -1).contiguous()

    def written(name: str, tensor: Tensor) -> dict[str, Any]:
        (folder / name).write_bytes(tensor.numpy().tobytes())
        return {"path": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}

    shared = {"attention_mask": written("mask", mask), "position_ids": written("places", places)}
    for number, ids in enumerate(tokens(options).split(options.batch)):
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids)
        own = {"hidden_states": written(f"hidden{number}", embedded), "labels": written(f"labels{number}", ids)}
        choices = [{"token_ids": [1]}, {"token_ids": [2]}]
        yield {"dataset_index": number, "text": {}, "label_choices": choices, "tensors": {**shared, **own}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", help="checkout of the authors' repository; default: a plain loop of blocking sends")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--hand-on", choices=("scores", "hidden"), default="scores", help="what ours sends; default: as the runner"
    )
    parser.add_argument("--json", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
