"""Trainers on a GPU; without one these tests are skipped, and say so."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from tests.strategy.kit import ROOT, Script, TinyModel, latest, loader, quiet, summary_of

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LEARNER = """
import sys
from lightning.pytorch import Trainer
from lightning_diloco import DecoupledDiLoCoStrategy
from tests.strategy.kit import TinyModel, loader, quiet

accelerator, endpoint, learner_id = sys.argv[1:]
strategy = DecoupledDiLoCoStrategy(
    syncer=endpoint, learner_id=int(learner_id), num_learners=2, num_fragments=2, sync_interval_steps=8, batch_sizing="auto"
)
trainer = Trainer(**quiet(accelerator=accelerator, devices=1, max_steps=400, strategy=strategy))
trainer.fit(TinyModel(step_s=0.01, optimizer="adamw"), loader(65536))
"""


def devices_of(run_dir) -> dict[int, str]:
    """What the learners have said at the join, from the tape."""
    lines = [json.loads(line) for line in (run_dir / "tape.jsonl").read_text().splitlines()]
    return {line["learner_id"]: line["device"] for line in lines if line["event"] == "join"}


def test_a_learner_on_a_gpu_and_one_on_the_host_train_one_model(tmp_path):
    command = [sys.executable, "-m", "lightning_diloco", "syncer", "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as syncer:
        try:
            endpoint = next(found.group() for line in syncer.stdout if (found := re.search(r"tcp://[\d.:]+", line)))
            scripts = []
            for learner_id, accelerator in enumerate(("gpu", "cpu")):
                folder = tmp_path / accelerator
                folder.mkdir()
                scripts.append(Script(folder, LEARNER))
                scripts[-1].start(accelerator, endpoint, str(learner_id))
            assert [script.wait(200) for script in scripts] == [0, 0], [script.text() for script in scripts]
            assert syncer.wait(60) == 0
        finally:
            syncer.kill()
    summary = summary_of(tmp_path / "run")
    assert devices_of(tmp_path / "run") == {0: "cuda:0", 1: "cpu"}
    assert all(learner["rounds_merged"] > 0 for learner in summary["learners"]) and summary["tokens_discarded"] == 0


def test_a_job_of_all_gpus_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = torch.cuda.device_count()
    strategy = DecoupledDiLoCoStrategy(num_fragments=2, sync_interval_steps=8)
    trainer = Trainer(**quiet(accelerator="gpu", devices=count, precision="bf16-mixed", max_steps=200, strategy=strategy))
    trainer.fit(TinyModel(step_s=0.01), loader(8192), loader(8))
    assert devices_of(latest(tmp_path)) == {i: f"cuda:{i}" for i in range(count)}
    assert strategy.summary["status"] == "finished" and strategy.summary["tokens_pending"] == 0
