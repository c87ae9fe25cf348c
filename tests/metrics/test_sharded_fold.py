"""One summary from the tapes of several shards: that of the run as one syncer would have had it."""

from __future__ import annotations

import msgspec
import pytest

from lightning_diloco.metrics import ShardedFold
from lightning_diloco.protocol.records import JobRecord, RestartRecord, TapeLine
from tests.metrics.tape_builder import TapeBuilder, two_learner_run


def cut(lines: list[TapeLine], num_shards: int) -> list[list[TapeLine]]:
    """The tapes that shards would have written of the same run: all that is about learners, and what is about their own fragments."""
    tapes: list[list[TapeLine]] = [[] for _ in range(num_shards)]
    for line in lines:
        for shard, tape in enumerate(tapes):
            record = line.record
            if isinstance(record, JobRecord):
                mine = record.fragments[shard::num_shards]
                fragments = tuple(msgspec.structs.replace(f, fragment_id=i) for i, f in enumerate(mine))
                bytes_of_all = record.founding_bytes if shard == 0 else 0
                record = msgspec.structs.replace(
                    record, fragments=fragments, founded_n=record.founded_n[shard::num_shards], founding_bytes=bytes_of_all
                )
            elif isinstance(record, RestartRecord):
                record = msgspec.structs.replace(record, versions=record.versions[shard::num_shards])
            elif (fragment_id := getattr(record, "fragment_id", None)) is not None:
                if shard != (fragment_id % num_shards if fragment_id >= 0 else 0):
                    continue
                if fragment_id >= 0:
                    record = msgspec.structs.replace(record, fragment_id=fragment_id // num_shards)
            tape.append(TapeLine(len(tape), line.t_s, record))
    return tapes


def fold(tapes: list[list[TapeLine]], order: str = "one by one") -> ShardedFold:
    folded = ShardedFold(len(tapes))
    if order == "one by one":
        for shard, tape in enumerate(tapes):
            for line in tape:
                folded.feed_shard(shard, line)
    else:
        for _, shard, line in sorted((line.t_s, shard, i) for shard, tape in enumerate(tapes) for i, line in enumerate(tape)):
            folded.feed_shard(shard, tapes[shard][line])
    return folded


@pytest.mark.parametrize("order", ["one by one", "by time"])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_it_is_that_of_one_syncer_with_the_same_records(num_shards, order):
    tape = two_learner_run()
    expected = tape.summary()
    found = fold(cut(tape.lines, num_shards), order).result()
    # What only the syncer as a whole knows, it says itself.
    own = {"status", "startup_s", "val", "restarts", "global_sha256"}
    assert {k: v for k, v in found.items() if k not in own} == {k: v for k, v in expected.items() if k not in own}
    assert found["status"] == "finished" and found["global_sha256"] is None


def test_a_restart_of_one_shard_rolls_back_its_own_fragments_alone():
    tapes = []
    for _ in range(2):
        tape = TapeBuilder()
        tape.job((30, 10))
        tape.join(0, session="a")
        tape.progress(0, 4, 40, (1.0,) * 4)
        tape.merge(0, [tape.contribute(0, 0, 2, 20)], (0,))
        tape.merge(0, [tape.contribute(0, 0, 2, 20)], (0,))
        tapes.append(tape)
    tapes[1].restart((1, 0))
    found = fold([tape.lines for tape in tapes]).result()
    merged = {f["fragment_id"]: (f["version"], f["merged"]) for f in found["fragments"]}
    assert merged == {0: (2, 40), 1: (1, 20), 2: (0, 0), 3: (0, 0)}
    assert found["merges"] == 3


@pytest.mark.parametrize(("reason", "account"), [("died", "died"), ("fenced", "fenced"), ("limit", "drain")])
def test_what_one_shard_was_not_told_of_a_life_is_discarded_in_its_fragments(reason, account):
    """The lead's last report says 100 tokens, the other shard's 60: it was down, or the learner died in between."""
    tapes = []
    for shard in range(2):
        tape = TapeBuilder()
        tape.job((30,) if shard == 0 else (10,))
        tape.now_s = 1.0
        # Not the same number of the life: at this shard an attempt to join has failed.
        tape.join(0, shard, session="a")
        tokens = 100 if shard == 0 else 60
        tape.progress(0, tokens // 10, tokens, (1.0,) * (tokens // 10), incarnation=shard)
        tape.merge(0, [tape.contribute(0, 0, 5, 50, incarnation=shard)], (0,))
        tape.leave(0, shard, reason=reason)
        tape.discard(0, 0, tokens - 50, account)
        tape.end()
        tapes.append(tape.lines)
    folded = fold(tapes)
    for _ in range(2):  # asking changes nothing
        found = folded.result()
        assert [(f["merged"], f["pending"], f["discarded"]) for f in found["fragments"]] == [(50, 0, 50), (50, 0, 50)]
        assert (found["tokens"], found["tokens_merged"], found["tokens_discarded"]) == (100, 50, 50)
        assert {r: n for r, n in found["discarded_by_reason"].items() if n} == {account: 50}
        assert found["steps_lost"] == (5 if account == "died" else 0)
        assert found["learners"][0]["discarded"] == 50


def test_a_life_that_a_shard_never_saw_is_discarded_there_when_it_has_ended():
    lead, other = TapeBuilder(), TapeBuilder()
    for tape, num_params in ((lead, 30), (other, 10)):
        tape.job((num_params,))
        tape.now_s = 1.0
    lead.join(0, session="a")
    lead.progress(0, 2, 20, (1.0, 1.0))
    lead.merge(0, [lead.contribute(0, 0, 2, 20)], (0,))
    assert fold([lead.lines, other.lines]).result()["fragments"][1] | {"version": 0} == {
        "fragment_id": 1, "version": 0, "num_params": 10, "merged": 0, "pending": 20, "discarded": 0,
    }  # fmt: skip
    lead.leave(0)
    lead.end()
    other.end()
    found = fold([lead.lines, other.lines]).result()
    assert [(f["merged"], f["pending"], f["discarded"]) for f in found["fragments"]] == [(20, 0, 0), (0, 0, 20)]


def test_the_job_has_ended_when_all_shards_have_and_failed_if_one_has():
    tapes = [two_learner_run().lines for _ in range(1)]
    lead, other = cut(tapes[0], 2)
    folded = fold([lead, other[:-2]])
    assert folded.result()["status"] == "running"
    ended = TapeBuilder()
    ended.now_s = 31.0
    ended.end("failed")
    folded.feed_shard(1, ended.lines[0])
    assert folded.result()["status"] == "failed"
