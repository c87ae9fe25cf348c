"""``fit(ckpt_path=...)``: outer momentum and versions go on, and one learner trains as if it had never been stopped (scenario 13)."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import buffer_of, decode_publication, last_step, plan_layout
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.global_state import FoundingState, MomentumTracker, by_name
from lightning_diloco.runtime.store import SyncerStore
from lightning_diloco.strategy.resume import CHECKPOINT_KEY, read_resumed
from tests.strategy.kit import TinyModel, equal, latest, loader, parameters_of, quiet

INLINE = {"launch": "inline", "num_fragments": 2, "sync_interval_steps": 3}
NEUTRAL = {"outer_lr": 1.0, "outer_momentum": 0.0, "wire_dtype": "fp32", "norm_gate": None}


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.global_step] = parameters_of(pl_module)


def fit(folder, ckpt_path=None, *, epochs=4, model=None, callbacks=(), length=64, **options):
    seed_everything(3, verbose=False)
    recorder = Recorder()
    strategy = DecoupledDiLoCoStrategy(**{**INLINE, "run_dir": folder, **options})
    options = quiet(strategy=strategy, devices=1, max_epochs=epochs, callbacks=[*callbacks, recorder], enable_checkpointing=True)
    trainer = Trainer(**options, default_root_dir=folder)
    trainer.fit(model or TinyModel(optimizer="adamw"), loader(length), ckpt_path=ckpt_path)
    return trainer, recorder


def every_epoch(folder) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, every_n_epochs=1, filename="{step}")


def read(path) -> dict:
    return torch.load(path, weights_only=True)


def job_record(run_dir) -> dict:
    return next(e for line in (run_dir / "tape.jsonl").open() if (e := json.loads(line))["event"] == "job")


def test_one_learner_that_goes_on_from_a_checkpoint_equals_one_that_was_never_stopped(tmp_path):
    _, whole = fit(tmp_path / "a", callbacks=[every_epoch(tmp_path)], **NEUTRAL)
    # 32 steps are no multiple of the interval: the file is written while work of both fragments is not merged.
    _, resumed = fit(tmp_path / "b", tmp_path / "step=32.ckpt", **NEUTRAL)
    assert set(resumed.seen) == set(range(33, 65))
    assert all(equal(resumed.seen[step], whole.seen[step]) for step in resumed.seen)


def test_versions_and_momentum_go_on_and_merges_count_from_new(tmp_path):
    fit(tmp_path / "a", callbacks=[every_epoch(tmp_path)])
    entry, last = read(tmp_path / "step=32.ckpt")[CHECKPOINT_KEY], read(tmp_path / "a" / "checkpoints" / "last.ckpt")[CHECKPOINT_KEY]
    exact = load_file(tmp_path / "a" / "outer_momentum.safetensors")
    assert equal(last["momentum"], exact) and all(m.abs().sum() > 0 for m in exact.values()) and "local" not in last
    assert set(entry) == {"versions", "momentum", "local"} and min(entry["versions"].values()) > 5
    trainer, _ = fit(tmp_path / "b", tmp_path / "a" / "checkpoints" / "last.ckpt", epochs=6)
    record = job_record(tmp_path / "b")
    assert sorted(set(last["versions"].values())) == sorted(set(record["founded_n"]))
    end = [json.loads(line) for line in (tmp_path / "b" / "tape.jsonl").open()]
    merges = [e for e in end if e["event"] == "merge"]
    assert trainer.strategy.summary["merges"] == len(merges) > 0
    assert min(e["version"][1] for e in merges) > min(record["founded_n"])
    # The warm-up goes on where it was: v / (v + 10) of a first merge would be 1/11.
    assert min(e["outer_momentum"] for e in merges if e.get("last_share") is None) > 0.3
    assert record["founding_bytes"] == 2 * 4 * sum(p.numel() for p in TinyModel().parameters())


def test_another_number_of_fragments_takes_the_momentum_by_name(tmp_path):
    fit(tmp_path / "a", epochs=2)
    trainer, _ = fit(tmp_path / "b", tmp_path / "a" / "checkpoints" / "last.ckpt", epochs=3, num_fragments=4)
    assert len(job_record(tmp_path / "b")["founded_n"]) == 4 and min(job_record(tmp_path / "b")["founded_n"]) > 0
    assert trainer.strategy.summary["status"] == "finished"


def test_a_checkpoint_of_another_strategy_and_one_with_nonsense_begin_without_momentum(tmp_path, caplog):
    plain = Trainer(**quiet(max_epochs=1))
    plain.fit(TinyModel(optimizer="adamw"), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    trainer, _ = fit(tmp_path / "a", tmp_path / "plain.ckpt", epochs=2)
    assert set(job_record(tmp_path / "a")["founded_n"]) == {0} and trainer.global_step == 32
    checkpoint = read(tmp_path / "plain.ckpt")
    checkpoint[CHECKPOINT_KEY] = {
        "versions": {"layer.weight": -1, "head.bias": "many", "gone": 7},
        "momentum": {"layer.weight": torch.ones(2)},
        "local": 5,
    }
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with caplog.at_level(logging.WARNING):
        fit(tmp_path / "b", tmp_path / "odd.ckpt", epochs=2)
    assert "['local'] is no dict" in caplog.text
    assert set(job_record(tmp_path / "b")["founded_n"]) == {0}
    with caplog.at_level(logging.WARNING):
        assert read_resumed({CHECKPOINT_KEY: [1]}).founding == FoundingState()
    assert "is no dict: the job begins without" in caplog.text


def test_weights_only_checkpoints_carry_nothing_more(tmp_path):
    fit(tmp_path / "a", epochs=1, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, filename="w")])
    assert CHECKPOINT_KEY not in read(tmp_path / "w.ckpt")


@pytest.mark.slow
def test_two_learners_go_on_from_a_checkpoint_of_learner_0(tmp_path):
    def run(name, ckpt_path=None, **options):
        strategy = DecoupledDiLoCoStrategy(num_fragments=2, sync_interval_steps=3, run_dir=tmp_path / name)
        trainer = Trainer(**quiet(strategy=strategy, devices=2, enable_checkpointing=True, default_root_dir=tmp_path, **options))
        trainer.fit(TinyModel(step_s=0.01), loader(128), ckpt_path=ckpt_path)
        return trainer

    run("a", max_epochs=2, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)])
    entry = read(tmp_path / "epoch=1.ckpt")[CHECKPOINT_KEY]
    assert set(entry) == {"versions", "momentum"}, "one learner of two leaves its own weights out"
    trainer = run("b", tmp_path / "epoch=1.ckpt", max_epochs=4)
    assert trainer.current_epoch == 4 and trainer.strategy.summary["status"] == "finished"
    assert sorted(set(job_record(tmp_path / "b")["founded_n"])) == sorted(set(entry["versions"].values()))
    assert latest(tmp_path).exists() is False  # both runs were told their folder


@pytest.mark.parametrize(("wire_dtype", "bound"), [("fp32", 1e-5), ("bf16", 0.02), ("int4", 0.06)])
def test_a_learner_knows_the_momentum_from_the_versions_that_it_receives(wire_dtype, bound):
    config = SyncConfig(num_fragments=1, wire_dtype=wire_dtype, outer_momentum_warmup=5, norm_gate=None)
    layout = plan_layout(torch.nn.Linear(40, 25), num_fragments=1, merge="rda", mean_patterns=(), include_frozen=False)
    store, size = SyncerStore(layout, config), layout.fragments[0].num_params
    founded = torch.randn(size, generator=torch.Generator().manual_seed(1))
    store.found_fragment(0, "values", buffer_of(founded), crc32(founded))
    early, late = MomentumTracker(layout, config, is_on=True), MomentumTracker(layout, config, is_on=True)
    published, generator = founded, torch.Generator().manual_seed(2)
    for n in range(1, 40):
        store.fold(0, 1e-3 * torch.randn(size, generator=generator) + 1e-3, 1.0)
        closed = store.close(0, n)
        after = decode_publication(buffer_of(closed.difference), published, size, wire_dtype)
        for tracker in (early, late) if n > 20 else (early,):
            out = torch.empty(size)
            tracker.follow(0, slice(None), published, after, tracker.momenta(0, n - 1, n), out=out)
            tracker.set(0, out)
        published = after
    exact = store.state(0).momentum
    for tracker in (early, late):  # who came in the middle knows it as well after 19 versions
        assert float((tracker.buffers[0] - exact).norm() / exact.norm()) < bound
    assert float(exact.norm()) > 5e-3 * size**0.5, "momentum of one direction adds up"
    assert MomentumTracker(layout, config, is_on=False).momenta(0, 0, 1) == []


class SavesAtTheEnd(Callback):
    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(trainer.default_root_dir + "/end.ckpt")


def test_a_checkpoint_of_the_end_has_the_momentum_that_the_last_merges_left_as_it_was(tmp_path):
    """A learner that has left does not count the last merges, whose steps have no momentum."""
    # 33 steps: of both fragments one or two steps are left for a last merge.
    options = {"wire_dtype": "fp32", "sync_interval_steps": 8}
    fit(tmp_path / "a", callbacks=[SavesAtTheEnd()], epochs=3, length=44, **options)
    merges = [e for line in (tmp_path / "a" / "tape.jsonl").open() if (e := json.loads(line))["event"] == "merge"]
    last = [e for e in merges if e.get("last_share") is not None]
    assert {e["fragment_id"] for e in last} == {0, 1}
    assert all(e["outer_momentum"] == 0 and 0 < e["last_share"] <= 1 for e in last)
    known = read(tmp_path / "a" / "end.ckpt")[CHECKPOINT_KEY]["momentum"]
    for name, exact in load_file(tmp_path / "a" / "outer_momentum.safetensors").items():
        assert float((known[name] - exact).norm() / exact.norm()) < 1e-3


def test_a_last_merge_takes_the_last_step_and_leaves_the_momentum(tmp_path):
    config = SyncConfig(num_fragments=1, wire_dtype="fp32", norm_gate=None)
    layout = plan_layout(torch.nn.Linear(4, 2), num_fragments=1, merge="rda", mean_patterns=(), include_frozen=False)
    store = SyncerStore(layout, config)
    founded = torch.linspace(-1.0, 1.0, 10)
    store.found_fragment(0, "values", buffer_of(founded), crc32(founded))
    for n, scale in enumerate((1.0, 0.5), start=1):
        store.fold(0, scale * torch.linspace(0.1, 1.0, 10), 1.0)
        store.close(0, n)
    before, d = store.state(0), torch.linspace(0.3, 0.0, 10)
    store.fold(0, d, 1.0)
    closed = store.close(0, 3, last_share=0.25)
    expected = last_step(before, d, lr=config.outer_lr, share=0.25)
    assert torch.equal(closed.shadow, expected.theta)
    assert not torch.allclose(expected.theta, last_step(before, d, lr=config.outer_lr, share=1.0).theta)
    assert torch.equal(store.state(0).momentum, before.momentum)
    assert store.state(0).ahead == 0.0 and closed.outer_momentum == 0.0


def test_founding_state_by_name_survives_another_cut():
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    plans = [plan_layout(module, num_fragments=p, merge="rda", mean_patterns=(), include_frozen=False) for p in (2, 5)]
    flats = tuple(torch.randn(f.num_params) for f in plans[0].fragments)
    named = by_name(plans[0], flats)
    other = FoundingState(momentum=named).buffers(plans[1])
    again = FoundingState(momentum=by_name(plans[1], other)).buffers(plans[0])
    assert all(torch.equal(a, b) for a, b in zip(flats, again, strict=True))
    assert FoundingState(momentum={"0.weight": torch.ones(3)}).buffers(plans[0])[0].sum() == 0, "of another size: left out"
    assert FoundingState().buffers(plans[0]) == () and FoundingState().numbers(plans[0]) == (0, 0)
