"""A storm on real processes: learners and the syncer are killed, stopped, cut off, slowed down, corrupted, and come and go.

    .venv/bin/python benchmarks/chaos.py [--minutes 5] [--seed N] [--folder DIR] [--no-reference]

Four learners train a small GPT with one syncer; every learner reaches it through a proxy of the storm (`storm/proxy.py`). A fault comes
every 5 to 20 s, drawn from a deck that holds each of the eight kinds at least three times in five minutes (once in a shorter storm). A
kind that cannot hit anybody at its turn (no learner is free of another fault, too few to let one go) waits for a later turn. What counts
as hit, and what as over, stands in `storm/faults.py`; which processes they are, and why, in `storm/cluster.py` and `storm/learner.py`.

Then the same job runs without faults until as many tokens are trained as the storm has merged (`token_budget`), from the same seeds, and
both global models are validated on the same text. The learning rate falls to a tenth until shortly before the end, in both over the same
share of the run: a model at full rate is as good as its last few merges, and those of a storm may have two members.

Files in DIR: `faults.jsonl` (a line for each fault with evidence and outcome), `result.json`, `table.md`, `storm.svg`, and the run
directories with their tapes. The exit code is 1 if an aim is missed: they are the first table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.storm.cluster import Cluster, Job  # noqa: E402
from benchmarks.storm.faults import KINDS, Fault, run_fault  # noqa: E402
from benchmarks.storm.proxy import Proxies  # noqa: E402
from benchmarks.storm.report import Result, aims, gaps_of_others, plot, tables  # noqa: E402

NUM_LEARNERS = 4
SHORTEST_S, LONGEST_S = 5.0, 20.0
FAULTS_IN_FIVE_MINUTES = 28
FIRST_S = 5.0
STEP_S, FALL_SHARE = 0.05, 0.85
"""An inner step takes at least so long; the rate falls over that share of the storm, counted in such steps."""


def main() -> int:
    """Run the storm, then the run without faults; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="length of the storm, at least 1 (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the storm and of the job (default 0)")
    parser.add_argument("--folder", type=Path, default=None, metavar="DIR", help="where files go (default outputs/chaos/DATE_TIME)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="these kinds of faults alone")
    parser.add_argument("--quorum", type=int, default=NUM_LEARNERS, metavar="K", help="contributions that a merge waits for (default 4)")
    parser.add_argument("--no-reference", action="store_true", help="leave out the run without faults")
    arguments = parser.parse_args()
    if arguments.minutes < 1:
        parser.error(f"--minutes {arguments.minutes:g}: at least 1, so that there is time for each of the {len(KINDS)} kinds.")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    folder = arguments.folder or ROOT / "outputs" / "chaos" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    plan = Plan(seed=arguments.seed, length_s=60.0 * arguments.minutes, kinds=tuple(arguments.only), quorum=arguments.quorum)
    result = storm(folder, plan, has_reference=not arguments.no_reference)
    write(folder, result)
    print(tables(result) + f"\n\nFiles: {folder}")
    return 0 if all(is_reached for _, _, is_reached in aims(result)) else 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which faults come when.

    Args:
        seed: of everything that is drawn.
        length_s: of the storm.
        kinds: that are in the deck.
        quorum: `min_quorum` of the job.
    """

    seed: int
    length_s: float
    kinds: tuple[str, ...] = KINDS
    quorum: int = NUM_LEARNERS

    @property
    def count(self) -> int:
        """Faults in the deck."""
        return max(len(self.kinds), int(self.length_s / 300.0 * FAULTS_IN_FIVE_MINUTES))

    def deal(self) -> tuple[list[str], list[float]]:
        """The kinds in their order, and the seconds between two faults: 5 to 20, about `length_s` in all."""
        rng = random.Random(self.seed)
        each, rest = divmod(self.count, len(self.kinds))
        kinds = [*self.kinds] * each + rng.sample(self.kinds, rest)
        rng.shuffle(kinds)
        shares = [rng.expovariate(1.0) for _ in kinds]
        spare_s = max(0.0, self.length_s - self.count * SHORTEST_S)
        return kinds, [min(LONGEST_S, SHORTEST_S + spare_s * share / sum(shares)) for share in shares]


def storm(folder: Path, plan: Plan, *, has_reference: bool) -> Result:
    """Run the storm, and the run without faults after it."""
    seed = plan.seed
    sync: dict[str, Any] = {"min_quorum": plan.quorum}
    sync |= {"tape_payloads": True} if can_replay() else {}
    with Proxies(seed) as proxies:
        fall_steps = round(FALL_SHARE * plan.length_s / STEP_S)
        cluster = Cluster(Job(folder=folder / "storm", seed=seed, step_s=STEP_S, fall_steps=fall_steps, sync=sync, proxies=proxies))
        try:
            cluster.start(NUM_LEARNERS)
            begin_s = time.monotonic()
            faults = run_faults(cluster, folder / "faults.jsonl", plan)
            summary = cluster.finish()
        finally:
            cluster.kill()
    steps = {(i, life): cluster.steps(i, life) for i, learner in cluster.learners.items() for life in range(learner.life + 1)}
    begun_s, end_s = min(ends[0] for ends in steps.values() if ends), max(ends[-1] for ends in steps.values() if ends)
    step_s = statistics.median(b - a for ends in steps.values() for a, b in zip(ends, ends[1:], strict=False))
    fall_share = fall_steps / ((end_s - begun_s) / step_s)
    reference = calm(folder / "calm", plan, summary["tokens_merged"], fall_share) if has_reference else None
    from benchmarks.storm.learner import validate

    return Result(
        faults=faults,
        summary=summary,
        reference=reference,
        loss=validate(cluster.job.run_dir / "global.safetensors"),
        reference_loss=validate(folder / "calm" / "run" / "global.safetensors") if has_reference else None,
        steps=steps,
        begin_s=begin_s,
        end_s=end_s,
        checked=check(cluster.job.run_dir),
        replayed=replay(cluster.job.run_dir, summary["global_sha256"]) if "tape_payloads" in sync else None,
        least_faults=min(25, plan.count),
        least_of_a_kind=min(3, plan.count // len(plan.kinds)),
        kinds=plan.kinds,
    )


def run_faults(cluster: Cluster, path: Path, plan: Plan) -> list[Fault]:
    """Hurt the cluster until the deck is dealt, then wait until all faults are over."""
    kinds, pauses = plan.deal()
    rng = random.Random(f"{plan.seed} victims")
    running: list[tuple[Fault, Iterator[None]]] = []
    faults: list[Fault] = []
    due_s = time.monotonic() + FIRST_S
    with path.open("w") as file:
        while kinds or running:
            cluster.turn()
            if kinds and time.monotonic() >= due_s:
                busy = {-1 if fault.learner_id is None else fault.learner_id for fault, _ in running}
                found = next((f for kind in kinds if (f := run_fault(cluster, kind, len(faults), busy, rng)) is not None), None)
                if found is not None:
                    kinds.remove(found[0].kind)
                    running.append(found)
                    faults.append(found[0])
                    due_s = time.monotonic() + pauses.pop()
            for item in list(running):
                if next(item[1], "over") == "over":
                    running.remove(item)
                    file.write(json.dumps(asdict(item[0])) + "\n")
                    file.flush()
    return faults


def calm(folder: Path, plan: Plan, tokens: int, fall_share: float) -> dict[str, Any]:
    """The same job without faults, until so many tokens are trained; its rate falls over that share of it. Returns its summary."""
    from benchmarks.storm.learner import TOKENS_PER_STEP

    fall_steps = round(fall_share * tokens / (NUM_LEARNERS * TOKENS_PER_STEP))
    sync = {"min_quorum": plan.quorum, "token_budget": max(1, tokens)}
    with Proxies(plan.seed) as proxies:
        cluster = Cluster(Job(folder=folder, seed=plan.seed, step_s=STEP_S, fall_steps=fall_steps, sync=sync, proxies=proxies))
        try:
            cluster.start(NUM_LEARNERS)
            cluster.wait(lambda: bool(cluster.tape.left), "the end of the run without faults", 3600.0)
            return cluster.finish()
        finally:
            cluster.kill()


def check(run_dir: Path) -> str:
    """What `tests/tape_checker.py`, which shares no code with the package, finds wrong; "" for nothing."""
    from tests.tape_checker import check_run

    try:
        check_run(run_dir)
    except AssertionError as error:
        return str(error)
    return ""


def can_replay() -> bool:
    """Whether a replay, and what it needs, is there."""
    from lightning_diloco.config import SyncConfig
    from lightning_diloco.errors import ConfigurationError

    with contextlib.suppress(ConfigurationError):
        return SyncConfig(tape_payloads=True).tape_payloads
    return False


def replay(run_dir: Path, sha256: str) -> str:
    """Re-execute the merges of the tape; "equal" if they end at the storm's global model."""
    command = [sys.executable, "-m", "lightning_diloco", "replay", str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return "equal" if done.returncode == 0 else f"exit code {done.returncode}, wanted {sha256}: {done.stderr.strip()[-300:]}"


def write(folder: Path, result: Result) -> None:
    """Everything that a reader may want to keep."""
    (folder / "table.md").write_text(tables(result) + "\n")
    (folder / "storm.svg").write_text(plot(result))
    row = {
        "aims": [{"aim": aim, "figure": figure, "reached": is_reached} for aim, figure, is_reached in aims(result)],
        "loss": result.loss,
        "reference_loss": result.reference_loss,
        "summary": result.summary,
        "reference": result.reference,
        "faults": [asdict(fault) | {"others_longest_gap_s": gaps_of_others(result, fault)} for fault in result.faults],
    }
    (folder / "result.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
