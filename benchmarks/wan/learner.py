"""A training process of a WAN job: the same model, text and Trainer, however its learners talk to each other.

    python -m benchmarks.wan.learner TOLD.json          trains
    python -m benchmarks.wan.learner TOLD.json FILE     prints the validation loss of a file of safetensors

| method | how |
|---|---|
| `alone` | a plain Trainer: no communication at all |
| `ddp` | `Trainer(strategy="ddp", num_nodes=M, devices=1)`, gloo |
| `post_local_sgd` | the same, but parameters are averaged every `sync_interval_steps` steps, by torch's `PeriodicModelAverager` |
| `ours` | `DecoupledDiLoCoStrategy(syncer=...)` |
| `torchft_diloco`, `torchft_streaming` | no Trainer: see `torchft_learner.py`, which trains them; they are validated here |

Lightning switches post-local SGD on for CUDA alone (`DDPStrategy(model_averaging_period=...)` registers its hook on no other device), so a
callback calls the same averager here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.stall import QUIET
from benchmarks.wan.progress import ProgressFile

__all__ = ["make_callback", "train", "validate"]


def main() -> None:
    """Train, or validate."""
    told = json.loads(Path(sys.argv[1]).read_text())
    if len(sys.argv) > 2:
        print(json.dumps(validate(told, Path(sys.argv[2]))))
    else:
        train(told)


def make(told: dict[str, Any]) -> tuple[Any, Any]:
    """The untrained module and its text."""
    from recipes.gpt_text.data import TextData
    from recipes.gpt_text.model import GPTText

    return GPTText(**told["model"]), TextData(**told["data"])


def train(told: dict[str, Any]) -> None:
    """Train `max_steps` inner steps; leave the ends of steps, the figures at two of them, and (`ddp`, `alone`) the parameters."""
    from lightning.pytorch import Trainer, seed_everything
    from safetensors.torch import save_file

    seed_everything(told["seed"], verbose=False)
    module, data = make(told)
    strategy, nodes = make_strategy(told)
    if told["method"] == "alone":
        seed_everything(1000 * told["seed"] + told["learner_id"] + 1, verbose=False)  # its own order of the text
    callback = make_callback(told, strategy)
    options = QUIET | {"max_steps": told["max_steps"], "max_epochs": -1, "gradient_clip_val": 1.0}
    trainer = Trainer(**options, **nodes, strategy=strategy, callbacks=[callback])
    trainer.fit(module, datamodule=data)
    if told["method"] != "ours" and told["learner_id"] == 0:
        save_file({name: value.detach().clone() for name, value in module.state_dict().items()}, told["weights"])
    Path(told["out"]).write_text(json.dumps(callback.row()))


def make_strategy(told: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The Trainer's strategy, and what else it needs to know of the others."""
    if told["method"] == "alone":
        return "auto", {}
    if told["method"] in ("ddp", "post_local_sgd"):
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(process_group_backend="gloo"), {"num_nodes": told["num_learners"]}
    from benchmarks.storm.learner import dial_through
    from lightning_diloco import DecoupledDiLoCoStrategy

    dial_through(told["routes"])
    place = {"learner_id": told["learner_id"], "num_learners": told["num_learners"]}
    return DecoupledDiLoCoStrategy(syncer=told["endpoint"], **place, **told["sync"], **told["link"]), {}


def make_callback(told: dict[str, Any], strategy: Any) -> Any:
    """What notes the ends of steps and the figures of the time that counts; averages parameters for `post_local_sgd`."""
    from lightning.pytorch import Callback
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    from benchmarks.wan.watch import Watch

    class Notes(Callback):
        """See `make_callback`."""

        def __init__(self) -> None:
            self.file = ProgressFile(Path(told["steps"]))
            self.watch: Watch | None = None
            self.marks: dict[int, dict[str, float]] = {}
            self.start_s = 0.0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            wait_for_all(Path(told["steps"]).parent, told["learner_id"], told["num_learners"])
            self.start_s = time.monotonic()
            if told["method"] == "ours":
                self.watch = Watch(strategy._outer_sync._client)
            if told["method"] == "post_local_sgd":
                trainer.model.require_backward_grad_sync = False
                period = told["sync"]["sync_interval_steps"]
                # It counts from 0: so the first average ends the first interval, and the last one the job.
                self.averager = PeriodicModelAverager(period=period, warmup_steps=period - 1)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if told["method"] == "post_local_sgd":
                self.averager.average_parameters(pl_module.parameters())
            self.file.note(trainer.global_step)
            if trainer.global_step in told["mark_at"]:
                self.mark(trainer.global_step)

        def mark(self, step: int) -> None:
            """The figures of this moment."""
            figures = self.watch.figures() if self.watch is not None else {}
            self.marks[step] = {"at_s": time.monotonic(), "process_s": time.process_time(), **link_bytes(), **figures}

        def row(self) -> dict[str, Any]:
            """All of it."""
            rest = self.watch.rest() if self.watch is not None else {}
            return {"start_s": self.start_s, "end_s": time.monotonic(), "marks": self.marks, **rest}

    return Notes()


def wait_for_all(folder: Path, learner_id: int, num_learners: int, what: str = "ready") -> None:
    """Begin together: the steps of one that waits for a second process's start would be no part of the comparison."""
    (folder / f"{what}_{learner_id}").touch()
    while not all((folder / f"{what}_{i}").exists() for i in range(num_learners)):
        time.sleep(0.02)


def link_bytes() -> dict[str, int]:
    """What this namespace's link has carried, Ethernet frames; {} where there is none."""
    statistics = Path("/sys/class/net/eth0/statistics")
    names = {"link_up": "tx_bytes", "link_down": "rx_bytes"}
    return {key: int((statistics / name).read_text()) for key, name in names.items() if (statistics / name).exists()}


def validate(told: dict[str, Any], path: Path) -> float:
    """Nats per byte on the held-out text."""
    from benchmarks.storm.learner import loss_of

    return loss_of(*make(told), path)


if __name__ == "__main__":
    main()
