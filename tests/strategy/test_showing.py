"""The job's figures where a user looks: in the rows of the loggers and in the progress bar, counts as whole numbers."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from lightning_diloco import LineProgress
from tests.strategy.kit import TinyModel
from tests.strategy.test_inline import fit


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_metrics_reach_the_logger_under_our_prefix(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path / "csv")
    trainer = fit(TinyModel(step_s=0.005), max_steps=20, logger=logger, log_every_n_steps=5)
    text = (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert {"diloco/merges", "diloco/staleness", "diloco/tokens", "train_loss"} <= set(text.splitlines()[0].split(","))
    rows = [dict(zip(text.split("\n")[0].split(","), line.split(","), strict=True)) for line in text.splitlines()[1:]]
    assert all(row["diloco/merges"].isdecimal() for row in rows if row["diloco/merges"])
    assert "merges" not in trainer.callback_metrics and "merges" not in trainer.progress_bar_metrics


def test_the_progress_bar_shows_our_figures_and_is_given_back(tmp_path):
    class Bar(LineProgress):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.shown = self.get_metrics(trainer, pl_module)

    bar = Bar()
    fit(TinyModel(step_s=0.005), max_steps=20, callbacks=[bar], enable_progress_bar=True)
    assert {"merges", "staleness", "participation"} <= bar.shown.keys() and type(bar.shown["merges"]) is int
    assert "get_metrics" not in vars(bar)


def test_the_bar_of_rich_shows_a_count_without_decimals(tmp_path):
    class Bar(RichProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.shown = self.get_metrics(trainer, pl_module)

    bar = Bar()
    fit(TinyModel(step_s=0.005), max_steps=20, callbacks=[bar], enable_progress_bar=True)
    assert bar.shown["merges"].isdecimal(), "a number would be shown as 51.000"
