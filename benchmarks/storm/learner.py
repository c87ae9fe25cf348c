"""One learner of a storm: `python -m benchmarks.storm.learner`, started by `cluster.Cluster` with one line of JSON on its standard input.

An ordinary Trainer with `syncer="tcp://..."` on a byte-level GPT of 60 thousand parameters. Three things are not those of a user's script:

* its place (token, number of its life) is given to the strategy, as the supervisor of `Trainer(devices=N)` gives it to its learners: a
  restarted learner takes its id over at once;
* it dials both sockets of the syncer through addresses of the storm's proxy. In the handshake the syncer names its own bulk address, which
  would lead past the proxy, so addresses are exchanged where the socket is dialled;
* a step lasts `step_s`: what is left after its arithmetic is slept, as a host waits for its accelerator. Otherwise four learners would
  saturate two cores, and every figure would be that of the machine's scheduler.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.stall import QUIET
from lightning_diloco.strategy.life_line import hold_life_line, read_assignment

MODEL: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "channels": 32, "context": 32, "warmup_steps": 200, "final_lr_share": 1.0}
"""The learning rate is constant after its warm-up, unless `make_module` is told otherwise."""
FLOOR = 0.1
"""Of the peak learning rate, where it falls."""
DATA: dict[str, Any] = {"context": 32, "batch_size": 8}
TOKENS_PER_STEP = DATA["context"] * DATA["batch_size"]
SYNC: dict[str, Any] = {"num_fragments": 24, "sync_interval_steps": 24, "min_quorum": 4}
"""min_quorum: as the recipes have it, all learners that are active. One that is stopped holds up every merge until it counts as silent, for
10 s; its fellows train on meanwhile."""


def main() -> None:
    """Train until the file `end` is there, the job's tokens are trained, or somebody ends this process."""
    told = read_assignment(0)
    hold_life_line(0)
    dial_through(told["routes"])

    from lightning.pytorch import Trainer, seed_everything

    from lightning_diloco import DecoupledDiLoCoStrategy

    # One initial model, and for each life its own order of the data.
    seed_everything(told["seed"], verbose=False)
    module, data = make_module(told["fall_steps"]), make_data()
    seed_everything(1000 * told["seed"] + 50 * told["learner_id"] + told["life"] + 1, verbose=False)
    strategy = DecoupledDiLoCoStrategy(
        syncer=told["endpoint"], learner_id=told["learner_id"], run_dir=told["run_dir"], **(SYNC | told["sync"])
    )
    pace = make_pace(Path(told["steps"]), Path(told["end"]), told["step_s"])
    trainer = Trainer(**QUIET, max_steps=10**6, max_epochs=-1, strategy=strategy, callbacks=[pace])
    place = strategy.assignment
    assert place is not None
    strategy.take(replace(place, token=told["token"], takeover_token=told["takeover_token"], life=told["life"]))
    trainer.fit(module, datamodule=data)


def dial_through(routes: dict[str, str]) -> None:
    """Let this process dial other addresses in the place of those that it is told.

    Args:
        routes: by the address that is named, the one to dial.
    """
    from lightning_diloco.runtime.transport import LearnerTransport

    dial = LearnerTransport._dial
    LearnerTransport._dial = lambda self, endpoint, prefix: dial(self, routes.get(endpoint, endpoint), prefix)  # type: ignore[method-assign]


def make_module(fall_steps: int = 0) -> Any:
    """The untrained module; its learning rate falls to `FLOOR` over so many steps of the job's clock (0: it stays)."""
    from torch.optim.lr_scheduler import LambdaLR

    from recipes.byte_model import warmup_cosine
    from recipes.gpt_text.model import GPTText

    class Falling(GPTText):  # type: ignore[misc]
        """The storm has no `max_steps`, at which the recipe's schedule ends."""

        def configure_optimizers(self) -> Any:
            """The recipe's optimizer with a schedule of its own."""
            built = super().configure_optimizers()
            warmup_steps = self.hparams["warmup_steps"]
            schedule = LambdaLR(
                built["optimizer"], lambda n: warmup_cosine(n, warmup_steps=warmup_steps, max_steps=fall_steps, floor=FLOOR)
            )
            return built | {"lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return (Falling if fall_steps else GPTText)(**MODEL, learning_rate=3e-3)


def make_data() -> Any:
    """The text: Python's standard library. Every learner draws from all of it."""
    from recipes.gpt_text.data import TextData

    return TextData(**DATA)


def make_pace(steps: Path, end: Path, step_s: float) -> Any:
    """A callback that gives steps their length, notes their ends, and ends the training when the file `end` is there."""
    from lightning.pytorch import Callback

    from benchmarks.storm.steps import StepFile

    class Pace(Callback):
        """See `make_pace`."""

        def __init__(self) -> None:
            self.file = StepFile(steps)
            self.due_s = 0.0

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            time.sleep(max(0.0, self.due_s - time.monotonic()))
            self.due_s = time.monotonic() + step_s

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.file.note()
            trainer.should_stop = trainer.should_stop or os.path.exists(end)

    return Pace()


def validate(path: Path) -> float:
    """Nats per byte of the model in a file of safetensors, on the held-out text."""
    return loss_of(make_module(), make_data(), path)


def loss_of(module: Any, data: Any, path: Path) -> float:
    """The same, of a module whose weights are in the file, on that text."""
    import torch
    from safetensors.torch import load_file

    missing = set(dict(module.named_parameters())) & set(module.load_state_dict(load_file(path), strict=False).missing_keys)
    if missing:
        raise SystemExit(f"{path} lacks {sorted(missing)}.")
    module.eval()
    with torch.no_grad():
        losses = [(float(module._predict(batch)[0]), len(batch)) for batch in data.val_dataloader()]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


if __name__ == "__main__":
    main()
