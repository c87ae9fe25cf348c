"""Training over links as between sites: Lightning's `ddp` and this strategy in one run, on one machine, behind the same links.

    .venv/bin/python benchmarks/wan.py [--part ratio] [--learners 2] [--wire bf16 int4] [--rounds 3] [--steps 264] [--torchft] [--json FILE]
    .venv/bin/python benchmarks/wan.py --part never-waits | control | flap

Each learner and the syncer has a network namespace of its own, and a link that the kernel limits in both directions (`wan/net.py`; needs
root). A learner's link has the rate r, the syncer's M r. Learner i is pinned to core i (modulo), with all its threads; the syncer may run
anywhere, so on two cores it takes its time from the learners, as does the kernel's work for the links. A step is therefore chosen long
(`--batch`).

| part | links | aims |
|---|---|---|
| `ratio` | r such that the communication of `ddp` takes `--ratio` times its computing; measured, it has to be 24 to 58 | A, B, C |
| `never-waits` | a tenth of the rate that our payloads need | B; at most one contribution of a fragment on its way; nothing lost |
| `control` | 10 Mbit/s, and more payload than passes | B; control is answered within 250 ms at the 99th percentile; nothing lost |
| `flap` | every 10 s one is down for 3 s: a learner's, another's, the syncer's | B; nothing lost |

A: 20 times the tokens per second of `ddp`, and the lowest loss of all rows at equal wall time. B: 0.97 of those of the same learners
without communication. C: bytes of a learner and step at most 1/45 of `ddp`'s in bf16 and 1/165 in int4 (with M = 4: 1/68 and 1/250),
counted on the link.

`alone` are the same processes on the same cores at once, as plain Trainers that do not talk: jobs of it stand before and after each of
ours, so that the machine's slow drift falls out. `ddp` is timed over 30 steps behind the limited links; its loss comes from the same job
without limits, which computes the same; so do those of post-local SGD. `--delay-ms` puts a relay (`wan/relay.py`) between our learners and
the syncer, and none into `ddp`: that favours `ddp`. Without root, or in a container without its rights, there are no namespaces: our links
are then relays with a rate, what a link carries is not counted, and `ddp` is left out.

`--torchft` adds torchft's DiLoCo and streaming DiLoCo to `ratio` (`wan/torchft_learner.py`), each between two `alone`, over as many steps
as ours and behind the same limited links; its loss at equal wall time comes from a job without limits, as `ddp`'s. It is off by default
because it installs torchft (`wan/torchft_packages.py`), in a folder below `outputs/` that only these jobs see. Without namespaces, or if
torchft cannot be installed, the rows are left out, and it is said why. It is spared the delay, as `ddp` is.

The exit code is 1 if an aim is missed. Jobs that the JSON file holds are not run again.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.row_file import read_rows, write_rows  # noqa: E402
from benchmarks.wan.jobs import Job, Setting  # noqa: E402
from benchmarks.wan.net import Net, is_possible  # noqa: E402
from benchmarks.wan.report import ANSWER_S, ddp_bytes, our_bytes, p99, ratio, single  # noqa: E402
from benchmarks.wan.torchft_packages import find_torchft  # noqa: E402

MODEL: dict[str, Any] = {"num_layers": 4, "num_heads": 4, "channels": 128, "context": 64}
"""0.85 M parameters: recipe `gpt_text`."""
CONTROL_MODEL = MODEL | {"channels": 256}
CONTROL_BATCH, CONTROL_BYTES_PER_S = 1, 10e6 / 8
"""3.3 M parameters and short steps: more payload than passes."""
FULL = 0.8
INTERVAL = 24
DDP_FIRST = 5
RATES = (1.0, 2.0)
"""`ddp` has the better of these inner learning rates, over ours: with more in a batch it likes a higher one."""
FLAP_S, DOWN_S = 10.0, 3.0


def main() -> int:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), default="ratio")
    parser.add_argument("--learners", type=int, default=2, metavar="M", help="default 2")
    parser.add_argument("--wire", nargs="+", metavar="DTYPE", help="wire_dtype, one row each (default bf16 int4 for `ratio`, bf16 else)")
    parser.add_argument("--rounds", type=int, default=3, help="of `ratio`: jobs of each wire (default 3)")
    parser.add_argument("--steps", type=int, default=11 * INTERVAL, help="inner steps of our jobs that count, and 48 before (default 264)")
    parser.add_argument("--batch", type=int, default=32, help="windows of 64 bytes in a step of one learner (default 32)")
    parser.add_argument("--ratio", type=float, default=32.0, help="of ddp: communication over computing that r is chosen for (default 32)")
    parser.add_argument("--ddp-steps", type=int, default=30, help="of ddp behind limited links, that count (default 30)")
    parser.add_argument("--no-losses", action="store_true", help="leave out the jobs (ddp, torchft) that are there for a loss alone")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak inner learning rate (default 3e-3)")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way, between our learners and the syncer (default 0)")
    parser.add_argument("--keys", action="store_true", help="encrypt our links, with keys made for this run")
    parser.add_argument("--torchft", action="store_true", help="install torchft below outputs/, and add its rows to `ratio`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="jobs so far (default outputs/wan_PART.json)")
    arguments = parser.parse_args()
    arguments.json = arguments.json or ROOT / "outputs" / f"wan_{arguments.part}.json"
    arguments.wire = arguments.wire or (["bf16", "int4"] if arguments.part == "ratio" else ["bf16"])
    if arguments.part != "ratio" and len(arguments.wire) > 1:
        parser.error(f"--wire {' '.join(arguments.wire)}: part {arguments.part} has one job of ours. Give one.")
    if arguments.steps < INTERVAL or arguments.steps % INTERVAL:
        parser.error(f"--steps {arguments.steps}: a multiple of {INTERVAL}, so that every fragment counts equally often.")
    why = is_possible()
    if why is not None:
        print(f"No network namespaces ({why}): our links are relays, links are not counted, `ddp` is left out.", file=sys.stderr)
    torchft = find_torchft(ROOT / "outputs", why) if arguments.torchft else None
    # So that processes and namespaces are gone when this one is.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with ExitStack() as stack:
        net = None if why is not None else stack.enter_context(Net(arguments.learners))
        missed = PARTS[arguments.part](Bench(arguments, net, torchft))
    if missed:
        print("\nMISSED: " + "; ".join(missed))
    return 1 if missed else 0


class Bench:
    """The jobs of one part, kept as soon as they are there.

    Args:
        arguments: of the command line.
        net: None without namespaces.
        torchft: the folder with it; None: without its rows.
    """

    def __init__(self, arguments: argparse.Namespace, net: Net | None, torchft: Path | None) -> None:
        self.arguments, self.net = arguments, net
        is_control = arguments.part == "control"
        self.setting = Setting(
            net=net,
            num_learners=arguments.learners,
            model=CONTROL_MODEL if is_control else MODEL,
            data={"context": MODEL["context"], "batch_size": CONTROL_BATCH if is_control else arguments.batch, "val_bytes": 49152},
            has_keys=arguments.keys,
            delay_s=arguments.delay_ms / 1e3,
            torchft=torchft,
        )
        known = {
            name: getattr(arguments, name) for name in ("part", "learners", "steps", "batch", "ratio", "learning_rate", "delay_ms", "keys")
        }
        self._rows: dict[str, Any] = read_rows(arguments.json, {}) or {"options": known, "jobs": {}}
        if self._rows.get("options") != known:
            raise SystemExit(f"{arguments.json} holds jobs of {self._rows.get('options')}. Give another file with --json.")
        self.jobs: dict[str, dict[str, Any]] = self._rows["jobs"]

    @property
    def num_params(self) -> int:
        """N."""
        from recipes.gpt_text.model import GPTText

        return sum(parameter.numel() for parameter in GPTText(**self.setting.model).parameters())

    def get(self, name: str, method: str, **options: Any) -> dict[str, Any]:
        """The row of a job; run now if it is not there."""
        if name not in self.jobs:
            print(f"... {name}", flush=True)
            options = {"learning_rate": self.arguments.learning_rate} | options
            self.jobs[name] = Job(setting=self.setting, method=method, **options).run()
            row = self.jobs[name]
            print(f"    {row['tokens_per_s']:.0f} tokens/s, a step of {row['step_s']:.3f} s, loss {row['val_loss']}", flush=True)
            write_rows(self.arguments.json, self._rows)
        return self.jobs[name]

    def alone(self, number: int | str) -> dict[str, Any]:
        """A job without communication, as long as what counts of ours, but at most 120 steps."""
        return self.get(f"alone {number}", "alone", max_steps=12 + min(120, self.arguments.steps), first_step=12)


def run_ratio(bench: Bench) -> list[str]:
    """The headline."""
    arguments, setting = bench.arguments, bench.setting
    rate = ddp_bytes(bench.num_params, setting.num_learners) / (arguments.ratio * bench.alone(0)["step_s"])
    print(f"Rate of a learner's link: {8e-6 * rate:.2f} Mbit/s")
    if bench.net is not None:
        ddp = bench.get("ddp", "ddp", max_steps=DDP_FIRST + arguments.ddp_steps, first_step=DDP_FIRST, bytes_per_s=rate)
        # Two whole intervals count, each with its average.
        post_local = bench.get("post_local_sgd", "post_local_sgd", max_steps=3 * INTERVAL, first_step=INTERVAL, bytes_per_s=rate)
    first, last = 2 * INTERVAL, 2 * INTERVAL + arguments.steps
    number, wall_s = 0, 0.0
    for i in range(arguments.rounds):
        for wire in arguments.wire:
            ours = bench.get(f"{wire} {i}", "ours", max_steps=last, first_step=first, bytes_per_s=rate, sync={"wire_dtype": wire})
            # Until its model is there, with the last merges; the others get the time of the slowest of ours.
            wall_s = max(wall_s, ours["wall_s"] + ours["end_s"])
            number += 1
            bench.alone(number)
    if setting.torchft is not None:
        run_torchft(bench, rate, wall_s)
    if bench.net is not None and not arguments.no_losses:
        for factor in RATES:
            options = {"learning_rate": factor * arguments.learning_rate}
            bench.get(f"ddp, equal tokens, {factor:g}", "ddp", max_steps=last, first_step=DDP_FIRST, **options)
            steps = max(2, int(wall_s / ddp["step_s"]))
            bench.get(f"ddp, equal time, {factor:g}", "ddp", max_steps=steps, first_step=1, **options)
        bench.get("post_local_sgd, equal tokens", "post_local_sgd", max_steps=last, first_step=1)
        bench.get("post_local_sgd, equal time", "post_local_sgd", max_steps=whole_intervals(wall_s, post_local), first_step=1)
    return ratio(bench.jobs, arguments.wire, arguments.rounds, bench.num_params, setting.num_learners)


def run_torchft(bench: Bench, rate: float, wall_s: float) -> None:
    """The two rows of torchft, over as many steps as ours; `wall_s` is what ours took until its model was there."""
    first, last = 2 * INTERVAL, 2 * INTERVAL + bench.arguments.steps
    bench.alone("torchft")
    for method, num_fragments in (("torchft_diloco", 1), ("torchft_streaming", MODEL["num_layers"])):
        sync = {"num_fragments": num_fragments}
        row = bench.get(method, method, max_steps=last, first_step=first, bytes_per_s=rate, sync=sync)
        bench.alone(method)
        if not bench.arguments.no_losses:
            bench.get(f"{method}, equal time", method, max_steps=whole_intervals(wall_s, row), first_step=1, sync=sync)


def whole_intervals(wall_s: float, row: dict[str, Any]) -> int:
    """Steps that the job of this row does in a time, to the last exchange in it."""
    return INTERVAL * max(1, int(wall_s / row["step_s"]) // INTERVAL)


def one_job(
    bench: Bench, rate: float, sync: dict[str, Any] | None = None, tick: Callable[[int], None] = lambda step: None
) -> dict[str, Any]:
    """A job of ours between two `alone`; the links are limited from the 24th step on, and free again for the end."""
    first, last = 3 * INTERVAL, 3 * INTERVAL + bench.arguments.steps
    options: dict[str, Any] = {"at_step": {}}
    if bench.net is None:
        options["bytes_per_s"] = rate  # a relay's rate is for good
    else:
        options["at_step"] = {INTERVAL: lambda: bench.net.limit_all(rate), last: lambda: bench.net.limit_all(None)}  # type: ignore[union-attr]
    (wire,) = bench.arguments.wire
    bench.alone(0)
    row = bench.get(
        wire, "ours", max_steps=last + 12, first_step=first, last_step=last, tick=tick, sync={"wire_dtype": wire} | (sync or {}), **options
    )
    bench.alone(1)
    return row | {"counted_bytes_per_s": rate}


def run_never_waits(bench: Bench) -> list[str]:
    """A tenth of what is needed."""
    (wire,) = bench.arguments.wire
    row = one_job(bench, 0.1 * our_bytes(bench.num_params, wire) / bench.alone(0)["step_s"])
    return single("never-waits", row, [bench.jobs["alone 0"], bench.jobs["alone 1"]])


def run_control(bench: Bench) -> list[str]:
    """10 Mbit/s, full."""
    row = one_job(bench, CONTROL_BYTES_PER_S, {"heartbeat_s": 0.25})
    missed = single("control", row, [bench.jobs["alone 0"], bench.jobs["alone 1"]])
    slowest_s = p99(row["answers_s"]) if row["answers_s"] else math.inf
    if slowest_s > ANSWER_S:
        missed.append(f"control: answers within {1e3 * slowest_s:.0f} ms (p99), aim {1e3 * ANSWER_S:.0f}")
    used = max(row["per_step"].get(f"link_{way}", 0.0) for way in ("up", "down")) / row["step_s"] / CONTROL_BYTES_PER_S
    if bench.net is not None and used < FULL:
        missed.append(f"control: the link was {used:.0%} full, so the figure says nothing (aim {FULL:.0%})")
    return missed


def run_flap(bench: Bench) -> list[str]:
    """Links that go down and come up."""
    if bench.net is None:
        raise SystemExit("--part flap needs network namespaces.")
    flaps = Flaps(bench.net, last_step=3 * INTERVAL + bench.arguments.steps)
    # Half as much again as our payloads need.
    row = one_job(bench, 1.5 * our_bytes(bench.num_params, bench.arguments.wire[0]) / bench.alone(0)["step_s"], tick=flaps.tick)
    return single("flap", row, [bench.jobs["alone 0"], bench.jobs["alone 1"]])


class Flaps:
    """Takes one link after the other down for a while.

    Args:
        net: whose links.
        last_step: from here on all are up.
    """

    def __init__(self, net: Net, last_step: int) -> None:
        self._net, self._last_step = net, last_step
        self._order = [*net.nodes]
        self._down: int | None = None
        self._next_s = 0.0

    def tick(self, step: int) -> None:
        """Look at the clock."""
        now_s = time.monotonic()
        if self._down is not None and (now_s >= self._next_s - FLAP_S + DOWN_S or step >= self._last_step):
            self._net.set_up(self._down, True)
            self._down = None
        elif INTERVAL <= step < self._last_step and now_s >= self._next_s:
            self._next_s = now_s + FLAP_S
            self._down = self._order[0]
            self._order.append(self._order.pop(0))
            self._net.set_up(self._down, False)


PARTS: dict[str, Callable[[Bench], list[str]]] = {
    "ratio": run_ratio,
    "never-waits": run_never_waits,
    "control": run_control,
    "flap": run_flap,
}


if __name__ == "__main__":
    sys.exit(main())
