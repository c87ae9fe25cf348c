"""The job that is fired at: its configuration, its honest learners, and what must be true of it when all is over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import DiLoCoError
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from tests.fuzzing.tally import Tally
from tests.runtime.job_helpers import Background, step
from tests.tape_checker import check_run, load_tape

CONFIG = SyncConfig(
    num_fragments=4, sync_interval_steps=8, outer_momentum=0.0, outer_lr=0.5, heartbeat_s=0.2, drain_timeout_s=20.0, wire_dtype="fp32"
)
"""Steps of milliseconds and a quorum of one: with momentum the toy would diverge after a few thousand of them, attack or not."""
TOKENS = 16


def make_module(seed: int = 0) -> nn.Module:
    """Its largest fragment has 1.25 MB: two chunks."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 560), nn.Tanh(), nn.Linear(560, 560), nn.BatchNorm1d(560), nn.Linear(560, 2))


class PlainSGD:
    """The inner optimizer; importing torch's own costs seconds and 40 MB, in the middle of what is measured."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            parameter -= 0.01 * parameter.grad


class Honest:
    """A real learner on a thread of this process: it trains until it is told to leave."""

    def __init__(self, learner_id: int, endpoint: str, run_dir: Path) -> None:
        self.module = make_module(learner_id)
        options = ClientOptions(endpoint=endpoint, config=CONFIG, learner_id=learner_id, counters_path=run_dir / "counters")
        self.client = LearnerClient(self.module, options)
        self.inner_steps = 0
        self.enough = threading.Event()
        self.life = Background(self._live)

    def _live(self) -> None:
        try:
            self.client.join()
            optimizer = PlainSGD(self.module.parameters())
            while not self.enough.is_set():
                step(self.module, optimizer, self.inner_steps)
                self.inner_steps += 1
                self.client.boundary(tokens=TOKENS)
                self.enough.wait(0.005)
            self.client.leave("limit")
            self.client.weights.load_global()
        finally:
            self.client.close()


def judge(tally: Tally, run_dir: Path, honest: list[Honest]) -> None:
    """The job is that of the honest learners, as if nobody else had been there."""
    try:
        summary = check_run(run_dir)
    except (AssertionError, DiLoCoError, OSError, ValueError) as error:
        tally.faults.append(f"the run does not pass the tape's checks: {error}"[:1000])
        return
    tape = load_tape(run_dir / "tape.jsonl")
    lives = [(e["learner_id"], e["incarnation"], e["reason"]) for e in tape if e["event"] == "leave" and e["learner_id"] < 2]
    tally.expect(sorted(lives) == [(0, 0, "limit"), (1, 0, "limit")], f"the honest learners' lives ended as {lives}")
    merges = [e for e in tape if e["event"] == "merge"]
    strangers = {m["learner_id"] for e in merges for m in e["members"]} - {0, 1}
    tally.expect(not strangers, f"learners {strangers} are merged")
    taken = [e for e in tape if e["event"] == "contribution" and e["learner_id"] > 1 and e["outcome"] in ("folded", "carried")]
    tally.expect(not taken, f"{len(taken)} contributions of attackers were taken, the first is {taken[:1]}")
    for event in tape:
        if event["event"] == "contribution" and event["learner_id"] > 1:
            tally.fates[f"contribution on the tape: {event['outcome']} {event['reason'] or ''}".strip()] += 1
    versions = [sum(e["fragment_id"] == i for e in merges) for i in range(tally.num_fragments)]
    said = [(f["fragment_id"], f["version"]) for f in summary["fragments"]]
    tally.expect(said == [(i, versions[i]) for i, _ in said], "versions and merges do not agree")
    tally.expect(summary["status"] == "finished", f"the job's status is {summary['status']}")
    for learner, entry in zip(honest, summary["learners"], strict=False):
        tokens = learner.inner_steps * TOKENS
        # A last contribution of one step may lie above the gate of norms by itself, whoever fires.
        mine = [e for e in tape if e["event"] == "discard" and e["learner_id"] == entry["learner_id"] and e["reason"] == "norm"]
        gated = sum(e["tokens"] for e in mine)
        is_whole = entry["tokens"] == tokens and entry["discarded"] <= gated <= 2 * TOKENS
        tally.expect(is_whole, f"of {tokens} tokens of an honest learner: {entry}"[:500])
        merged = sum(sum(m["tokens"] for m in e["members"] if m["learner_id"] == entry["learner_id"]) for e in merges)
        wanted = tokens * len(versions) - gated
        tally.expect(merged == wanted, f"{merged} tokens of an honest learner are merged, not {wanted} of {len(versions)} x {tokens}")
    saved = load_file(run_dir / "global.safetensors")
    same = all(torch.equal(p.detach(), saved[name]) for name, p in honest[-1].module.named_parameters())
    tally.expect(same, "the last honest learner's model is not the job's, bit for bit")
    tally.expect(all(bool(torch.isfinite(t.float()).all()) for t in saved.values()), "the job's model is not finite")
    tally.merges = len(merges)
