"""Running statistics belong to the parameters that they were measured with: they are merged, and are where the parameters are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import nn

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import FragmentView, buffer_of, plan_layout
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.global_state import MomentumTracker
from lightning_diloco.runtime.learner_store import LearnerStore, Receive
from lightning_diloco.runtime.store import SyncerStore
from tests.strategy.kit import TinyModel, loader, quiet


class Normed(TinyModel):
    """Each learner sees inputs of its own mean (0 or 1), so its running mean tells whose it is."""

    def __init__(self, step_s: float = 0.0) -> None:
        super().__init__(step_s=step_s)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("constant", torch.full((3,), 1 / 3))

    def forward(self, x):
        shift = float(self.trainer.strategy.learner_id) if self.training else 0.0
        return super().forward(self.norm(x + shift))


class SideBySide(Callback):
    """Learners whose steps are at most five apart, however late one of them started, and the highest running mean that each had."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.highest = folder, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.highest = max(self.highest, float(pl_module.norm.running_mean.mean()))
        self._write(trainer, f"step-{trainer.strategy.learner_id}", trainer.global_step)
        other, until_s = self.folder / f"step-{1 - trainer.strategy.learner_id}", time.monotonic() + 60
        while not (other.exists() and int(other.read_text() or 0) >= trainer.global_step - 5):
            assert time.monotonic() < until_s, "the other learner does not come"
            time.sleep(0.001)

    def on_train_end(self, trainer, pl_module):
        self._write(trainer, f"step-{trainer.strategy.learner_id}", 1_000_000)
        self._write(trainer, f"highest-{trainer.strategy.learner_id}", self.highest)

    def _write(self, trainer, name, value):
        part = self.folder / f"{name}.part{trainer.strategy.learner_id}"
        part.write_text(str(value))
        part.rename(self.folder / name)


def layout_of(module: nn.Module):
    return plan_layout(module, num_fragments=2, merge="rda", mean_patterns=(), include_frozen=False)


def test_only_running_statistics_of_floating_point_are_the_last_fragment():
    layout = layout_of(Normed())
    assert [f.kind for f in layout.fragments] == ["parameters", "parameters", "buffers"]
    assert [s.name for s in layout.fragments[-1].slices] == ["norm.running_mean", "norm.running_var"]
    assert {t.name for t in layout.static} == {"norm.num_batches_tracked", "constant"}
    assert layout.num_params == sum(p.numel() for p in Normed().parameters())
    assert layout_of(TinyModel()).fragments[-1].kind == "parameters", "without any there is no such fragment"


@pytest.mark.slow
def test_two_learners_end_with_the_mean_of_their_statistics(tmp_path):
    strategy = DecoupledDiLoCoStrategy(num_fragments=2, sync_interval_steps=3, min_quorum=2, run_dir=tmp_path)
    model = Normed(step_s=0.004)
    options = quiet(strategy=strategy, devices=2, max_steps=120, callbacks=[SideBySide(tmp_path)])
    Trainer(**options).fit(model, loader(1024))
    saved = load_file(tmp_path / "global.safetensors")
    assert torch.equal(model.norm.running_mean, saved["norm.running_mean"]) and "constant" not in saved
    # Learner 0 only has inputs of mean 0: more than noise came from learner 1. The end itself belongs to whoever leaves last.
    assert float((tmp_path / "highest-0").read_text()) > 0.15 and bool((model.norm.running_var > 0).all())
    assert len(strategy.summary["fragments"]) == 2, "accounts are of parameters"


def test_values_are_averaged_by_weight_and_the_norm_of_values_closes_no_gate():
    module = nn.BatchNorm1d(4)
    layout = layout_of(module)
    config = SyncConfig(num_fragments=2, wire_dtype="bf16", outer_lr=0.5, outer_momentum=0.9)
    store, at = SyncerStore(layout, config), len(layout.fragments) - 1
    values = torch.cat([module.running_mean, module.running_var])
    store.found_fragment(at, "values", buffer_of(values), crc32(values))
    store.fold(at, torch.full((8,), 0.1), 1.0)
    store.fold(at, torch.full((8,), 0.7), 2.0)
    closed = store.close(at, 1)
    torch.testing.assert_close(closed.shadow, torch.full((8,), 0.5))
    assert closed.outer_momentum == 0.0 and torch.equal(closed.difference.view(torch.float32), closed.shadow), "exact on the wire"


def test_adoption_keeps_what_was_seen_meanwhile_and_never_leaves_the_two():
    module = nn.BatchNorm1d(2)
    layout = layout_of(module)
    config, at = SyncConfig(num_fragments=2), len(layout.fragments) - 1
    store = LearnerStore(module, layout, config, momentum=MomentumTracker(layout, config, is_on=True))
    base = store.found(at, 0)
    sent = torch.tensor([0.5, 0.5, 4.0, 4.0])
    store.encode(at, 1, base, sent, 0)
    view = FragmentView(module, layout.fragments[at])
    view.copy_from(torch.tensor([0.6, 0.6, 3.6, 3.6]))

    def received(values):
        job = Receive(fragment_id=at, n=1, crc=crc32(values), is_full=False, base=base, with_contribution=1)
        return store.receive(job, buffer_of(values))

    alone = received(sent.clone()).adoption
    view.move_to(alone.published, alone.delta_views)
    assert module.running_mean.tolist() == torch.tensor([0.6, 0.6]).tolist(), "alone: nothing to add"
    small = received(torch.tensor([0.1, 0.9, 0.01, 9.0])).adoption
    view.move_to(small.published, small.delta_views)
    assert module.running_var[0] == 0.01, "3.6 - 3.99 would be no variance"
    torch.testing.assert_close(module.running_mean, torch.tensor([0.2, 0.9]))
    assert received(sent.clone()).momentum is None
