"""A replay across restarts of the syncer: every kind of them on a tape made by hand with the syncer's own store, and real processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_diloco.outer import FragmentState, buffer_of, encode, plan_layout
from lightning_diloco.protocol.identity import FragmentInfo, Version
from lightning_diloco.protocol.records import ContributionRecord, EndRecord, JobRecord, Member, MergeRecord, RestartRecord
from lightning_diloco.runtime import replay as replaying
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.founding import founding_entries
from lightning_diloco.runtime.payloads import PayloadKey, PayloadWriter
from lightning_diloco.runtime.store import SyncerStore
from lightning_diloco.runtime.tape import TapeWriter
from tests.runtime.job_helpers import CONFIG as SMALL
from tests.runtime.job_helpers import until
from tests.runtime.replay_helpers import events, replay
from tests.runtime.test_syncer_restart import CONFIG, Trainer, kill_between_steps, syncer, versions
from tests.tape_checker import check_run

WITH_MOMENTUM = replace(SMALL, num_fragments=2, tape_payloads=True)
KEPT = replace(CONFIG, tape_payloads=True, snapshot_interval_s=1.0)
"""Learners are ahead of the snapshot by many merges, so the momentum that goes on is older than the values."""


class HandmadeRun:
    """A syncer's store and what it writes, without rules and sockets: merges of two learners, snapshots, restarts."""

    def __init__(self, run_dir: Path) -> None:
        module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        layout = plan_layout(module, num_fragments=2, merge="rda", mean_patterns=(), include_frozen=False)
        self.random = torch.Generator().manual_seed(5)
        self.store = SyncerStore(layout, WITH_MOMENTUM, has_momentum=True)
        for i, size in enumerate(layout.fragment_sizes):
            for part, scale in (("values", 1.0), ("momentum", 0.1)):
                values = scale * torch.randn(size, generator=self.random)
                self.store.found_fragment(i, part, buffer_of(values), crc32(values))
        self.payloads, self.tape = PayloadWriter(run_dir / "payloads.bin"), TapeWriter(run_dir / "tape.jsonl")
        self.run_dir, self.versions, self.seq = run_dir, [Version(0, 3), Version(0, 3)], 0
        infos = tuple(FragmentInfo(f.fragment_id, f.num_params, f.kind) for f in layout.fragments)
        at = [self.payloads.append(key, memoryview(payload)) for key, payload in founding_entries(self.store)][0]
        self.tape.write(
            JobRecord(
                job_id="job",
                lineage="line",
                epoch=0,
                config=WITH_MOMENTUM.as_dict(),
                fingerprint=layout.fingerprint(),
                fragments=infos,
                founded_n=(3, 3),
                founder_id=0,
                founding_bytes=self.store.founding_bytes,
                payload_at=at,
            )
        )

    def merge(self, count: int) -> None:
        """So many merges of each fragment, of one contribution and of two in turn."""
        for number in range(count):
            for fragment_id in (0, 1):
                self._merge(fragment_id, 1 + number % 2)

    def _merge(self, fragment_id: int, count: int) -> None:
        size, members = self.store.layout.fragment_sizes[fragment_id], []
        for learner_id in range(count):
            self.seq += 1
            raw = encode(0.1 * torch.randn(size, generator=self.random), "bf16")
            key = PayloadKey(kind="contribution", fragment_id=fragment_id, learner_id=learner_id, incarnation=2, seq=self.seq)
            at = self.payloads.append(key, buffer_of(raw))
            d = self.store.measure_contribution(fragment_id, buffer_of(raw), crc32(raw))
            self.store.fold(fragment_id, d, 8.0 + self.seq)
            members.append(Member(learner_id=learner_id, incarnation=2, seq=self.seq, steps=1, tokens=1, weight=8.0 + self.seq))
            told = ContributionRecord(
                learner_id=learner_id,
                incarnation=2,
                fragment_id=fragment_id,
                seq=self.seq,
                base=self.versions[fragment_id],
                steps=1,
                tokens=1,
                weight=members[-1].weight,
                norm=d.norms.whole,
                payload_bytes=raw.numel(),
                outcome="folded",
                payload_at=at,
            )
            self.tape.write(told)
        self._close(fragment_id, tuple(members))

    def _close(self, fragment_id: int, members: tuple[Member, ...]) -> None:
        before = self.versions[fragment_id]
        version = self.versions[fragment_id] = Version(before.epoch, before.n + 1)
        closed = self.store.close(fragment_id, version.n)
        self.tape.write(
            MergeRecord(
                fragment_id=fragment_id,
                round_id=version.n,
                version=version,
                members=members,
                eligible=(0, 1),
                quorum=1,
                quorum_s=0.0,
                grace_window_s=0.0,
                grace_used_s=0.0,
                merge_s=0.0,
                outer_lr=WITH_MOMENTUM.outer_lr,
                outer_momentum=closed.outer_momentum,
                crc=closed.crc,
                norms=closed.norms,
                scales=closed.scales,
            )
        )

    def snapshot(self) -> list[tuple[Version, FragmentState]]:
        return [(self.versions[i], self.store.state(i)) for i in (0, 1)]

    def restart(self, snapshot: list[tuple[Version, FragmentState] | None], held: dict[int, tuple[Version, FragmentState]]) -> None:
        """Go on from a snapshot (None: it has nothing), and for some fragments from a version that a learner held."""
        store = SyncerStore(self.store.layout, self.store.config)
        store.restore(self.store.static, [None if s is None else s[1] for s in snapshot])
        origins = [held[i][0] if i in held else snapshot[i][0] for i in (0, 1)]
        for i, (version, state) in held.items():
            recalled = store.recalled(i, buffer_of(state.shadow), crc32(state.shadow), version.n)
            assert recalled is not None
            store.put_recalled(i, recalled)
        epoch, self.store = max(v.epoch for v in self.versions) + 1, store
        self.versions = [Version(epoch, origin.n) for origin in origins]
        momenta = tuple(None if s is None else s[0] for s in snapshot)
        told = {"epoch": epoch, "versions": tuple(self.versions), "recalled": tuple(held), "origins": tuple(origins), "momenta": momenta}
        self.tape.write(RestartRecord(**told))

    def end(self) -> str:
        """Write the end; returns the model's SHA-256."""
        sha256 = self.store.global_sha256()
        self.tape.write(EndRecord(status="finished", versions=tuple(v.n for v in self.versions), global_sha256=sha256))
        self.tape.close()
        self.payloads.close()
        return sha256


