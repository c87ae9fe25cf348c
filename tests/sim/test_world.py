"""Whole jobs on the virtual clock: pace, lateness, outages, deaths, and the account of every token."""

from __future__ import annotations

import doctest
import json
from collections import Counter
from dataclasses import replace

import pytest

import lightning_diloco.sim
from lightning_diloco.config import SyncConfig, payload_bytes
from lightning_diloco.protocol.records import (
    ContributionRecord,
    DiscardRecord,
    JobRecord,
    JoinRecord,
    LeaveRecord,
    PublishRecord,
    RoundOpenRecord,
)
from lightning_diloco.sim import Cut, Freeze, Kill, Link, Pause, SimLearner, SimOptions, Takeover, engine, simulate
from lightning_diloco.sim.syncer_process import SyncerProcess
from tests.tape_checker import check_run

SMALL = SyncConfig(num_fragments=8, sync_interval_steps=8)


def records(result, kind):
    return [line.record for line in result.lines() if isinstance(line.record, kind)]


def checked(result, folder):
    """The summary, after an independent check of the tape's invariants and of every figure; nothing pends."""
    (folder / "tape.jsonl").write_bytes(result.trace)
    (folder / "summary.json").write_text(json.dumps(result.summary()))
    assert result.status == "finished"
    assert result.pending == {}
    return check_run(folder)


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16", "int4"])
def test_payloads_have_the_size_of_the_wire_dtype(wire_dtype, tmp_path):
    options = SimOptions(config=replace(SMALL, wire_dtype=wire_dtype), learners=(SimLearner(),) * 2, stop_at_s=100.0)
    result = simulate(options)
    checked(result, tmp_path)
    size = payload_bytes(options.params_per_fragment, wire_dtype)
    assert {record.payload_bytes for record in records(result, ContributionRecord)} == {size}
    assert {record.payload_bytes for record in records(result, PublishRecord) if not record.is_full} == {size}


def all_left(result):
    return [how for _, how in result.processes] == ["left"] * len(result.processes)


# ---- pace -------------------------------------------------------------------------------------------------------------------


def test_the_documented_examples_hold():
    for module in (lightning_diloco.sim, engine):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0
        assert outcome.failed == 0


