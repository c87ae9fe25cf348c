"""Members that say anything that the wire allows, in any order: the syncer serves on, and an honest learner's account stays exact."""

from __future__ import annotations

import json
import random
from typing import get_args

import msgspec
import pytest
import torch

from lightning_diloco.outer import buffer_of
from lightning_diloco.outer import encode as wire_encode
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import PROTOCOL_VERSION, Contribution, FromLearner, Heartbeat, Progress
from lightning_diloco.runtime.checksum import crc32
from tests.fuzzing.values import struct
from tests.runtime.job_helpers import CONFIG, Background, make_module, running_job, train
from tests.runtime.job_raw_peer import RawPeer

SEED = 20251123
KINDS = (*get_args(FromLearner), *4 * (Contribution,), *3 * (Progress, Heartbeat))
HINTS = {
    "fragment_id": (0, 1, 2, 3),
    "inner_step": tuple(range(1, 40)),
    "tokens": tuple(range(1, 40)),
    "total_tokens": tuple(range(1, 40)),
    "seq": tuple(range(1, 40)),
    "steps": tuple(range(1, 40)),
    "base": (Version(0, 0), Version(0, 1), Version(0, 7), Version(1, 0)),
    "base_merged_seq": (0, 0, 1, 2),
    "lineage": ("", "x"),
    "config": (b"{}", b"", json.dumps(CONFIG.as_dict()).encode()),
    "protocol_version": (PROTOCOL_VERSION,),
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_members_that_say_anything_that_the_wire_allows_change_nothing_for_others(tmp_path, seed):
    dice = random.Random(SEED + seed)
    with running_job(tmp_path, takeover_token="t") as job:
        well = job.client(0)
        well.join()
        life = Background(lambda: train(well, 400, sleep_s=0.004))
        for _ in range(8):
            with RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer:
                peer.join(dice.choice((7, 8)), takeover_token="t")
                for _ in range(40):
                    message = struct(dice, dice.choice(KINDS), HINTS, wildness=0.3)
                    if isinstance(message, Contribution):
                        values = torch.full((peer.layout.fragments[min(message.fragment_id, 3)].num_params,), 1e-4)
                        payload = wire_encode(values, CONFIG.wire_dtype)
                        crc = crc32(payload) if dice.random() < 0.7 else message.crc
                        peer.offer(msgspec.structs.replace(message, crc=crc), buffer_of(payload))
                    else:
                        peer.say(message, incarnation=peer.envelope.incarnation if dice.random() < 0.9 else 9)
                    peer.poll(0.001)
        life.result()
        assert job.service.error is None and well.fenced is None
        well.leave("limit")
        well.weights.load_global()
        assert all(torch.isfinite(p).all() for p in well._module.parameters())
        summary = job.finish()  # holds the whole tape and summary to the invariants, also of the learners that lied
        assert {x["learner_id"]: x["tokens"] for x in summary["learners"]}[0] == 400 * 16
        ledger = job.machine.job.ledger
        assert [(ledger.pending(0, p), ledger.discarded(0, p)) for p in range(4)] == [(0, 0)] * 4
        assert summary["tokens"] == sum(ledger.tokens(m) for m in ledger.learners()), "the tape and the syncer count the same tokens"
