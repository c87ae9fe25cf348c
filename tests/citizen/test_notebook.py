"""A notebook with a real kernel: classes of its cells train on two learners, and inline."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

MISSING = [name for name in ("nbclient", "ipykernel") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.process,
    pytest.mark.extras,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: make extras"),
]
ROOT = Path(__file__).resolve().parent.parent.parent
DEFINE = """
import torch, lightning_diloco
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

torch.manual_seed(0)
x = torch.randn(512, 4)
true = torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
data = DataLoader(TensorDataset(x, x @ true), batch_size=8, shuffle=True)
options = dict(accelerator="cpu", max_steps=400, logger=False, enable_checkpointing=False, enable_model_summary=False)
"""
FIT = """
line = Line()
trainer = Trainer(devices={devices}, strategy={strategy}, **options)
trainer.fit(line, data)
print((line.net.weight - true.T).abs().max().item(), trainer.strategy.summary["status"])
"""
INTERRUPTED = """
class Interrupting(Line):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 20:
            raise KeyboardInterrupt
try:
    Trainer(devices=1, strategy=lightning_diloco.DecoupledDiLoCoStrategy(launch="inline"), **options).fit(Interrupting(), data)
except BaseException as error:
    print("ended with", type(error).__name__)
"""


def test_classes_of_a_notebook_train_on_two_learners_and_inline(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    cells = [
        DEFINE,
        FIT.format(devices=2, strategy="'decoupled_diloco'"),
        FIT.format(devices=1, strategy="lightning_diloco.DecoupledDiLoCoStrategy(launch='inline')"),
        INTERRUPTED,
        "print('still alive', line.net.weight.shape)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    client = NotebookClient(notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = ["".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout") for cell in notebook.cells]
    for line in (printed[1], printed[2]):
        error, status = line.split()
        # Untrained it is above 2.5; how far two learners get depends on how many merges have both of them.
        assert float(error) < 2.0 and status == "finished"
    assert "ended with SystemExit" in printed[3] and "still alive" in printed[4]
    assert len(list((tmp_path / "outputs").glob("20*"))) == 3
