"""A numbered data set, and a model that writes down which samples each of its batches had; learners import this file by its name."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tests.strategy.kit import TinyModel

__all__ = ["Numbered", "Recorder", "numbered", "recorded", "times_of"]


class Numbered(Dataset):
    """Sample i is (some numbers, i)."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((8,), index / self.length), index


def numbered(length: int, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(Numbered(length), batch_size=batch_size, **options)


class Recorder(TinyModel):
    """Writes a line for each trained batch, and one for each validation, to a file of its learner; all begin together.

    Args:
        folder: where the files go.
        count: learners that wait for each other before the first batch.
        slow: seconds of a step, per learner.
    """

    def __init__(self, folder: Path, count: int = 1, slow: tuple[float, ...] = (0.0,)) -> None:
        super().__init__()
        self.folder, self.count, self.slow = folder, count, slow
        self.numbers: list[int] = []

    @property
    def learner_id(self) -> int:
        return self.trainer.global_rank

    def write(self, **line: Any) -> None:
        with (self.folder / f"learner_{self.learner_id}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_start(self) -> None:
        (self.folder / f"here_{self.learner_id}").touch()
        end_s = time.monotonic() + 90
        while len(list(self.folder.glob("here_*"))) < self.count and time.monotonic() < end_s:
            time.sleep(0.02)

    def training_step(self, batch, batch_idx):
        self.step_s = self.slow[min(self.learner_id, len(self.slow) - 1)]
        self.numbers = batch[1].tolist()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self.write(epoch=self.trainer.current_epoch, samples=self.numbers)

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self.write(validation=self.trainer.current_epoch)


def recorded(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of each learner."""
    files = sorted(folder.glob("learner_*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def times_of(folder: Path) -> Counter[int]:
    """How often each sample was trained, over all learners and epochs."""
    return Counter(i for lines in recorded(folder) for line in lines for i in line.get("samples", ()))