def test_every_kind_of_restart_is_replayed(tmp_path, capsys):
    run = HandmadeRun(tmp_path)
    run.merge(3)
    early = run.snapshot()
    run.merge(4)
    late = run.snapshot()
    # Fragment 0 from a learner, with an older momentum; fragment 1 goes back, and four of its merges are undone.
    run.restart(early, {0: late[0]})
    run.merge(2)
    given_up = run.snapshot()
    run.merge(1)
    newest = run.snapshot()
    # No snapshot of fragment 0, so its momentum begins at zero; fragment 1 goes back to the old epoch's once more.
    run.restart([None, early[1]], {0: newest[0]})
    run.merge(3)
    # A snapshot of the branch that was given up can be read again, but learners hold later versions.
    run.restart(given_up, dict(enumerate(run.snapshot())))
    run.merge(2)
    run.restart(run.snapshot(), {})
    run.merge(2)
    sha256 = run.end()
    code, told = replay(tmp_path, capsys)
    assert code == 0 and told["global_sha256"] == sha256 and told["expected_from"] == "tape.jsonl"
    assert told["restarts"] == 4 and told["merges"] == 2 * (3 + 4 + 2 + 1 + 3 + 2 + 2)
    assert [f["version"] for f in told["fragments"]] == [[4, v.n] for v in run.versions] and run.versions[0] > run.versions[1]


def test_only_states_that_a_later_restart_needs_are_kept(tmp_path):
    run = HandmadeRun(tmp_path)
    for _ in range(3):
        run.merge(3)
        snapshot = run.snapshot()
        run.merge(3)
        run.restart(snapshot, {1: run.snapshot()[1]})
    run.end()
    tape = tmp_path / "tape.jsonl"
    plan, most = replaying._survey(tape), 0

    class Watched(replaying._Replay):
        def _keep(self, fragment_id: int, version: Version) -> None:
            nonlocal most
            super()._keep(fragment_id, version)
            most = max(most, len(self._kept))

    payloads = replaying.PayloadFile(tmp_path / "payloads.bin")
    watched = Watched(tape, plan, payloads)
    assert watched.run(None).is_equal and watched._kept == {} and most == 3, (
        "of fragment 0 the snapshot's; of 1 the momentum and the values"
    )
    payloads.close()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"origins": []}, "the restart does not name versions, origins and momenta of 2 fragments"),
        ({"origins": [[0, 6], [0, 77]], "versions": [[1, 6], [1, 77]]}, "goes back to version (0, 77) of fragment 1, which no line before"),
        ({"versions": [[1, 6], [1, 5]]}, "fragment 1 goes on as (1, 5) from (0, 6)"),
        ({"epoch": 0, "versions": [[0, 6], [0, 6]]}, "a restart with epoch 0 after epoch 0"),
    ],
    ids=["no origins", "unknown version", "another number", "old epoch"],
)
def test_a_restart_that_cannot_be_is_named(change, sentence, tmp_path, capsys):
    run = HandmadeRun(tmp_path)
    run.merge(3)
    run.restart(run.snapshot(), {})
    run.end()
    path = tmp_path / "tape.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(e | (change if e["event"] == "restart" else {})) + "\n" for e in told))
    code, answer = replay(tmp_path, capsys)
    (number,) = [e["seq"] + 1 for e in told if e["event"] == "restart"]
    assert code == 2 and sentence in answer["error"] and f"tape.jsonl, line {number}: " in answer["error"]


