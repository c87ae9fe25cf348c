"""LightningCLI: the strategy by its name and by its class, with the job's options as options of the command line."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from lightning_diloco import DecoupledDiLoCoStrategy, SyncConfig
from tests.strategy.kit import Script, latest, learner_processes, summary_of, wait_until

SCRIPT = """
import lightning_diloco
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

LightningCLI(BoringModel, BoringDataModule)
"""
QUIET = ["accelerator=cpu", "devices=2", "max_steps=24", "logger=false", "enable_checkpointing=false", "enable_progress_bar=false"]
BY_NAME = ["strategy=decoupled_diloco"]
BY_CLASS = ["strategy=lightning_diloco.DecoupledDiLoCoStrategy", "strategy.num_fragments=1", "strategy.sync_interval_steps=4"]


def arguments(strategy: list[str]) -> list[str]:
    return ["fit", *(f"--trainer.{option}" for option in [*QUIET, *strategy])]


def test_a_constructors_signature_names_every_option_of_the_job():
    parameters = inspect.signature(DecoupledDiLoCoStrategy).parameters
    assert {field.name: field.default for field in fields(SyncConfig)}.items() <= {n: p.default for n, p in parameters.items()}.items()
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert DecoupledDiLoCoStrategy(num_fragments=3).sync.num_fragments == 3


@pytest.mark.process
@pytest.mark.parametrize(
    ("strategy", "num_fragments", "kept"),
    [
        (BY_CLASS, 1, "class_path: lightning_diloco.DecoupledDiLoCoStrategy"),
        pytest.param(BY_NAME, 2, "strategy: decoupled_diloco", marks=pytest.mark.slow),
    ],
    ids=["by class", "by name"],
)
def test_lightning_cli_trains_and_keeps_its_configuration(strategy, num_fragments, kept, tmp_path):
    Script(tmp_path, SCRIPT).run(*arguments(strategy))
    summary = summary_of(latest(tmp_path))
    assert summary["status"] == "finished" and summary["config"]["num_fragments"] == num_fragments
    assert len(summary["learners"]) == 2
    assert kept in (tmp_path / "config.yaml").read_text()


SLOW_SCRIPT = """
import time
import lightning_diloco
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)

LightningCLI(Model, BoringDataModule)
"""


@pytest.mark.process
@pytest.mark.slow
def test_a_restarted_learner_does_not_trip_over_the_configuration_that_it_saved(tmp_path):
    script = Script(tmp_path, SLOW_SCRIPT)
    supervisor = script.start(*arguments([*BY_CLASS, "max_steps=200"]))
    try:
        wait_until(lambda: (tmp_path / "config.yaml").exists(), "the configuration is saved", script=script)
        learner_processes(supervisor)[0].kill()
        assert script.wait(120) == 0, script.text()
    finally:
        script.close()
    summary = summary_of(latest(tmp_path))
    assert summary["status"] == "finished" and summary["restarts"]["learners"] == 1


@pytest.mark.slow
@pytest.mark.process
def test_an_option_that_is_none_is_refused_by_its_name(tmp_path):
    script = Script(tmp_path, SCRIPT)
    script.start(*arguments([BY_CLASS[0], "strategy.num_fragments=some"]))
    assert script.wait() == 2
    assert "num_fragments" in script.text() and "Got value: some" in script.text()
