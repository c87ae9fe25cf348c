"""The inner optimizer state of a learner: saved a fragment at a time, put back where its optimizer looks for it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_diloco.outer import plan_layout
from lightning_diloco.protocol.identity import Version
from lightning_diloco.runtime.client_options import JoinInfo
from lightning_diloco.runtime.peer_state import PeerStates
from lightning_diloco.strategy.rejoin import InnerStateSaver, _placed, restore_inner_state
from tests.strategy.kit import PATIENCE_S

INFO = JoinInfo(learner_id=1, incarnation=3, role="joiner", job_step=40, lineage="ours")


class Learner:
    """A module with its optimizer, and the little of a client that saving asks for."""

    def __init__(self, make, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.optimizer = make(self.module.parameters())
        self.layout = plan_layout(self.module, num_fragments=4, merge="rda", mean_patterns=(), include_frozen=False)
        self.weights = SimpleNamespace(parameters_of=self._parameters_of)
        self.boundaries: list[int] = []
        self.peers = PeerStates(self.layout, send=print, send_payload=lambda *_: 0, wake=lambda: None)

    def _parameters_of(self, fragment_id: int):
        return [(part.name, self.module.get_parameter(part.name)) for part in self.layout.fragments[fragment_id].slices]

    def version(self, fragment_id: int) -> Version:
        self.boundaries.append(fragment_id)
        return Version(0, 10 + fragment_id)

    def step(self) -> None:
        def closure():
            self.optimizer.zero_grad()
            loss = self.module(torch.randn(4, 6)).pow(2).mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)

    def train(self, steps: int, saver: InnerStateSaver | None = None) -> None:
        for _ in range(steps):
            self.step()
            if saver is not None:
                save(saver)


def save(saver: InnerStateSaver) -> None:
    """A boundary; what it begins to write is on the disk afterwards."""
    saver.boundary()
    end_s = time.monotonic() + PATIENCE_S
    while saver._files.is_busy and time.monotonic() < end_s:
        time.sleep(0.001)


def states(learner: Learner) -> list[dict]:
    return [dict(learner.optimizer.state.get(p, {})) for p in learner.module.parameters()]


MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "nadam": lambda p: torch.optim.NAdam(p),
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_later_life_goes_on_with_the_same_state_and_takes_the_same_step(tmp_path, name):
    first = Learner(MAKERS[name])
    saver = InnerStateSaver(first, [first.optimizer], tmp_path, INFO, every_steps=4)
    first.train(12, saver)
    # The state of one moment, so that it can be compared: all four fragments are saved with no step between.
    for _ in range(4):
        save(saver)
    saver.close(is_done=False)
    second = Learner(MAKERS[name])
    second.module.load_state_dict(first.module.state_dict())
    assert len(restore_inner_state(second, [second.optimizer], tmp_path, INFO)) == 4
    for ours, theirs in zip(states(first), states(second), strict=True):
        assert ours.keys() == theirs.keys() and ours
        for key, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key
    torch.manual_seed(5)
    first.step()
    torch.manual_seed(5)
    second.step()
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True))


def test_each_fragment_is_saved_once_in_so_many_steps_and_one_at_a_boundary(tmp_path):
    learner = Learner(MAKERS["adamw"])
    saver = InnerStateSaver(learner, [learner.optimizer], tmp_path, INFO, every_steps=10)
    seen = []
    for _ in range(20):
        learner.train(1, saver)
        seen.append(list(learner.boundaries))
        learner.boundaries.clear()
    saver.close(is_done=False)
    assert all(len(at_once) <= 1 for at_once in seen)
    assert sorted(i for at_once in seen[:10] for i in at_once) == [0, 1, 2, 3] == sorted(i for at_once in seen[10:] for i in at_once)


def test_a_slow_disk_makes_the_checkpoints_older_and_no_step_longer(tmp_path):
    learner = Learner(MAKERS["adamw"])
    saver = InnerStateSaver(learner, [learner.optimizer], tmp_path, INFO, every_steps=4)
    saver._files.is_busy = True
    for _ in range(20):
        learner.step()
        saver.boundary()
    assert learner.boundaries == [] and not list(tmp_path.rglob("*.safetensors"))
    saver._files.is_busy = False
    learner.train(4, saver)
    saver.close(is_done=False)
    assert sorted(learner.boundaries) == [0, 1, 2, 3] and len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_an_optimizer_whose_state_cannot_be_saved_in_parts_is_told_of_once(tmp_path, caplog):
    learner = Learner(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2))
    saver = InnerStateSaver(learner, [learner.optimizer], tmp_path, INFO, every_steps=4)
    learner.train(8, saver)
    saver.close(is_done=False)
    assert len(caplog.records) == 1 and "comes back with a fresh inner optimizer" in caplog.text
    fresh = Learner(lambda p: torch.optim.LBFGS(p, lr=0.1))
    assert restore_inner_state(fresh, [fresh.optimizer], tmp_path, INFO) == {} and states(fresh) == [{}, {}, {}, {}]


class ScheduleFree(torch.optim.Optimizer):
    """Keeps a second copy of the parameters, as such optimizers do."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.data.lerp_(z, 0.1)
        return loss


def test_copies_of_parameters_that_an_optimizer_keeps_do_not_come_back(tmp_path, caplog):
    learner = Learner(ScheduleFree)
    saver = InnerStateSaver(learner, [learner.optimizer], tmp_path, INFO, every_steps=4)
    learner.train(8, saver)
    saver.close(is_done=False)
    assert len(caplog.records) == 1 and "ScheduleFree: rejoin checkpoints hold the state of torch's optimizers only" in caplog.text
    assert learner.optimizer.state and not list(tmp_path.rglob("*.safetensors"))


def test_moments_of_a_parameter_without_dimensions_are_no_step_counts():
    parameter = torch.nn.Parameter(torch.ones([], device="meta"))
    placed = {key: _placed(key, torch.zeros([]), parameter, {}).device.type for key in ("step", "exp_avg")}
    assert placed == {"step": "cpu", "exp_avg": "meta"}
    assert _placed("step", torch.zeros([]), parameter, {"capturable": True}).device.type == "meta"


def test_a_state_with_a_nan_does_not_come_back(tmp_path):
    learner = Learner(MAKERS["adamw"])
    saver = InnerStateSaver(learner, [learner.optimizer], tmp_path, INFO, every_steps=4)
    learner.train(3)
    for parameter in learner.module.parameters():
        learner.optimizer.state[parameter]["exp_avg"].view(-1)[0] = float("nan")
    for _ in range(8):
        save(saver)
    saver.close(is_done=False)
    second = Learner(MAKERS["adamw"])
    assert len(restore_inner_state(second, [second.optimizer], tmp_path, INFO)) == 4
    for state in states(second):
        assert not state["exp_avg"].any() and state["exp_avg_sq"].any() and int(state["step"]) == 3


def test_another_model_takes_nothing_that_it_has_no_place_for(tmp_path):
    learner = Learner(MAKERS["adamw"])
    saver = InnerStateSaver(learner, [learner.optimizer], tmp_path, INFO, every_steps=4)
    learner.train(8, saver)
    saver.close(is_done=False)
    frozen = Learner(MAKERS["adamw"])
    frozen.optimizer = torch.optim.AdamW([frozen.module[0].weight])
    restore_inner_state(frozen, [frozen.optimizer], tmp_path, INFO)
    assert [bool(state) for state in states(frozen)] == [True, False, False, False]
