"""What a learner does with words that no syncer of good faith says: they change nothing, end nothing, and cost no memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest
import torch

from lightning_diloco.outer import buffer_of
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import Fenced, JoinRefused, NotHeld, Publication, Recall, ShardAddress, Stop, Welcome
from lightning_diloco.protocol.wire import encode
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from tests.fuzzing.honest import CONFIG, make_module
from tests.fuzzing.learner_target import FAR, JOB, FalseSyncer
from tests.fuzzing.tally import Tally
from tests.runtime.job_helpers import Background, running_job, until
from tests.runtime.job_helpers import make_module as small_module
from tests.runtime.job_raw_peer import RawPeer


class Joined:
    """A learner that a false syncer has founded with."""

    def __init__(self) -> None:
        self.syncer = FalseSyncer(Tally("learner", 0))
        self.client = LearnerClient(make_module(), ClientOptions(endpoint=self.syncer.control_endpoint, config=CONFIG, learner_id=0))
        life = Background(self.client.join)
        self.syncer.found()
        life.result()

    def say(self, message: object, **envelope: object) -> None:
        self.syncer.send_control(self.syncer.peer, encode(msgspec.structs.replace(JOB, **envelope), message))

    def settle(self) -> None:
        """All that was said is taken."""
        self.syncer.heard.clear()
        self.say(Recall(fragment_id=0, version=FAR))
        self.syncer.wait_for(NotHeld)

    @property
    def bulk(self) -> str | None:
        return self.client._loop._transport._bulk_endpoint


@pytest.fixture
def joined() -> Iterator[Joined]:
    joined = Joined()
    try:
        yield joined
        assert joined.client.fenced is None
    finally:
        joined.client.close()
        joined.syncer.close()


def shards(address: str) -> tuple[ShardAddress, ...]:
    return (ShardAddress(bulk_endpoint=address),)


@pytest.mark.parametrize("address", ["nowhere", "", "tcp://", "tcp://127.0.0.1:port", "tcp://a\x00b:1"])
def test_an_address_that_is_none_leaves_everything_as_it_is(joined, address):
    before = joined.bulk
    joined.say(Welcome(role="resumed", learner_id=0, incarnation=JOB.incarnation, shards=shards(address)))
    joined.settle()
    assert joined.bulk == before == joined.syncer.bulk_endpoint


@pytest.mark.parametrize("envelope", [{"lineage": "other"}, {"job_id": "other"}, {"epoch": JOB.epoch - 1}, {"incarnation": 9}])
def test_a_welcome_of_another_syncer_leads_payloads_nowhere_else(joined, envelope):
    joined.say(Welcome(role="resumed", learner_id=0, incarnation=9, shards=shards("tcp://127.0.0.1:1")), **envelope)
    joined.settle()
    assert joined.bulk == joined.syncer.bulk_endpoint and joined.client._machine.state.envelope == JOB


EVIL = "x\nERROR forged\x1b[2J\x9b"


def test_the_words_of_a_syncer_cannot_forge_a_line_of_the_log_or_of_an_error(joined, caplog):
    bad = msgspec.msgpack.encode((msgspec.to_builtins(JOB), {"type": "Stop", "reason": "x", EVIL: 1}))
    joined.syncer.send_control(joined.syncer.peer, bad)
    joined.say(Stop(reason=EVIL))
    joined.settle()
    assert joined.client.stop_reason == "x?ERROR forged?[2J?"
    (said,) = [record.getMessage() for record in caplog.records if "A message of the syncer was dropped" in record.getMessage()]
    assert said.isprintable() and "?ERROR forged?[2J?" in said


@pytest.mark.parametrize("message", [JoinRefused(reason=EVIL, detail=2000 * "\n"), Fenced(detail=EVIL + 1900 * "\n")])
def test_the_sentence_of_an_end_cannot_forge_a_line(message):
    joined = Joined()
    try:
        joined.say(message)
        until(lambda: joined.client.fenced is not None)
        said = str(joined.client.fenced)
        assert said.startswith("x?ERROR forged?[2J?") and said.isprintable() and len(said) > 1900, "none of it is cut"
    finally:
        joined.client.close()
        joined.syncer.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_version_that_is_not_finite_is_never_adopted_whatever_its_checksum(joined, value):
    size = joined.syncer.layout.fragments[1].num_params
    for n, values in ((1, torch.full((size,), value)), (2, torch.zeros(size))):
        values[size // 2] = value if n == 1 else 1.0
        header = Publication(fragment_id=1, version=Version(JOB.epoch, n), parent=None, crc=crc32(values), merged_through={})
        transfer_id = joined.syncer.send_payload(joined.syncer.peer, encode(JOB, header), buffer_of(values))
        until(lambda t=transfer_id: joined.syncer.turn() or not any(t in o.pending_ids for o in joined.syncer._outgoing.values()))
        joined.settle()
        held = joined.client._machine.state.fragments[1].held
        assert held == Version(JOB.epoch, 0 if n == 1 else 2), "a sound one is taken"
    assert bool(torch.isfinite(joined.client._store.published(1)).all())


def test_a_version_that_is_recalled_again_and_again_is_on_its_way_once(joined):
    transport = joined.client._loop._transport
    for _ in range(300):
        joined.say(Recall(fragment_id=2, version=Version(JOB.epoch, 0)))
    joined.syncer._drain_bulk = lambda: None
    joined.settle()
    time.sleep(0.05)
    assert sum(len(outgoing.pending_ids) for outgoing in list(transport._outgoing.values())) <= 1


def test_a_member_that_says_hello_again_and_again_has_one_publication_of_each_fragment_on_its_way(tmp_path):
    with running_job(tmp_path) as job:
        job.client(0).join()
        with RawPeer(job.endpoint, small_module(), job.config, job.context) as peer:
            peer.join(7)
            for _ in range(100):
                peer.hello(learner_id=7, lineage=peer.envelope.lineage, versions=(Version(0, 5),) * 5)
            until(lambda: job.service._transport.stats.control_received >= 100)
            pending = job.service._transport._outgoing.get(peer.nonce)
            assert pending is None or len(pending.pending_ids) <= len(peer.layout.fragments)
            assert len(job.service._performer._transfers) <= len(peer.layout.fragments)
        assert job.service.error is None
