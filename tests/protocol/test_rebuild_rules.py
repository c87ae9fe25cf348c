"""What a learner tells a syncer of whose run directory nothing is left, on the two machines."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.actions import SendDescription
from lightning_diloco.protocol.messages import Describe, Envelope
from tests.protocol.pair import Pair
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


def test_one_that_has_not_joined_or_is_of_another_job_says_nothing(pair):
    (a,) = pair.found(1)
    stranger = pair.add(joins=False)
    assert describe(pair, stranger) == []
    assert describe(pair, a, lineage="another") == [] and describe(pair, a, job_id="another") == []
    assert describe(pair, a) != []