def test_one_round_of_a_fragment_opens_per_interval():
    result = simulate(SimOptions(config=SMALL, learners=(SimLearner(jitter=0.1),) * 3, stop_at_s=402.0))
    steps = max(learner["inner_steps"] for learner in result.summary()["learners"])
    opened = Counter(record.fragment_id for record in records(result, RoundOpenRecord) if record.active)
    assert steps >= 380
    # H ends of steps after an opening in the middle of a step are H - 1 steps and a bit.
    assert all(steps // 8 - 1 <= opened[p] <= steps // 7 + 1 for p in range(8)), (steps, opened)


@pytest.mark.parametrize(
    "late",
    [
        SimLearner(step_s=4.0),
        SimLearner(link=Link(latency_s=3.0)),
        SimLearner(link=Link(up_bytes_per_s=0.5e6)),
    ],
    ids=["slow steps", "long latency", "thin uplink"],
)
def test_a_learner_that_is_always_late_does_not_change_the_pace(tmp_path, late):
    result = simulate(SimOptions(config=SMALL, learners=(SimLearner(), late), stop_at_s=800.0))
    learners = checked(result, tmp_path)["learners"]
    steps = learners[0]["inner_steps"]
    opened = Counter(record.fragment_id for record in records(result, RoundOpenRecord) if record.active)
    # A slower one never makes a round due; one that steps as fast may, up to one step early.
    at_most = steps // (8 if late.step_s > 1.0 else 7) + 1
    assert all(steps // 8 - 1 <= opened[p] <= at_most for p in range(8)), (steps, opened)
    assert learners[1]["rounds_merged"] > 0


def test_slow_learners_are_carried_and_take_part(tmp_path):
    learners = tuple(SimLearner(step_s=1.0 / speed, jitter=0.05) for speed in (1.0, 1.0, 0.5, 0.25))
    result = simulate(SimOptions(learners=learners, stop_at_s=1200.0))
    shares = [learner["participation"] for learner in checked(result, tmp_path)["learners"]]
    carried = Counter(r.learner_id for r in records(result, ContributionRecord) if r.outcome == "carried" and not r.is_final)
    assert all(carried[m] > 0 for m in (2, 3)), carried
    assert min(shares) >= 0.4, f"participation by speed: {shares}"


def test_a_full_quorum_waits_for_the_slowest_and_everybody_takes_part(tmp_path):
    learners = (SimLearner(jitter=0.1), SimLearner(jitter=0.1), SimLearner(step_s=2.0))
    result = simulate(SimOptions(config=replace(SMALL, min_quorum=3), learners=learners, stop_at_s=400.0))
    summary = checked(result, tmp_path)
    assert summary["mean_members"] > 2.9


# ---- outages ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def openings(monkeypatch):
    """Rounds opened at each count of the fastest learner's inner steps, as the syncer saw it."""
    seen, write = Counter(), SyncerProcess._write

    def spy(self, record):
        if isinstance(record, RoundOpenRecord) and record.active:
            seen[max(member.inner_step for member in self.machine.job.members.joined())] += 1
        write(self, record)

    monkeypatch.setattr(SyncerProcess, "_write", spy)
    return seen


@pytest.mark.parametrize(("fragments", "interval", "at_most"), [(24, 24, 2), (24, 8, 4), (5, 2, 4), (4, 24, 2)])
@pytest.mark.parametrize("for_s", [5.0, 60.0])
@pytest.mark.parametrize("kind", [Pause, Freeze, Cut])
def test_after_an_outage_the_model_does_not_go_out_at_once(openings, kind, for_s, fragments, interval, at_most):
    # The first learner is the fastest at any time, so that its steps are those of the rule.
    result = simulate(
        SimOptions(
            config=SyncConfig(num_fragments=fragments, sync_interval_steps=interval),
            learners=tuple(SimLearner(step_s=1.0 + 0.25 * i) for i in range(4)),
            happenings=tuple(kind(learner_id=m, at_s=200.0, for_s=for_s) for m in range(4)),
            stop_at_s=500.0,
        )
    )
    assert result.status == "finished"
    assert result.pending == {}
    # The start, when learners join one after the other, is not what is tested here.
    late = Counter({step: number for step, number in openings.items() if step > 60})
    assert sum(late.values()) > 200 * fragments // interval
    assert max(late.values()) <= at_most, late.most_common(5)


def test_an_announced_pause_of_one_learner_stops_nobody(tmp_path):
    learners = (SimLearner(jitter=0.05),) * 3
    plain = simulate(SimOptions(config=SMALL, learners=learners, stop_at_s=300.0))
    paused = simulate(
        SimOptions(config=SMALL, learners=learners, stop_at_s=300.0, happenings=(Pause(learner_id=1, at_s=100.0, for_s=100.0),))
    )
    steps = [learner["inner_steps"] for learner in checked(paused, tmp_path)["learners"]]
    assert abs(paused.merges - plain.merges) <= 8
    assert steps[1] == pytest.approx(steps[0] - 100, abs=3)


def test_goodput_uptime_and_step_times_are_those_of_the_world(tmp_path):
    learners = (SimLearner(step_s=0.5), SimLearner(step_s=2.0))
    happenings = tuple(Pause(learner_id=m, at_s=200.0, for_s=100.0) for m in range(2))
    summary = checked(simulate(SimOptions(config=SMALL, learners=learners, happenings=happenings, stop_at_s=400.0)), tmp_path)
    assert [learner["step_median_s"] for learner in summary["learners"]] == pytest.approx([0.5, 2.0])
    assert summary["goodput"] == pytest.approx(0.75, abs=0.01)
    assert summary["uptime"] == pytest.approx(0.75, abs=0.01)


def test_stalls_are_reported(tmp_path):
    options = SimOptions(config=SMALL, learners=(SimLearner(), SimLearner()), stop_at_s=100.0, stall_s=0.01)
    summary = checked(simulate(options), tmp_path)
    assert all(learner["stall_s"] > 0.01 * summary["merges"] for learner in summary["learners"])


# ---- the end ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adopt", ["rebase", "overwrite"])
@pytest.mark.parametrize("min_quorum", [1, 2, 4])
def test_every_token_is_accounted_for_after_the_drain(tmp_path, adopt, min_quorum):
    learners = tuple(SimLearner(step_s=step_s, jitter=0.2, tokens_per_step=100 + m) for m, step_s in enumerate((1.0, 1.0, 2.0, 4.0)))
    options = SimOptions(config=replace(SMALL, adopt=adopt, min_quorum=min_quorum), learners=learners, stop_at_s=300.0)
    result = simulate(options)
    summary = checked(result, tmp_path)
    assert all_left(result)
    assert all((f["pending"], f["merged"] + f["discarded"]) == (0, summary["tokens"]) for f in summary["fragments"])
    assert summary["tokens"] == sum((100 + learner["learner_id"]) * learner["inner_steps"] for learner in summary["learners"])
    if adopt == "rebase":
        assert summary["tokens_discarded"] == 0


def test_each_learner_leaves_at_its_own_limit_and_the_last_one_closes_what_remains(tmp_path):
    learners = (SimLearner(max_steps=50), SimLearner(max_steps=120, jitter=0.1), SimLearner(max_steps=33, step_s=3.0))
    result = simulate(SimOptions(config=SMALL, learners=learners))
    summary = checked(result, tmp_path)
    assert [learner["inner_steps"] for learner in summary["learners"]] == [50, 120, 33]
    assert {record.reason for record in records(result, LeaveRecord)} == {"limit"}
    assert summary["tokens_merged"] == summary["tokens"] == 1024 * 203


@pytest.mark.parametrize(("clock", "steps"), [("job", 60), ("local", 100)])
def test_a_late_joiner_receives_everything_and_ends_by_its_clock(tmp_path, clock, steps):
    learners = (SimLearner(max_steps=100), SimLearner(max_steps=100, join_at_s=40.0))
    result = simulate(SimOptions(config=replace(SMALL, lr_clock=clock), learners=learners))
    summary = checked(result, tmp_path)
    full = {record.fragment_id for record in records(result, PublishRecord) if record.is_full and record.learners == (1,)}
    assert full == set(range(8))
    assert summary["learners"][0]["inner_steps"] == 100
    assert summary["learners"][1]["inner_steps"] == pytest.approx(steps, abs=3)


def test_others_wait_for_the_founder(tmp_path):
    learners = (SimLearner(join_at_s=30.0), SimLearner(), SimLearner())
    result = simulate(SimOptions(config=SMALL, learners=learners, stop_at_s=100.0))
    checked(result, tmp_path)
    (job,) = records(result, JobRecord)
    joins = records(result, JoinRecord)
    assert job.founder_id == 0
    assert (joins[0].learner_id, joins[0].role) == (0, "founder")
    assert sorted(join.learner_id for join in joins) == [0, 1, 2]
    assert min(line.t_s for line in result.lines()) > 30.0


def test_a_job_that_has_not_ended_says_so():
    result = simulate(SimOptions(config=SMALL, learners=(SimLearner(),) * 2, until_s=50.0))
    assert (result.status, result.virtual_s) == (None, 50.0)
    assert result.processes == ((0, None), (1, None))
    assert result.merges > 20


# ---- deaths -----------------------------------------------------------------------------------------------------------------


def died(result, reason="died"):
    """Tokens discarded for this reason, per learner and fragment."""
    tokens = Counter()
    for record in records(result, DiscardRecord):
        if record.reason == reason:
            tokens[record.learner_id, record.fragment_id] += record.tokens
    return tokens


@pytest.mark.parametrize("at_s", [60.3, 61.0, 61.02, 61.5, 63.037])
def test_a_killed_learner_is_replaced_and_what_died_with_it_is_counted(tmp_path, at_s):
    happenings = (Kill(learner_id=1, at_s=at_s), Takeover(learner_id=1, at_s=at_s + 20.0))
    result = simulate(SimOptions(config=SMALL, learners=(SimLearner(jitter=0.1),) * 3, happenings=happenings, stop_at_s=200.0))
    summary = checked(result, tmp_path)
    assert result.processes == ((0, "left"), (1, "killed"), (2, "left"), (1, "left"))
    assert [(r.learner_id, r.incarnation) for r in records(result, JoinRecord)] == [(0, 0), (1, 0), (2, 0), (1, 1)]
    assert summary["learners"][1]["incarnations"] == 2
    assert summary["tokens_discarded"] == summary["discarded_by_reason"]["died"] > 0
    assert {m for m, _ in died(result)} == {1}
    # Not more than three intervals: one that was on its way, one that waited behind it, and the present one.
    assert max(died(result).values()) <= 1024 * 3 * 8


def test_a_death_that_nobody_noticed_ends_with_the_takeover(tmp_path):
    happenings = (Kill(learner_id=1, at_s=60.3, is_noticed=False), Takeover(learner_id=1, at_s=100.0))
    result = simulate(SimOptions(config=SMALL, learners=(SimLearner(),) * 3, happenings=happenings, stop_at_s=200.0))
    summary = checked(result, tmp_path)
    assert result.processes[1] == (1, "killed")
    assert result.processes[3] == (1, "left")
    assert summary["discarded_by_reason"]["fenced"] == summary["tokens_discarded"] > 0


def test_a_live_learner_is_fenced_by_its_successor(tmp_path):
    result = simulate(
        SimOptions(config=SMALL, learners=(SimLearner(),) * 3, happenings=(Takeover(learner_id=1, at_s=60.3),), stop_at_s=200.0)
    )
    checked(result, tmp_path)
    assert result.processes == ((0, "left"), (1, "fenced"), (2, "left"), (1, "left"))
    assert sum(died(result, "fenced").values()) > 0


def test_a_learner_that_never_comes_back_holds_nobody_up(tmp_path):
    happenings = (Kill(learner_id=2, at_s=60.3), Kill(learner_id=1, at_s=90.3, is_noticed=False))
    learners = (SimLearner(max_steps=300), SimLearner(max_steps=300), SimLearner(max_steps=300))
    result = simulate(SimOptions(config=replace(SMALL, min_quorum=3), learners=learners, happenings=happenings))
    summary = checked(result, tmp_path)
    assert summary["learners"][0]["inner_steps"] == 300
    assert summary["learners"][0]["discarded"] == 0
    # With two of three dead the quorum of three becomes one: rounds go on at their pace.
    opened = Counter(record.fragment_id for record in records(result, RoundOpenRecord) if record.active)
    assert all(33 <= opened[p] <= 39 for p in range(8)), opened


def test_the_founder_may_die_before_it_has_founded(tmp_path):
    happenings = (Kill(learner_id=0, at_s=0.05), Takeover(learner_id=0, at_s=10.0))
    result = simulate(SimOptions(config=SMALL, learners=(SimLearner(),) * 2, happenings=happenings, stop_at_s=100.0))
    checked(result, tmp_path)
    assert result.processes == ((0, "killed"), (1, "left"), (0, "left"))
    assert len(records(result, JobRecord)) == 1


def test_a_learner_that_was_frozen_past_its_fencing_ends_when_it_wakes(tmp_path):
    happenings = (Freeze(learner_id=1, at_s=60.0, for_s=60.0), Takeover(learner_id=1, at_s=80.0))
    result = simulate(SimOptions(config=SMALL, learners=(SimLearner(),) * 3, happenings=happenings, stop_at_s=200.0))
    checked(result, tmp_path)
    assert result.processes == ((0, "left"), (1, "fenced"), (2, "left"), (1, "left"))
    accepted_s = [
        line.t_s
        for line in result.lines()
        if isinstance(line.record, ContributionRecord)
        and (line.record.learner_id, line.record.incarnation) == (1, 0)
        and line.record.outcome in ("folded", "carried")
    ]
    assert max(accepted_s) < 80.0
