"""The same options give the same bytes: in one process, and in two with other hash seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_diloco.sim import Cut, Freeze, Kill, Pause, SimLearner, SimOptions, Takeover, simulate
from tests.sim.ten_thousand_rounds import ROUNDS, options

ROOT = Path(__file__).resolve().parents[2]

TROUBLE = SimOptions(
    learners=tuple(SimLearner(step_s=1.0 + 0.3 * i, jitter=0.3, join_at_s=float(i)) for i in range(5)),
    happenings=(
        Pause(learner_id=0, at_s=50.0, for_s=20.0),
        Freeze(learner_id=1, at_s=60.0, for_s=30.0),
        Cut(learner_id=2, at_s=70.0, for_s=30.0),
        Kill(learner_id=3, at_s=80.0),
        Takeover(learner_id=3, at_s=90.0),
        Takeover(learner_id=4, at_s=100.0),
    ),
    stop_at_s=300.0,
)


def python(*arguments, hash_seed):
    """A fresh interpreter with this seed of its hashes; its standard output."""
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_same_options_give_the_same_bytes():
    first, second = simulate(options(300)), simulate(options(300))
    assert first == second
    assert first.merges >= 300


def test_trouble_of_all_kinds_gives_the_same_bytes():
    first, second = simulate(TROUBLE), simulate(TROUBLE)
    assert first.trace == second.trace
    assert first.status == "finished"
    assert dict(first.processes) == {0: "left", 1: "left", 2: "left", 3: "left", 4: "left"}
    assert [how for _, how in first.processes].count("killed") == 1
    assert [how for _, how in first.processes].count("fenced") == 1


def test_another_seed_gives_other_bytes():
    assert simulate(options(50)).trace != simulate(options(50, seed=8)).trace


@pytest.mark.process
def test_the_bytes_do_not_depend_on_the_hash_seed():
    program = (
        "import hashlib; from tests.sim.test_determinism import TROUBLE; from lightning_diloco.sim import simulate; "
        "print(hashlib.sha256(simulate(TROUBLE).trace).hexdigest())"
    )
    assert python("-c", program, hash_seed=1) == python("-c", program, hash_seed=2)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ten_thousand_rounds_of_eight_learners_are_the_same_everywhere():
    script = str(Path("tests", "sim", "ten_thousand_rounds.py"))
    twice = json.loads(python(script, "2", hash_seed=1))
    once = json.loads(python(script, "1", hash_seed=2))
    assert twice["sha256"] == once["sha256"]
    assert len(twice["sha256"]) == 1
    assert twice["merges"] >= ROUNDS
    # What a round costs, without a clock (docs/benchmarks/simulator.md has the seconds): no event begets others beyond need.
    assert twice["events"] < 100 * twice["merges"]
