"""Copies that are made later than the training thread asks for them: a stand-in for a GPU's streams; on a GPU, the real ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from lightning_diloco.outer import FragmentView, plan_layout
from lightning_diloco.runtime.device_copies import DeviceCopies
from tests.runtime.job_helpers import CONFIG, make_module, running_job, step, until

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class LateCopies:
    """Host memory holds no value before it was waited for, and what is brought lies elsewhere."""

    def __init__(self) -> None:
        self.num_waits = self.num_brought = 0

    def take(self, view, host):
        aside = torch.empty(view.num_params)
        view.copy_to(aside)
        host.fill_(float("nan"))

        def wait() -> None:
            host.copy_(aside)
            self.num_waits += 1

        return wait

    def bring(self, host):
        self.num_brought += 1
        return host.clone()

    def use(self, brought) -> None:
        assert brought.isfinite().all()


def train_and_leave(job, clients, num_steps: int) -> dict:
    for client in clients:
        client.join()
    optimizers = [torch.optim.SGD(client._module.parameters(), lr=0.02) for client in clients]
    for inner_step in range(num_steps):
        for client, optimizer in zip(clients, optimizers, strict=True):
            step(client._module, optimizer, inner_step)
            client.boundary(tokens=16)
        until(lambda: all(client._loop.backlog == 0 for client in clients))
    for client in clients:
        client.leave("limit")
    clients[-1].weights.load_global()
    return job.finish()


def is_the_model_of(run_dir, module: torch.nn.Module) -> bool:
    """Whether these are the parameters that the job has ended with."""
    saved = load_file(run_dir / "global.safetensors")
    return all(torch.equal(saved[name], value.detach().cpu()) for name, value in module.named_parameters())


@pytest.mark.parametrize("adopt", ["rebase", "overwrite"])
def test_a_snapshot_is_encoded_when_it_is_there_and_what_is_brought_is_used(tmp_path, adopt):
    with running_job(tmp_path, config=dataclasses.replace(CONFIG, adopt=adopt)) as job:
        clients = [job.client(i, make_module(0)) for i in range(2)]
        late = LateCopies()
        clients[1]._store._copies = late
        summary = train_and_leave(job, clients, 40)
    assert is_the_model_of(tmp_path, clients[1]._module)
    assert late.num_waits > 10 and late.num_brought > 10
    # A snapshot of which nobody has waited holds NaN, and would have been refused.
    reasons = {reason for reason, tokens in summary["discarded_by_reason"].items() if tokens}
    assert reasons == ({"overwritten"} if adopt == "overwrite" else set())


def test_without_a_gpu_values_are_copied_at_once_and_stay_where_they_are():
    module = make_module()
    layout = plan_layout(module, num_fragments=2, merge="rda", mean_patterns=(), include_frozen=False)
    views = [FragmentView(module, fragment) for fragment in layout.fragments]
    copies, host = DeviceCopies.of(views), torch.empty(views[0].num_params)
    assert copies.outwards is None and copies.take(views[0], host) is None
    expected = torch.empty_like(host)
    views[0].copy_to(expected)
    assert torch.equal(host, expected) and copies.bring(host) is host


@needs_gpu
def test_a_gpu_and_a_host_in_one_job_end_with_the_same_model_and_no_boundary_waits_for_the_gpu(tmp_path):
    with running_job(tmp_path) as job:
        clients = [job.client(0, make_module(0)), job.client(1, make_module(0).cuda(), device="cuda:0")]
        boundary = clients[1].boundary

        def strict(**options) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                boundary(**options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        clients[1].boundary = strict
        summary = train_and_leave(job, clients, 60)
    assert is_the_model_of(tmp_path, clients[1]._module)
    assert summary["tokens_discarded"] == 0 and all(learner["rounds_merged"] > 0 for learner in summary["learners"])
