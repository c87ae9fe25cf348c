"""Models, data and helpers of the strategy's tests. Learner processes import this file by its name, test files travel by value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
"""For what must happen, on a machine that other tests load too; what must happen *fast* has its own bound."""


class TinyModel(pl.LightningModule):
    """A linear model with a loss that falls; each step may sleep, so that a run has a length."""

    def __init__(self, step_s: float = 0.0, optimizer: str = "sgd") -> None:
        super().__init__()
        self.step_s = step_s
        self.optimizer_name = optimizer
        self.layer = nn.Linear(8, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)))

    def training_step(self, batch, batch_idx):
        time.sleep(self.step_s)
        loss = self(batch[0]).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).pow(2).mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(batch[0]).pow(2).mean())

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        if self.optimizer_name == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loader(length: int = 64, batch_size: int = 4, seed: int = 0, **kwargs) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(torch.randn(length, 8, generator=generator)), batch_size=batch_size, **kwargs)


def quiet(**kwargs) -> dict:
    """Arguments of a Trainer that writes and shows nothing, unless told otherwise."""
    return {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **kwargs,
    }


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def global_parameters(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / "global.safetensors")


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def latest(folder: Path) -> Path:
    return (folder / "outputs" / "latest").resolve()


class Script:
    """A script in a folder of its own, run by a new interpreter as a user would."""

    def __init__(self, folder: Path, source: str) -> None:
        self.folder = folder
        self.path = folder / "script.py"
        self.path.write_text(source)
        self.output = folder / "output.txt"
        self.process: subprocess.Popen | None = None

    def start(self, *args: str) -> psutil.Process:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.output.open("wb") as file:
            command = [sys.executable, str(self.path), *args]
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=file, stderr=file)
        return psutil.Process(self.process.pid)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    def run(self, *args: str) -> str:
        """Run it to its end; fails with its output if it fails."""
        self.start(*args)
        code = self.wait()
        assert code == 0, self.text()
        return self.text()

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def wait_until(condition, what: str, timeout_s: float = PATIENCE_S, script: Script | None = None) -> None:
    """Wait for something that must happen; says what did not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if script is not None and script.process is not None and script.process.poll() is not None:
            raise AssertionError(f"the script ended before {what}:\n{script.text()}")
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}" + ("" if script is None else f"\n{script.text()}")
        time.sleep(0.02)


def learner_processes(process: psutil.Process) -> list[psutil.Process]:
    """The learner processes below a supervisor."""
    found = []
    for child in process.children():
        try:
            if "lightning_diloco.strategy.worker" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def family(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
