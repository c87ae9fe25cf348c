"""Payloads of whole chunks over an encrypted link: on the wire they are longer than what is sent."""

from __future__ import annotations

import time

from lightning_diloco.runtime.transport import CHUNK_BYTES, MAX_CONTROL_BYTES, SYNCER, ControlReceived, LearnerTransport, SyncerTransport
from lightning_diloco.runtime.transport import PayloadReceived as Received
from tests.runtime.key_helpers import Keys
from tests.runtime.transport_helpers import NONCE, accept_all


def test_the_largest_chunk_and_the_largest_message_pass_an_encrypted_link_both_ways(tmp_path):
    keys = Keys(tmp_path)
    site = keys.site("paris")
    syncer = SyncerTransport(accept=accept_all, keys=keys.syncer)
    syncer.bind()
    learner = LearnerTransport(syncer.control_endpoint, nonce=NONCE, accept=accept_all, configure=site.configure)
    payload, message = bytes(range(256)) * (CHUNK_BYTES // 128), bytes(MAX_CONTROL_BYTES)
    try:
        learner.connect()
        learner.connect_bulk(syncer.bulk_endpoint)
        learner.send_payload(SYNCER, b"", payload)
        learner.send_control(SYNCER, message)
        heard, end_s = [], time.monotonic() + 20
        while len(heard) < 4:
            assert time.monotonic() < end_s, (len(heard), syncer.stats, learner.stats)
            for event in syncer.poll(0.01):
                if isinstance(event, Received):
                    heard.append(bytes(event.payload) == payload)
                    syncer.send_payload(event.peer, b"", payload)
                elif isinstance(event, ControlReceived):
                    heard.append(event.data == message)
                    syncer.send_control(event.peer, message)
            for event in learner.poll(0.01):
                if isinstance(event, Received | ControlReceived):
                    heard.append((event.payload == payload) if isinstance(event, Received) else (event.data == message))
        assert all(heard)
    finally:
        learner.close()
        syncer.close()
