"""Members that say anything that the wire allows, in any order: the syncer serves on, and an honest learner's account stays exact."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from lightning_diloco.outer import buffer_of
from lightning_diloco.outer import encode as wire_encode
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import (
    Adopted,
    Busy,
    Contribution,
    Discarded,
    Heartbeat,
    NeedFull,
    Paused,
    Progress,
    Ready,
    Unresolved,
)
from tests.runtime.job_helpers import CONFIG, Background, make_module, running_job, train
from tests.runtime.job_raw_peer import RawPeer

SEED = 20251123
NUMBERS = (0, 1, 2, 3, 4, 7, 31, 2**20, 2**53, 2**62)


def _any_value(dice: random.Random, kind: str, peer: RawPeer) -> Any:
    """A value of a field, legal on the wire, with or without a meaning."""
    number = dice.choice(NUMBERS)
    return {
        "number": number,
        "numbers": tuple(dice.choice(NUMBERS) for _ in range(dice.randrange(6))),
        "version": Version(dice.choice((0, 0, 1)), dice.choice((0, 0, 1, number))),
        "versions": tuple(Version(0, dice.choice(NUMBERS)) for _ in range(dice.randrange(6))),
        "unresolved": tuple(Unresolved(dice.choice(NUMBERS), dice.choice(NUMBERS)) for _ in range(dice.randrange(4))),
        "discarded": tuple(Discarded(dice.choice(NUMBERS), dice.choice(("norm", "died")), number) for _ in range(dice.randrange(4))),
        "seconds": tuple(dice.choice((0.0, 1.0, 1e9)) for _ in range(dice.randrange(4))),
        "second": dice.choice((0.0, 1e9)),
        "flag": dice.random() < 0.5,
        "maybe": dice.choice((None, 0, 1, number)),
        "lineage": dice.choice(("", peer.envelope.lineage, "x")),
        "config": dice.choice((b"{}", b"", json.dumps(CONFIG.as_dict()).encode())),
    }[kind]


SHAPES: dict[type, dict[str, str]] = {
    Busy: {"fragment_id": "number", "round_id": "number"},
    NeedFull: {"fragment_id": "number"},
    Adopted: {"fragment_id": "number", "version": "version", "crc": "number"},
    Progress: {"inner_step": "number", "tokens": "number"},
    Paused: {"is_paused": "flag"},
    Ready: {"inner_step": "number"},
    Heartbeat: {
        **{"inner_step": "number", "tokens": "number", "versions": "numbers", "unresolved": "unresolved", "discarded": "discarded"},
        **{"step_gaps_s": "seconds", "stalls_s": "seconds", "last_step_age_s": "second", "is_paused": "flag", "batch_size": "number"},
    },
    Contribution: {
        **{"fragment_id": "number", "seq": "number", "round_id": "maybe", "base": "version", "base_merged_seq": "number"},
        **{"steps": "number", "tokens": "number", "inner_step": "number", "total_tokens": "number", "crc": "number"},
        **{"is_final": "flag", "after": "maybe"},
    },
}


def _any_message(dice: random.Random, peer: RawPeer) -> Any:
    kind = dice.choice(list(SHAPES))
    fields = {name: _any_value(dice, what, peer) for name, what in SHAPES[kind].items()}
    for name in ("seq", "steps", "tokens") if kind is Contribution else ():
        fields[name] = max(1, fields[name])
    if dice.random() < 0.6 and "fragment_id" in fields:
        fields["fragment_id"] = dice.randrange(4)
    for name in ("inner_step", "tokens", "total_tokens", "seq", "steps"):
        if name in fields and dice.random() < 0.7:
            fields[name] = dice.randrange(1, 40)
    return kind(**fields)


@pytest.mark.parametrize("seed", range(3))
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
                    message = _any_message(dice, peer)
                    if isinstance(message, Contribution):
                        values = torch.full((peer.layout.fragments[min(message.fragment_id, 3)].num_params,), 1e-4)
                        payload = wire_encode(values, CONFIG.wire_dtype)
                        peer.offer(message, buffer_of(payload))
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
