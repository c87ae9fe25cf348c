"""A fit with `tape_payloads=True`, and one that goes on from its checkpoint with momentum and versions, are replayed to their bytes."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.cli.main import main
from tests.strategy.kit import TinyModel, loader, quiet


@pytest.mark.parametrize("wire_dtype", ["bf16", "fp32", "int4"])
def test_a_fit_and_the_one_that_goes_on_from_it_are_replayed(wire_dtype, tmp_path, capsys):
    told = []
    for name, ckpt_path, epochs in (("a", None, 2), ("b", tmp_path / "a" / "checkpoints" / "last.ckpt", 4)):
        strategy = DecoupledDiLoCoStrategy(
            launch="inline", num_fragments=2, sync_interval_steps=3, run_dir=tmp_path / name, tape_payloads=True, wire_dtype=wire_dtype
        )
        trainer = Trainer(
            **{**quiet(strategy=strategy, devices=1, max_epochs=epochs), "enable_checkpointing": True}, default_root_dir=tmp_path
        )
        trainer.fit(TinyModel(), loader(), ckpt_path=ckpt_path)
        capsys.readouterr()
        assert main(["replay", str(tmp_path / name), "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
        assert told[-1]["global_sha256"] == strategy.summary["global_sha256"] and told[-1]["merges"] == strategy.summary["merges"] > 4
    first, second = ([(f["founded_n"], f["version"][1]) for f in run["fragments"]] for run in told)
    assert [n for n, _ in first] == [0, 0] and [n for n, _ in second] == [version for _, version in first], "versions go on"
    assert all(f["merges"] == f["version"][1] - f["founded_n"] for f in told[1]["fragments"])
