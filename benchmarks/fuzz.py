"""Hostile bytes against a live syncer and a live learner: nothing crashes, nothing changes, nothing grows.

    make fuzz [ARGS="--messages N --seed N --only syncer|learner --json FILE"]

Half of the messages go to the real `lightning-diloco syncer` with two real learners training beside, half to the real client of a learner
in a process of its own. How they are made stands in `tests/fuzzing/shots.py`: from the types of the messages themselves, from a seed and
a number.

Aims, each of which sets the exit code: at least 30 % of the messages are decoded and judged by a rule of the machine,
not by the first one alone (whether this session may speak at all); no exception, no hang, an
orderly end; the job is that of the honest learners alone (members, versions, ledger, model), and the learner's parameters are those of the
same steps without a syncer, bit for bit; resident memory at the end at most 20 MB above that after a tenth; logs below 200 kB.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.row_file import write_rows
from tests.fuzzing.learner_target import attack_learner
from tests.fuzzing.syncer_target import attack_syncer
from tests.fuzzing.tally import Tally

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run both campaigns, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=200_000, metavar="N", help="messages in all (default 200000)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--only", choices=("syncer", "learner"), help="all messages to one target")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "fuzz.json", metavar="FILE", help="the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    targets = [arguments.only] if arguments.only else ["syncer", "learner"]
    attacks = {"syncer": attack_syncer, "learner": attack_learner}
    tallies = []
    for name in targets:
        with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
            print(f"{arguments.messages // len(targets):,} messages to the {name} ...", flush=True)
            tallies.append(attacks[name](arguments.messages // len(targets), arguments.seed, Path(folder)))
        show(tallies[-1])
    found = {"seed": arguments.seed, "torch": torch.__version__, "targets": [tally.as_dict() for tally in tallies]}
    write_rows(arguments.json, found)
    print(f"Written to {arguments.json}.")
    return 1 if any(tally.faults for tally in tallies) else 0


def show(tally: Tally) -> None:
    """The table of one target."""
    grown = (tally.rss[-1] - tally.rss[0]) / 1e6
    print(f"\n| {tally.target} | |\n|---|---|")
    print(f"| messages | {tally.num_fired:,} in {tally.wall_s:.0f} s |")
    print(f"| reached a rule | {tally.num_reached:,} ({tally.num_reached / max(1, tally.num_fired):.1%}) |")
    print(f"| ... and were judged behind the door | {tally.num_judged:,} ({tally.num_judged / max(1, tally.num_fired):.1%}) |")
    print(f"| memory after a tenth, at the end, MB | {tally.rss[0] / 1e6:.1f}, {tally.rss[-1] / 1e6:.1f} ({grown:+.1f}) |")
    for title, counts in (("", tally.sessions), ("made as ", tally.fired), ("", tally.fates), ("answer ", tally.answers)):
        for name, count in counts.most_common():
            print(f"| {title}{name} | {count:,} |")
    for fault in tally.faults or ["none"]:
        print(f"| fault | {fault} |")


if __name__ == "__main__":
    sys.exit(main())
