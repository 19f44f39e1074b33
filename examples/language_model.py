"""A byte-level language model on Python's own standard library, by local losses, in a pipeline of processes.

python examples/language_model.py [STAGES]
"""

import sys
from functools import partial

import torch

from unlocked import Trainer
from unlocked.data import load_dataset
from unlocked.models import generate, gpt
from unlocked.rules import LocalLosses
from unlocked.runtime import Processes

LENGTH = 64


def main() -> None:
    stages = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    train, test = load_dataset("stdlib", sequence_length=LENGTH, num_train=768, num_test=64)
    trainer = Trainer(
        gpt(num_classes=train.num_tokens, image_size=LENGTH, width=64, depth=2),
        rule=LocalLosses(temperature=1.0),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        engine=Processes(stages=stages) if stages > 1 else "sequential",
        threads=1,
    )
    result = trainer.fit(train, epochs=2, batch_size=16, eval_data=test)
    for epoch in result.epochs:
        bits = dict(epoch.eval_figures)["bits_per_byte"]
        print(f"epoch {epoch.epoch + 1}: {bits:.3f} bits per byte, local losses {dict(epoch.local_losses)}")
    written = generate(trainer.module, torch.tensor([list(b"def ")]), 24, length=LENGTH)
    print(f"generated {bytes(written[0].tolist())!r}")
    print(f"in {len(result.stages)} stages, weights_sha256 {result.weights_sha256}")


if __name__ == "__main__":
    main()
