"""The invariants of PROTOCOL.md section 13 under random orders of everything that can happen.

A schedule is a list of small integers; `Chaos` reads it as actions on a `Pair`: steps, deliveries of one queue's head, drops, copies,
merges that take their time, deaths, takeovers, pauses, bad values, leaves. The invariants are checked after every event by `Pair` itself;
here is what must hold in the end, when the link has healed.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lightning_diloco.protocol import events as ev
from tests.protocol.invariants import check_end, check_tape
from tests.protocol.pair import Node, Pair

EXAMPLES = 250
SCHEDULE = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5), st.integers(0, 3)), min_size=20, max_size=160)
PROFILE = settings(
    max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True
)


class Chaos:
    """Plays one schedule.

    Args:
        adopt: the adoption rule.
        quorum: K.
        faults: which kinds of faults happen: any of drop, copy, die, bad.
    """

    kind: type[Pair] = Pair
    healing_rounds = 4

    def __init__(self, *, adopt: str, quorum: int, faults: frozenset[str], num_learners: int = 3) -> None:
        self.pair = self.kind(
            num_fragments=2,
            sync_interval_steps=3,
            min_quorum=quorum,
            adopt=adopt,
            norm_gate=10.0,
            grace_fraction=0.5,
            drain_timeout_s=5.0,
            options={"takeover_token": "secret", "is_supervised": True},
        )
        self.pair.manual_merge = True
        self.faults = faults
        self.nodes = self.pair.found(num_learners, takeover_token="secret")
        self.stops = 0

    def play(self, schedule: list[tuple[int, int, int]]) -> None:
        for number, who, how in schedule:
            alive = [n for n in self.pair.nodes if not n.is_dead]
            self.act(number, alive[who % len(alive)], how)

    def act(self, number: int, node: Node, how: int) -> None:
        """One action; the commonest have the most numbers."""
        pair, is_training = self.pair, node.is_joined and not node.machine.state.is_paused
        if number < 25:
            if is_training:
                bad = "bad" in self.faults and number == 0
                pair.step(node, 1 + how, nan=bad and how % 2 == 0, loud=bad and how % 2 == 1)
        elif number < 75:
            self.deliver(node, how)
        elif number < 80:
            pair.advance((0.1, 0.5, 1.0, 4.0)[how])
        elif number < 85:
            pair.merge()
        elif number < 88:
            if node.joined and not node.has_left:
                pair.heartbeat(node)
        elif number < 90:
            if node.is_joined:
                pair.feed(node, ev.PauseChanged(is_paused=not node.machine.state.is_paused))
        elif number < 91:
            pair.advance(11.0)
        elif number < 92:
            pair.hello(node)
        elif number < 93:
            if node.is_joined and how == 0:
                pair.leave(node)
        else:
            self.fault(number, node, how)

    def deliver(self, node: Node, how: int) -> None:
        pair = self.pair
        if how == 0 and node.control_up:
            pair.deliver_control_up(node)
        elif how == 1 and node.control_down:
            pair.deliver_control_down(node)
        elif how == 2 and node.bulk_up:
            pair.deliver_bulk_up(node)
        elif how == 3 and node.bulk_down:
            pair.deliver_bulk_down(node)

    def fault(self, number: int, node: Node, how: int) -> None:
        pair = self.pair
        if number < 95 and "drop" in self.faults:
            queue = (node.control_up, node.control_down)[how % 2]
            if how == 2 and node.bulk_down:
                pair.drop_bulk_down(node)
            elif queue:
                queue.popleft()
        elif number < 97 and "copy" in self.faults:
            if how == 0 and node.control_up:
                pair.deliver_control_up(node, keep=True)
            elif how == 1 and node.control_down:
                pair.deliver_control_down(node, keep=True)
            elif how == 2 and node.bulk_up and node.bulk_up[0][0] == "contribution":
                pair.deliver_bulk_up(node, keep=True)
            elif how == 3 and node.bulk_down:
                pair.deliver_bulk_down(node, keep=True)
        elif number < 99 and "die" in self.faults and node.learner_id >= 0 and how < 2:
            learner_id = node.learner_id
            if how == 0:
                pair.kill(node)
                pair.take(ev.LearnerLost(learner_id=learner_id))
            twin = pair.add(learner_id, joins=False, takeover_token="secret")
            pair.hello(twin)

    def heal(self) -> None:
        """The link is good from here on; everybody reports, and time passes."""
        pair = self.pair
        for node in pair.nodes:
            if node.stage in ("greeting", "receiving"):
                pair.hello(node)
        for _ in range(self.healing_rounds):
            for node in pair.nodes:
                if node.is_joined and node.machine.state.is_paused:
                    pair.feed(node, ev.PauseChanged(is_paused=False))
                if node.is_joined:
                    pair.step(node)
                if node.stage in ("joined", "leaving"):
                    pair.heartbeat(node)
            pair.settle()
            pair.merge()
            pair.settle()
            pair.advance(1.0)

    def end(self) -> None:
        """All leave, as their own runtime does it: with a timeout."""
        pair = self.pair
        for node in pair.nodes:
            if not node.is_dead:
                pair.leave(node)
        for _ in range(4):
            pair.settle()
            pair.merge()
            for node in pair.nodes:
                if node.stage == "leaving":
                    pair.heartbeat(node)
                    if node.machine.state.said_leave:
                        pair.reconnect(node)
            pair.advance(2.0)
        pair.settle()
        pair.take(ev.Finish(status="finished"))
        pair.merge()
        pair.settle()


def run(schedule, *, adopt: str, quorum: int, faults: frozenset[str], kind: type[Chaos] = Chaos) -> Pair:
    chaos = kind(adopt=adopt, quorum=quorum, faults=faults)
    chaos.play(schedule)
    chaos.heal()
    check_healed(chaos.pair)
    chaos.end()
    pair = chaos.pair
    check_end(pair)
    for node in pair.nodes:
        assert node.is_dead or node.stage in ("left", "fenced", "refused"), f"{node.nonce} is {node.stage} after the end"
    return pair


def check_healed(pair: Pair) -> None:
    """Everyone holds the newest versions, no round is old, no contribution is without a fate."""
    check_tape(pair)
    job = pair.syncer.job
    for node in pair.nodes:
        if node.is_dead or node.stage not in ("joined",):
            continue
        member = job.members.of(node.nonce)
        assert member is not None and member.stage == "joined", f"{node.nonce} believes that it has joined"
        for i, fragment in enumerate(node.machine.state.fragments):
            assert fragment.held == job.currents[i].version
            pending = fragment.unresolved
            if pending is not None:
                decision = job.decisions.get((node.learner_id, i), {}).get(pending.header.seq)
                fate = decision.outcome if decision is not None else "unknown"
                assert fate == "held" or (fate == "merged" and fragment.is_ready), f"{fate} after the link has healed"
    for round_ in pair.syncer.rounds.all:
        assert not round_.is_collecting or pair.now_s - round_.opened_s <= 11.0


@pytest.mark.parametrize("adopt", ["rebase", "overwrite"])
@given(schedule=SCHEDULE, quorum=st.integers(1, 3))
@PROFILE
def test_delays_and_reordering_alone(adopt, schedule, quorum):
    pair = run(schedule, adopt=adopt, quorum=quorum, faults=frozenset())
    if adopt == "rebase":
        for i in range(2):
            assert sum(pair.shadow(i).values()) == len(pair.tokens_of), "without faults nothing is lost"


@pytest.mark.parametrize("fault", ["drop", "copy", "die", "bad"])
@given(schedule=SCHEDULE, quorum=st.integers(1, 3), adopt=st.sampled_from(["rebase", "overwrite"]))
@PROFILE
def test_one_kind_of_fault(fault, schedule, quorum, adopt):
    assert run(schedule, adopt=adopt, quorum=quorum, faults=frozenset([fault])).ended is not None


@given(schedule=SCHEDULE, quorum=st.integers(1, 3), adopt=st.sampled_from(["rebase", "overwrite"]))
@PROFILE
def test_all_kinds_of_faults(schedule, quorum, adopt):
    assert run(schedule, adopt=adopt, quorum=quorum, faults=frozenset(["drop", "copy", "die", "bad"])).ended is not None
