"""What the parameters are after each inner step: exactly what plain training, or one step boundary, made of them."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_diloco.protocol.messages import Contribution
from lightning_diloco.runtime.client import LearnerClient
from lightning_diloco.runtime.intake import Intake
from tests.runtime.job_helpers import CONFIG, Background, make_module, running_job, step, train, until, whole_life

PLAIN = dataclasses.replace(CONFIG, wire_dtype="fp32", outer_lr=1.0, outer_momentum=0.0)

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_learner_with_outer_lr_1_and_no_momentum_is_plain_training_bit_for_bit(tmp_path, name):
    module = make_module()
    plain = copy.deepcopy(module)
    optimizer, plain_optimizer = (OPTIMIZERS[name](m.parameters()) for m in (module, plain))
    with running_job(tmp_path, config=PLAIN) as job:
        client = job.client(0, module)
        client.join()
        for inner_step in range(120):
            step(module, optimizer, inner_step)
            step(plain, plain_optimizer, inner_step)
            time.sleep(0.002)
            client.boundary(tokens=16)
            for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
                assert torch.equal(ours, theirs), f"inner step {inner_step}"
        assert client.figures.merges > 10 and client.figures.participation == 1.0
        client.leave("limit")
        client.weights.load_global()
        summary = job.finish()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        # base - (base - local): one rounding of a difference that is not larger than the parameters.
        assert (ours - theirs).abs().max() <= 2**-22 * theirs.abs().max()
    assert summary["tokens"] == summary["tokens_merged"] == 120 * 16


def test_the_last_leaver_holds_the_global_model_bit_for_bit(tmp_path):
    with running_job(tmp_path) as job:
        modules = [make_module(i) for i in range(2)]
        clients = [job.client(i, modules[i]) for i in range(2)]
        first = Background(lambda: whole_life(clients[0], 60))
        second = Background(lambda: whole_life(clients[1], 140))
        assert first.result().role == "member" and second.result().role == "joiner"
        summary = job.finish()
    saved = load_file(tmp_path / "global.safetensors")
    assert set(saved) == {name for name in modules[1].state_dict() if "num_batches" not in name}
    for name, value in saved.items():
        assert torch.equal(modules[1].state_dict()[name], value), name
    assert summary["tokens"] == 200 * 16 and summary["tokens_pending"] == 0 and summary["tokens_discarded"] == 0
    assert all(fragment["pending"] == 0 for fragment in summary["fragments"])


FINAL = -1
"""In place of an inner step: after the leave."""


class _Counting(nn.Module):
    """Every element of every parameter holds the same number; an inner step adds one to it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(300, 300)) for _ in range(8))

    def count(self) -> None:
        with torch.no_grad():
            for part in self.parts:
                for rows in part.split(50):
                    rows.add_(1.0)


def _count_on(client: LearnerClient, module: _Counting, num_steps: int, sleep_s: float) -> dict[int, list[float]]:
    """The value of each fragment after each boundary, which is what a snapshot of that boundary must hold."""

    def values() -> list[float]:
        return [module.get_parameter(f.slices[0].name)[0, 0].item() for f in client.layout.fragments]

    after: dict[int, list[float]] = {}
    client.join()
    for inner_step in range(1, num_steps + 1):
        module.count()
        time.sleep(sleep_s)
        client.boundary(tokens=1)
        after[inner_step] = values()
    client.leave("limit")  # it adopts what has come since, before it takes its last snapshots
    after[FINAL] = values()
    return after


def test_every_contribution_is_the_parameters_at_exactly_one_step_boundary(tmp_path, monkeypatch):
    received: list[tuple[Contribution, torch.Tensor]] = []
    bases: dict[tuple[int, int, int], float] = {}
    tapped = Intake._contribution

    def tap(self: Intake, session: str, envelope: Any, header: Contribution, payload: memoryview) -> None:
        learner_id = self._machine.job.members.of(session).learner_id
        received.append((learner_id, header, torch.frombuffer(bytearray(payload), dtype=torch.float32)))
        tapped(self, session, envelope, header, payload)

    monkeypatch.setattr(Intake, "_contribution", tap)
    config = dataclasses.replace(CONFIG, num_fragments=8, wire_dtype="fp32", merge="mean", norm_gate=None)
    with running_job(tmp_path, config=config) as job:
        modules = [_Counting(), _Counting()]
        clients = [job.client(i, modules[i]) for i in range(2)]
        for learner_id, client in enumerate(clients):
            _tap_encode(client, learner_id, bases)
        runs = [Background(lambda i=i: _count_on(clients[i], modules[i], (250, 200)[i], (0.001, 0.003)[i])) for i in range(2)]
        after = [run.result() for run in runs]
        job.finish()
    regular = [(learner_id, header, d) for learner_id, header, d in received if header.after is None]
    assert len(regular) > 50
    for learner_id, header, d in regular:
        assert torch.equal(d, d[:1].expand_as(d)), f"learner {learner_id} fragment {header.fragment_id} seq {header.seq} is torn"
        local = torch.tensor(after[learner_id][FINAL if header.is_final else header.inner_step][header.fragment_id])
        base = torch.tensor(bases[learner_id, header.fragment_id, header.seq])
        assert d[0] == base - local


def _tap_encode(client: LearnerClient, learner_id: int, bases: dict[tuple[int, int, int], float]) -> None:
    encode = client._store.encode

    def tap(fragment_id: int, seq: int, base: torch.Tensor, local: torch.Tensor, after: int) -> int:
        bases[learner_id, fragment_id, seq] = float(base[0])
        return encode(fragment_id, seq, base, local, after)

    client._store.encode = tap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_swap_to_the_global_model_nests_and_restores_every_bit(tmp_path, dtype):
    module = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2)).to(dtype)
    with running_job(tmp_path) as job:
        client = job.client(0, module)
        client.join()
        for inner_step in range(60):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.full_like(parameter, 0.01 + 0.001 * inner_step))
            time.sleep(0.003)
            client.boundary(tokens=16)
        until(lambda: client.figures.merges > 4)
        before = [p.detach().clone() for p in module.parameters()]
        residuals = [view.residual() for view in client._store.views]
        client.set_paused(True)
        client.weights.swap_in_global()
        published = [p.detach().clone() for p in module.parameters()]
        client.weights.swap_in_global()
        client.weights.swap_out_global()
        for parameter, expected in zip(module.parameters(), published, strict=True):
            assert torch.equal(parameter, expected)
        client.weights.swap_out_global()
        client.set_paused(False)
        assert any(not torch.equal(a, b) for a, b in zip(before, published, strict=True))
        for parameter, expected in zip(module.parameters(), before, strict=True):
            assert torch.equal(parameter, expected)
        for view, expected in zip(client._store.views, residuals, strict=True):
            assert (expected is None) == (dtype == torch.float32)
            assert expected is None or (torch.equal(view.residual(), expected) and bool(expected.abs().max() > 0))
        client.weights.swap_out_global()  # one too many is harmless
        train(client, 3, optimizer=torch.optim.SGD(module.parameters(), lr=0.0)) if dtype == torch.float32 else None
        client.leave("limit")
        job.finish()


def test_a_learner_counts_the_merges_that_the_summary_counts_and_not_those_of_running_statistics(tmp_path):
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        train(client, 80)
        client.leave("limit")
        *parameters, statistics = client._machine.state.fragments
        assert statistics.held.n > 0 and client.figures.merges == sum(fragment.held.n for fragment in parameters)
        assert client.figures.merges <= job.finish()["merges"]
