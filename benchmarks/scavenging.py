"""Machines that are free for a while: two learners train throughout, two more join for the middle half of the time and leave.

    .venv/bin/python benchmarks/scavenging.py [--seconds S] [--seed N] [--json FILE]

Two jobs after one another, of the same length: two learners alone, and the same two with two more that join by hand after a quarter of the
time and get SIGTERM after three quarters. A learner is a Trainer with `syncer=` on a device of half a core, emulated by waiting as in
`mixed.py`; the syncer is the command. Every few seconds the global model is taken out of the newest snapshot (`lightning-diloco export`
does the same) and validated after the job, on the held-out text.

| figure | what |
|---|---|
| time to a loss | seconds until the global model has it, without over with; losses: that of `without` at half of its time, and at its end |
| longest step | of the two that train throughout, around each change, over their median step; aim: at most 2 |

The exit code is 1 if the aim is missed, or if more machines did not bring the loss sooner.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.mixed import make_data, make_module, make_steps  # noqa: E402
from benchmarks.recipe_rows import table  # noqa: E402
from benchmarks.row_file import write_rows  # noqa: E402
from benchmarks.syncer_process import running_syncer  # noqa: E402

SPEED = 0.5
EVERY_S = 5.0
"""Between two looks at the global model."""
AROUND_S = 10.0
"""A step that ends in this time after a join or leave counts as one around it."""


def main() -> int:
    """Run both jobs, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=160.0, help="of each job (default 160)")
    parser.add_argument("--seed", type=int, default=0, help="of model and data (default 0)")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "scavenging.json", metavar="FILE", help="result")
    parser.add_argument("--learner", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.learner:
        learn(arguments.learner)
        return 0
    if arguments.seconds < 40:
        parser.error(f"--seconds {arguments.seconds:g}: at least 40.")
    jobs = {name: run(name == "with", arguments) for name in ("without", "with")}
    write_rows(arguments.json, jobs)
    return report(jobs, arguments.seconds)


def run(has_guests: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """One job; its losses by time, its steps, its joins and leaves."""
    from lightning_diloco.errors import ConfigurationError
    from lightning_diloco.runtime.exporting import export_model

    with tempfile.TemporaryDirectory(prefix="lightning_diloco_scavenging_") as name:
        folder = Path(name)
        with running_syncer(folder / "run") as (syncer, endpoint):
            learners = [_start(folder, endpoint, i, arguments) for i in range(2)]
            guests: list[subprocess.Popen[bytes]] = []
            begin_s, changes, looks = _first_step(folder, syncer), [], []
            try:
                while (at_s := time.monotonic() - begin_s) < arguments.seconds:
                    if has_guests and not guests and at_s > arguments.seconds / 4:
                        guests = [_start(folder, endpoint, i, arguments) for i in (2, 3)]
                        changes.append(("join", time.monotonic()))
                    if guests and len(changes) == 1 and at_s > 3 * arguments.seconds / 4:
                        changes.append(("leave", time.monotonic()))
                        for guest in guests:
                            guest.send_signal(signal.SIGTERM)
                    try:
                        export_model(folder / "run", folder / f"look_{len(looks):03d}.safetensors")
                        looks.append(at_s)
                    except ConfigurationError:
                        pass  # no snapshot yet
                    time.sleep(EVERY_S)
                (folder / "end").touch()
                for process in [*learners, *guests, syncer]:
                    process.wait(60.0)
            finally:
                for process in [*learners, *guests]:
                    process.kill()
        from benchmarks.storm.learner import validate

        losses = [validate(folder / f"look_{i:03d}.safetensors") for i in range(len(looks))]
        steps = [[end_s for end_s, _ in json.loads((folder / f"steps_{i}.json").read_text())] for i in range(2)]
        summary = json.loads((folder / "run" / "summary.json").read_text())
        return {
            "losses": list(zip(looks, losses, strict=True)),
            "steps": [[end_s - begin_s for end_s in ends] for ends in steps],
            "changes": [(kind, at_s - begin_s) for kind, at_s in changes],
            "tokens_merged": summary["tokens_merged"],
            "mean_members": summary["mean_members"],
        }


def _start(folder: Path, endpoint: str, learner_id: int, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    told = {"folder": str(folder), "endpoint": endpoint, "learner_id": learner_id, "seed": arguments.seed}
    log = (folder / f"log_{learner_id}.txt").open("wb")
    return subprocess.Popen([sys.executable, __file__, "--learner", json.dumps(told)], stdout=log, stderr=log, cwd=folder)


def _first_step(folder: Path, syncer: subprocess.Popen[bytes]) -> float:
    """The time at which both learners are training."""
    while not all((folder / f"begun_{i}").exists() for i in range(2)):
        if syncer.poll() is not None:
            raise SystemExit("The syncer has ended.")
        time.sleep(0.05)
    return time.monotonic()


def learn(told: dict[str, Any]) -> None:
    """One learner's process, until the file ``end`` is there or SIGTERM comes."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from benchmarks.stall import QUIET
    from lightning_diloco import DecoupledDiLoCoStrategy

    folder, learner_id = Path(told["folder"]), told["learner_id"]
    seed_everything(told["seed"], verbose=False)
    module = make_module((SPEED,) * 4, learner_id)
    seed_everything(1000 * told["seed"] + learner_id + 1, verbose=False)

    class Until(Callback):
        """Says that training has begun, and ends it."""

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            """A look at two files."""
            (folder / f"begun_{learner_id}").touch()
            trainer.should_stop = trainer.should_stop or (folder / "end").exists()

    strategy = DecoupledDiLoCoStrategy(
        syncer=told["endpoint"], learner_id=learner_id, run_dir=folder / "run", min_quorum=4, snapshot_interval_s=EVERY_S / 2
    )
    callbacks = [make_steps(folder, learner_id, None), Until()]
    trainer = Trainer(**QUIET, strategy=strategy, max_steps=10**6, max_epochs=-1, callbacks=callbacks)
    trainer.fit(module, datamodule=make_data(8))


def report(jobs: dict[str, dict[str, Any]], seconds: float) -> int:
    """Print the tables; 1 if an aim is missed."""
    alone, guests = jobs["without"]["losses"], jobs["with"]["losses"]
    lines, ok = [], True
    for share in (0.5, 1.0):
        wanted = min(loss for at_s, loss in alone if at_s <= share * seconds)
        times = [next((at_s for at_s, loss in losses if loss <= wanted), None) for losses in (alone, guests)]
        sooner = times[0] / times[1] if times[0] is not None and times[1] is not None else None
        ok &= sooner is not None and (share < 1 or sooner > 1)
        lines.append([f"{wanted:.4f}", *(f"{t:.0f}" if t is not None else "never" for t in times), f"{sooner:.2f}" if sooner else "-"])
    print(table(["loss", "two learners, s", "two more for the middle half, s", "times as fast"], lines))
    print()
    lines = []
    for kind, at_s in jobs["with"]["changes"]:
        for learner_id, ends in enumerate(jobs["with"]["steps"]):
            gaps = [(b, b - a) for a, b in zip(ends, ends[1:], strict=False)]
            median_s = statistics.median(gap for _, gap in gaps)
            longest_s = max(gap for end_s, gap in gaps if at_s <= end_s <= at_s + AROUND_S)
            ok &= longest_s <= 2 * median_s
            lines.append([kind, str(learner_id), f"{1e3 * median_s:.0f}", f"{1e3 * longest_s:.0f}", f"{longest_s / median_s:.2f}"])
    print(table(["change", "learner", "median step, ms", "longest step around it, ms", "ratio (at most 2)"], lines))
    rows = [[name, f"{job['tokens_merged']:,}", f"{job['mean_members']:.2f}"] for name, job in jobs.items()]
    print("\n" + table(["job", "tokens merged", "members of a merge"], rows))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
