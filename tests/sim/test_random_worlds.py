"""Worlds drawn at random, with trouble of all kinds: every one ends, and its tape passes the independent check."""

from __future__ import annotations

import json
import random

import pytest

from lightning_diloco.config import SyncConfig
from lightning_diloco.sim import Cut, Freeze, Kill, Link, Pause, SimLearner, SimOptions, Takeover, simulate
from tests.tape_checker import check_run


def draw_learner(rng):
    return SimLearner(
        step_s=rng.choice([0.5, 1.0, 1.0, 2.0, 4.0, 9.0]),
        jitter=rng.choice([0.0, 0.1, 0.5]),
        join_at_s=rng.choice([0.0, 0.0, rng.uniform(0.0, 60.0)]),
        max_steps=rng.randint(5, 200),
        link=Link(
            latency_s=rng.choice([0.0, 0.02, 0.02, 0.5, 3.0]),
            up_bytes_per_s=rng.choice([125e6, 125e6, 1e6, 0.3e6]),
            down_bytes_per_s=rng.choice([125e6, 1e6]),
        ),
    )


def draw_happenings(rng, num_learners):
    for _ in range(rng.randint(0, 5)):
        learner_id, at_s = rng.randrange(num_learners), rng.uniform(0.0, 180.0)
        kind = rng.choice([Pause, Freeze, Cut, Kill, Kill, Takeover])
        if kind is Takeover:
            yield Takeover(learner_id=learner_id, at_s=at_s)
        elif kind is Kill:
            yield Kill(learner_id=learner_id, at_s=at_s, is_noticed=rng.random() < 0.6)
            # Without its founder a job may never begin: that one always comes back.
            if learner_id == 0 or rng.random() < 0.6:
                yield Takeover(learner_id=learner_id, at_s=at_s + rng.uniform(0.0, 30.0))
        else:
            yield kind(learner_id=learner_id, at_s=at_s, for_s=rng.choice([1.0, 5.0, 30.0, 100.0]))


def draw(seed):
    rng = random.Random(seed)
    learners = tuple(draw_learner(rng) for _ in range(rng.randint(1, 5)))
    return SimOptions(
        learners=learners,
        happenings=tuple(draw_happenings(rng, len(learners))),
        config=SyncConfig(
            num_fragments=rng.randint(1, 8),
            sync_interval_steps=rng.randint(1, 12),
            min_quorum=rng.choice([1, 1, 2, 3, 9]),
            adopt=rng.choice(["rebase", "rebase", "overwrite"]),
            grace_cap_steps=rng.choice([0.0, 1.0, 3.0]),
            overlap_steps=rng.choice([0, 2, 5]),
        ),
        seed=seed,
        stop_at_s=200.0,
        until_s=20_000.0,
        stall_s=rng.choice([0.0, 0.05]),
        decode_s=rng.choice([0.0, 0.01, 1.0]),
        encode_s=rng.choice([0.0, 0.01, 1.0]),
        merge_s=rng.choice([0.0, 0.02, 2.0]),
    )


def ended_well(folder, seed) -> bool:
    """Simulate a world, and have its tape checked; whether it finished, nothing is pending, and every process has ended."""
    result = simulate(draw(seed))
    folder.mkdir(exist_ok=True)
    (folder / "tape.jsonl").write_bytes(result.trace)
    (folder / "summary.json").write_text(json.dumps(result.summary()))
    check_run(folder)
    return result.status == "finished" and result.pending == {} and all(how is not None for _, how in result.processes)


@pytest.mark.parametrize("seed", range(25))
def test_a_random_world_ends_with_every_token_accounted_for(tmp_path, seed):
    assert ended_well(tmp_path, seed)


@pytest.mark.slow
def test_more_random_worlds_end_with_every_token_accounted_for(tmp_path):
    assert [seed for seed in range(1000, 1100) if not ended_well(tmp_path / str(seed), seed)] == []
