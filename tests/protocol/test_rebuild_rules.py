"""What a learner tells a syncer of whose run directory nothing is left, on the two machines."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.actions import SendDescription
from lightning_diloco.protocol.messages import Describe, Envelope
from lightning_diloco.protocol.records import CountersRecord, JobRecord, JoinRecord
from tests.protocol.pair import Pair
from tests.protocol.restarting import RestartingPair
from tests.protocol.toy import TOKENS, Node


def describe(pair: Pair, node: Node, **envelope: object) -> list[SendDescription]:
    ours = node.machine.state.envelope
    fields = {"job_id": ours.job_id, "lineage": ours.lineage, "epoch": ours.epoch, "incarnation": ours.incarnation, **envelope}
    event = ev.ControlReceived(envelope=Envelope(**fields), message=Describe(with_static=True))  # type: ignore[arg-type]
    return [a for a in node.machine.handle(event, pair.now_s) if isinstance(a, SendDescription)]


@pytest.fixture
def pair() -> Pair:
    return Pair(num_fragments=2, options={"takeover_token": "secret"})


def test_a_first_life_has_nothing_of_earlier_ones(pair):
    a, b = pair.found(2)
    pair.steps([a, b], 12)
    assert a.machine.state.fragments[0].base_content.mine.tokens > 0
    assert describe(pair, a) == [SendDescription(earlier=(0, 0), with_static=True)]


def test_a_later_life_tells_what_of_the_others_is_in_the_model(pair):
    a, b = pair.found(2)
    pair.steps([a, b], 12)
    pair.kill(a)
    pair.settle()
    gone = [pair.syncer.job.ledger.merged(a.learner_id, i) for i in range(2)]
    again = pair.add(a.learner_id, takeover_token="secret")
    pair.steps([again, b], 12)
    mine = [fragment.merged_tokens for fragment in again.machine.state.fragments]
    assert min(gone) > 0 and min(mine) >= 5 * TOKENS, "the second life has merges of its own"
    (told,) = describe(pair, again)
    held = [pair.syncer.job.ledger.merged(a.learner_id, i) for i in range(2)]
    assert all(gone[i] <= told.earlier[i] <= held[i] - mine[i] for i in range(2))


@pytest.mark.parametrize("life", [0, 1])
def test_a_life_that_comes_after_it_was_put_down_as_ended_stays_out_and_a_fresh_one_is_let_in(life):
    pair = RestartingPair(num_fragments=2, options={"takeover_token": "secret"})
    a, b = pair.found(2)
    pair.steps([a, b], 12)
    for _ in range(life):
        pair.kill(b)
        b = pair.add(b.learner_id, takeover_token="secret")
        pair.steps([a, b], 12)
    pair.take_snapshot()
    merged = [pair.syncer.job.ledger.merged(b.learner_id, i) for i in range(2)]
    ours = pair.of(JobRecord) + [r for r in pair.of(JoinRecord) if r.learner_id == a.learner_id]
    state = a.machine.state
    ours.append(CountersRecord(learner_id=a.learner_id, incarnation=0, inner_steps=state.inner_step, tokens=state.tokens))
    pair.tape[:] = ours  # what a rebuilding writes that has not heard of b
    pair.crash()
    pair.heartbeat(a)
    pair.settle()
    pair.advance(6.0)
    pair.settle()
    ledger = pair.syncer.job.ledger
    assert not pair.syncer.job.is_recovering and ledger.tokens(b.learner_id) == max(merged) > 0
    assert [ledger.discarded(b.learner_id, i) for i in range(2)] == [max(merged) - m for m in merged]
    pair.heartbeat(b)
    pair.settle()
    pair.hello(b)
    pair.settle()
    assert b.stage == "fenced" and pair.syncer.job.members.by_id(b.learner_id) is None
    pair.kill(b)
    fresh = pair.add(b.learner_id)
    pair.steps([a, fresh], 12)
    assert fresh.is_joined and ledger.merged(b.learner_id, 0) > merged[0]
    assert all(ledger.pending(i, p) >= 0 for i in (a.learner_id, b.learner_id) for p in range(2))


def test_one_that_has_not_joined_or_is_of_another_job_says_nothing(pair):
    (a,) = pair.found(1)
    stranger = pair.add(joins=False)
    assert describe(pair, stranger) == []
    assert describe(pair, a, lineage="another") == [] and describe(pair, a, job_id="another") == []
    assert describe(pair, a) != []
