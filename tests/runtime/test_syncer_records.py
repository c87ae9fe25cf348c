"""What the syncer writes: static state on the tape, the end of a run that could not be saved, and no log line for every bad message."""

from __future__ import annotations

import logging

import pytest

from lightning_diloco.outer import static_bytes
from lightning_diloco.protocol.messages import Ping, Pong
from lightning_diloco.runtime.complaints import COMPLAIN_S
from tests.runtime.job_helpers import CONFIG, make_module, running_job, sum_up, train, whole_life
from tests.runtime.job_raw_peer import RawPeer
from tests.tape_checker import load_tape


def test_the_static_state_that_joiners_were_sent_is_in_the_bytes_down(tmp_path):
    with running_job(tmp_path) as job:
        founder = job.client(0)
        founder.join()
        joiners = [job.client(i) for i in (1, 2)]
        for joiner in joiners:
            joiner.join()
        received = [joiner.figures.bytes_down for joiner in joiners]
        summary = job.finish()
    size = static_bytes(founder.layout)
    fragments = 4 * sum(f.num_params for f in founder.layout.fragments)
    assert size > 0 and received == [fragments + size] * 2
    assert summary["bytes_down"] == sum(received)
    sent = [e for e in load_tape(tmp_path / "tape.jsonl") if e["event"] == "publish" and e["fragment_id"] == -1]
    assert [(e["learners"], e["payload_bytes"]) for e in sent] == [([1], size), ([2], size)]


@pytest.mark.parametrize("name", ["global.safetensors", "global.tmp"])
def test_a_run_whose_global_model_cannot_be_written_has_failed_and_its_tape_has_an_end(tmp_path, name, caplog):
    """A folder stands in the way, of the file itself (the system says no) or of the one that becomes it (the format's library does)."""
    (tmp_path / name).mkdir()
    with running_job(tmp_path) as job:
        whole_life(job.client(0), 30)
        with caplog.at_level(logging.ERROR):
            job.service.finish("finished")
            assert job.service.join(20)
        assert job.service.error is None and job.service.status == "failed"
    assert "could not be written" in caplog.text
    (end,) = [e for e in load_tape(tmp_path / "tape.jsonl") if e["event"] == "end"]
    assert end["status"] == "failed" and end["global_sha256"]
    assert sum_up(tmp_path, "failed")["status"] == "failed"


def test_a_peer_that_sends_garbage_does_not_fill_the_log(tmp_path, caplog, monkeypatch):
    def logged() -> int:
        return sum("was dropped" in record.message for record in caplog.records)

    with running_job(tmp_path) as job, RawPeer(job.endpoint, make_module(1), CONFIG, job.context) as peer:
        job.client(0).join()

        def send(number: int) -> None:
            for _ in range(60):
                peer.say_bytes(b"garbage")
            peer.say(Ping(number=number))
            peer.hear(Pong, number=number)

        with caplog.at_level(logging.WARNING):
            send(1)
            assert logged() == 1
            job.service._complaints._next_s -= COMPLAIN_S
            send(2)
            assert logged() == 2, "and after a while it is said again"
        train(job.clients[0], 5)
        job.finish()
