"""An ordinary Lightning script: a small byte-level transformer on the sources of Python's standard library, on two devices."""

import sysconfig
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CONTEXT = 64


class ByteModel(LightningModule):
    """Predicts the next byte; about 0.14 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.place = nn.Embedding(CONTEXT, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 256)

    def loss(self, window: torch.Tensor) -> torch.Tensor:
        """Mean nats per byte of windows (B, CONTEXT + 1) of int64."""
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=self.device)
        x = self.embed(window[:, :-1]) + self.place(torch.arange(CONTEXT, device=self.device))
        logits = self.head(self.layers(x, mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Train on one batch."""
        loss = self.loss(batch[0])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Validate on one batch."""
        self.log("val_loss", self.loss(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def windows(first: int, last: int) -> TensorDataset:
    """Windows of the standard library's files with index in [first, last)."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[first:last]
    text = b"".join(file.read_bytes() for file in files)
    size = CONTEXT + 1
    return TensorDataset(torch.frombuffer(bytearray(text[: len(text) // size * size]), dtype=torch.uint8).long().view(-1, size))


def main() -> None:
    """Train, and say what came out."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    model = ByteModel()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=1000,
        val_check_interval=500,
        logger=CSVLogger("logs"),
        callbacks=[ModelCheckpoint(monitor="val_loss")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start_s = time.monotonic()
    trainer.fit(model, DataLoader(windows(0, 100), 16, shuffle=True), DataLoader(windows(100, 110), 64))
    if trainer.is_global_zero:
        values = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
        print(f"{trainer.global_step} steps of each device in {time.monotonic() - start_s:.0f} s: {values}")


if __name__ == "__main__":
    main()
