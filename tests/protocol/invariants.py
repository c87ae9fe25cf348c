"""The invariants of PROTOCOL.md section 13, on a `Pair`: each is stated with the toy model, not with the machines' own accounts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.records import (
    CountersRecord,
    DiscardRecord,
    JobRecord,
    MergeRecord,
    ProgressRecord,
    RestartRecord,
    RoundCancelRecord,
    RoundOpenRecord,
)

if TYPE_CHECKING:
    from tests.protocol.pair import Pair
    from tests.protocol.toy import Node

MAX_DECISIONS = 4


def check_learner(pair: Pair, node: Node) -> None:
    """theta = base + local progress that is not merged; base = shadow of that version; at most one unresolved contribution."""
    state = node.machine.state
    if node.joined is None:
        return
    for i, fragment in enumerate(state.fragments):
        assert fragment.base is not None and fragment.held is not None
        assert fragment.base <= fragment.held, "adopted more than was received"
        assert node.base[i] == pair.history[i][fragment.base], "the base is not the shadow of its version"
        assert node.published[i] == pair.history[i][fragment.held] or node.joined.role == "member" and fragment.held.n == 0
        unmerged = {a for a in node.live[i] if not node.base[i][a]}
        assert node.theta[i] == node.base[i] + Counter(unmerged), "theta is not base plus what is not merged"
        counted = sum(pair.tokens_of[a][1] for a in unmerged)
        assert state.tokens - fragment.since_tokens == counted, "the counter is not the work since the base's content"
        merged = {a for a in node.base[i] if a in node.made}
        assert fragment.merged_tokens == sum(pair.tokens_of[a][1] for a in merged), "what it says of its share in the base is not true"
        assert fragment.final is None or state.stage not in ("receiving", "joined")
        assert len([k for k in node.payloads if k[0] == i]) <= 2, "decoded contributions pile up"


def check_syncer(pair: Pair) -> None:
    """Accounts and versions of the syncer against the bags that were really merged."""
    job, rounds = pair.syncer.job, pair.syncer.rounds
    if not job.is_founded or job.is_recovering:
        return
    for i, current in enumerate(job.currents):
        newest = max(pair.history[i])
        assert newest == current.version or i in pair.closing or rounds.of(i).stage == "merging", "a version went back"
        shadow = pair.history[i][current.version]
        merged: Counter[int] = Counter()
        for atom, count in shadow.items():
            assert count == 1, f"work is {count} times in the model"
            learner_id, tokens = pair.tokens_of[atom]
            merged[learner_id] += tokens
        for learner_id in job.ledger.learners():
            assert merged[learner_id] == job.ledger.merged(learner_id, i), "the ledger's merged tokens are not those in the model"
            pending, discarded = job.ledger.pending(learner_id, i), job.ledger.discarded(learner_id, i)
            assert pending >= 0 and discarded >= 0
            assert job.ledger.tokens(learner_id) == merged[learner_id] + pending + discarded
            through = current.merged_through.get(learner_id)
            assert (through.tokens if through else 0) == merged[learner_id]
        held = rounds.of(i).held + rounds.of(i).merging
        assert max(Counter(h.learner_id for h in held).values(), default=0) <= 2, "more than a contribution and its final one are held"
    check_memory(pair)


def check_memory(pair: Pair) -> None:
    """What a job keeps is bounded by learners times fragments, not by time."""
    syncer, job = pair.syncer, pair.syncer.job
    sessions, pairs = len(job.members.present()), len(job.ledger.learners()) * job.num_fragments
    publisher = job.publisher
    for table in (publisher._held, publisher._on_way, publisher._wants_full, publisher._doubted, syncer._admission._hellos):
        assert len(table) <= sessions
    departures = syncer._departures
    assert len(departures._leaving) <= sessions and len(departures._until_s) <= sessions
    ids = len(job.members._next_incarnation) * job.num_fragments
    assert len(job.decisions) <= ids and len(job.last_seq) <= ids and len(job.ledger._held) <= ids
    assert all(len(known) <= MAX_DECISIONS for known in job.decisions.values())
    assert len(job.ledger._reported) <= 7 * max(pairs, ids)


def check_tape(pair: Pair) -> None:
    """One round a fragment at a time, no merge under its quorum, each contribution merged once, accounts from records alone."""
    is_open: dict[int, int] = {}
    made: set[tuple[int, Version]] = set()
    merges: dict[int, list[MergeRecord]] = {}
    totals: dict[tuple[int, int], int] = {}
    merged: Counter[tuple[int, int]] = Counter()
    discarded: Counter[tuple[int, int]] = Counter()
    for record in pair.tape:
        if isinstance(record, JobRecord):
            made |= {(i, Version(record.epoch, n)) for i, n in enumerate(record.founded_n)}
        elif isinstance(record, RoundOpenRecord):
            assert record.fragment_id not in is_open
            is_open[record.fragment_id] = record.round_id
        elif isinstance(record, RoundCancelRecord):
            assert is_open.pop(record.fragment_id) == record.round_id
        elif isinstance(record, MergeRecord):
            assert is_open.pop(record.fragment_id) == record.round_id
            assert len({m.learner_id for m in record.members}) >= max(1, record.quorum), "a merge under its quorum"
            merges.setdefault(record.fragment_id, []).append(record)
            made.add((record.fragment_id, record.version))
        elif isinstance(record, RestartRecord):
            is_open = {}
            for i, version in enumerate(record.versions):
                assert {(i, record.origins[i]), (i, record.momenta[i] or record.origins[i])} <= made, "a state that no line makes"
                made.add((i, version))
                merges[i] = [m for m in merges.get(i, []) if m.version.n <= version.n]
        elif isinstance(record, ProgressRecord | CountersRecord):
            life = (record.learner_id, record.incarnation)
            totals[life] = max(record.tokens, totals.get(life, 0))
        elif isinstance(record, DiscardRecord):
            assert record.tokens > 0
            discarded[record.learner_id, record.fragment_id] += record.tokens
    keys = [(m.learner_id, record.fragment_id, m.seq) for records in merges.values() for record in records for m in record.members]
    assert len(keys) == len(set(keys)), "merged twice"
    for record in (record for records in merges.values() for record in records):
        for member in record.members:
            merged[member.learner_id, record.fragment_id] += member.tokens
    ledger = pair.syncer.job.ledger
    for learner_id in ledger.learners():
        for i in range(pair.num_fragments):
            assert merged[learner_id, i] == ledger.merged(learner_id, i)
            assert discarded[learner_id, i] == ledger.discarded(learner_id, i)


def check_end(pair: Pair) -> None:
    """After the end of everything: nothing pending, nothing held, no open round; the reports on the tape hold all tokens."""
    check_tape(pair)
    assert pair.ended is not None, "the job never ended"
    assert pair.syncer.rounds.is_quiet() and not pair.closing and not any(pair.folded)
    ledger = pair.syncer.job.ledger
    for learner_id in ledger.learners():
        for i in range(pair.num_fragments):
            assert ledger.pending(learner_id, i) == 0, f"learner {learner_id}, fragment {i}: tokens pending after the end"