# ---- real processes -------------------------------------------------------------------------------------------------------------


def eventually(condition: Callable[[], bool]) -> None:
    until(condition, 90)  # learners, a syncer and its restarts share few cores with whatever else runs


def is_replayed(run_dir: Path, capsys: pytest.CaptureFixture[str], *, restarts: int) -> None:
    """The run ended well, and its replay ends at the same model."""
    summary = check_run(run_dir)
    code, told = replay(run_dir, capsys)
    assert code == 0 and told["global_sha256"] == summary["global_sha256"] and told["restarts"] == restarts
    assert told["merges"] == len(events(run_dir, "merge"))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(300)
def test_a_syncer_that_was_killed_and_started_again_is_replayed(tmp_path, capsys):
    with syncer(tmp_path / "run", KEPT) as job:
        learners = [Trainer(job.client(0))]
        eventually(lambda: len(job.tape("join")) == 1)
        learners.append(Trainer(job.client(1)))
        eventually(lambda: len(job.tape("join")) == 2)
        for epoch in (1, 2):
            kill_between_steps(job, learners, after_merges=12 * epoch)
            job.resume()
            eventually(lambda epoch=epoch: versions(job)[-1][0] == epoch)
        for learner in learners:
            learner.end()
        assert job.process.wait(30) == 0, job.log
        restarts = job.tape("restart")
        old = [(m, o) for r in restarts for p, (m, o) in enumerate(zip(r["momenta"], r["origins"], strict=True)) if p in r["recalled"]]
        assert old and all(momentum < origin for momentum, origin in old), "values of a learner, with an older momentum"
        is_replayed(job.run_dir, capsys, restarts=2)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(300)
def test_a_syncer_that_was_killed_before_its_restart_was_on_the_tape_is_replayed(tmp_path, capsys):
    """The snapshot of the new epoch is there, its line is not, and nobody has heard of it: as if it had been killed between the two."""
    with syncer(tmp_path / "run", KEPT) as job:
        learner = Trainer(job.client(0))
        eventually(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 12)
        job.kill()
        last_known = max(n for _, n in versions(job))
        endpoint, job.endpoint = job.endpoint, "tcp://127.0.0.1:0"
        job.resume()  # elsewhere, so that the learner does not hear of it: its snapshot serves
        eventually(lambda: bool(job.tape("restart")))
        job.kill()
        job.endpoint, tape = endpoint, job.run_dir / "tape.jsonl"
        lines = tape.read_bytes().splitlines(keepends=True)
        cut = next(i for i, line in enumerate(lines) if b'"event":"restart"' in line)
        tape.write_bytes(b"".join(lines[:cut]))
        job.resume()
        eventually(lambda: versions(job)[-1][0] == 2 and versions(job)[-1][1] >= last_known)
        learner.end()
        assert job.process.wait(30) == 0, job.log
        (restart,) = job.tape("restart")
        assert restart["epoch"] == 2 and {epoch for epoch, _ in restart["origins"]} == {0}, "what the first epoch made, by its own names"
        is_replayed(job.run_dir, capsys, restarts=1)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(300)
def test_a_syncer_without_snapshots_is_replayed(tmp_path, capsys):
    with syncer(tmp_path / "run", KEPT) as job:
        learner = Trainer(job.client(0))
        eventually(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 12)
        job.kill()
        for path in (job.run_dir / "snapshots").glob("0*"):
            os.rename(path, tmp_path / path.name)
        job.resume()
        eventually(lambda: versions(job)[-1][0] == 1)
        learner.end()
        assert job.process.wait(30) == 0, job.log
        assert job.tape("restart")[0]["momenta"] == [None] * len(job.tape("job")[0]["fragments"])
        is_replayed(job.run_dir, capsys, restarts=1)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(300)
def test_a_job_that_went_back_to_its_snapshot_is_replayed(tmp_path, capsys):
    """The last snapshot of a job that has ended is gone, and nobody holds its model: merges since the one before are undone."""
    with syncer(tmp_path / "run", replace(KEPT, snapshot_interval_s=300.0)) as job:
        first = Trainer(job.client(0))
        eventually(lambda: bool(job.tape("merge")) and versions(job)[-1][1] >= 12)
        snapshots = job.run_dir / "snapshots"
        shutil.copytree(snapshots / "00000001", tmp_path / "early")
        first.end()
        assert job.process.wait(30) == 0, job.log
        for path in snapshots.glob("0*"):
            shutil.rmtree(path)
        shutil.copytree(tmp_path / "early", snapshots / "00000001")
        job.resume()
        second = Trainer(job.client(0))
        eventually(lambda: versions(job)[-1][0] == 1 and versions(job)[-1][1] >= 5)
        second.end()
        assert job.process.wait(30) == 0, job.log
        (restart,) = job.tape("restart")
        assert restart["recalled"] == [] and all(n == 0 for _, n in restart["origins"]), "the snapshot of the founding"
        is_replayed(job.run_dir, capsys, restarts=1)
