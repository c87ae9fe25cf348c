"""Text for `gpt_text`: Python's own standard library, or the user's text, as windows of bytes.

What is held out for validation:

* the standard library and a folder: whole files, chosen by a hash of their path inside the folder, about one in twenty. A
  file's part does not depend on the others, on the machine or on the order in which the folder is listed;
* one file (and a folder with one text file): its last twentieth.

The corpus is one uint8 tensor a part. A training sample is the window that starts at a multiple of a quarter of the context, so the
ordinary ``DataLoader(shuffle=True)`` draws them by a permutation, and Lightning shards it as it does any other. Validation
windows do not overlap, are spread evenly over all that is held out, and are the same in every run and learner.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_diloco.config import need_int
from lightning_diloco.errors import ConfigurationError
from recipes.quiet import quiet

__all__ = ["Corpus", "TextData", "Windows", "is_held_out", "load_corpus", "validation_starts"]

HELD_OUT_OF = 20
"""One file in so many (or the last part of so many of one file) is held out."""

SKIPPED_FOLDERS = frozenset(
    (
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "lib2to3",
        "idlelib",
        "turtledemo",
        "encodings",
        "pydoc_data",
    )
)
"""Of the standard library: not part of it, or tables and test inputs rather than programs."""


class Corpus(NamedTuple):
    """Two parts of one text, each a uint8 tensor of one dimension."""

    train: Tensor
    val: Tensor


class Windows(Dataset[Tensor]):
    """Windows of `length` bytes of a text, one for each start.

    Args:
        text: uint8, one dimension.
        starts: int64, one dimension, each at most ``len(text) - length``.
        length: bytes in a window (context + 1: the last one is only predicted).
    """

    def __init__(self, text: Tensor, starts: Tensor, length: int) -> None:
        self.text = text
        self.starts = starts
        self.length = length

    def __len__(self) -> int:
        """How many windows there are."""
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        """The window of a start: (length,), uint8, a view of the text."""
        start = int(self.starts[index])
        return self.text[start : start + self.length]


class TextData(LightningDataModule):
    """Loads the text when a process needs it, so that an unused one pickles to a few hundred bytes.

    Args:
        path: a text file or a folder of text files; None: the standard library of the running Python.
        context: bytes that the model sees; windows hold one more.
        batch_size: windows in a training batch of one learner.
        val_bytes: at most so many bytes are predicted in one validation.
        val_batch_size: windows in a validation batch.
        num_workers: of the training loader. 0 is right for a text in memory: a batch takes a tenth of a millisecond.

    Raises:
        ConfigurationError: the path does not exist or is empty, or a number is wrong.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        context: int = 64,
        batch_size: int = 16,
        val_bytes: int = 49_152,
        val_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"context": context, "batch_size": batch_size, "val_bytes": val_bytes, "val_batch_size": val_batch_size}
        for name, size in sizes.items():
            need_int(f"data.{name}", size, 1)
        need_int("data.num_workers", num_workers, 0)
        # Absolute, because a learner's working directory may be another one.
        self.path = None if path is None else os.path.abspath(path)
        self.context = context
        self.batch_size = batch_size
        self.val_bytes = val_bytes
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.corpus: Corpus | None = None
        if self.path is not None:
            check_path(self.path)

    def setup(self, stage: str | None = None) -> None:
        """Load the text, once in a process.

        Raises:
            ConfigurationError: there is too little text for one window in each part.
        """
        quiet()
        if self.corpus is None:
            self.corpus = load_corpus(self.path, min_bytes=self.context + 1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled windows; a last, smaller batch is left out unless it is the only one."""
        windows = self.train_windows()
        return DataLoader(
            windows,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=len(windows) > 2 * self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The fixed validation windows, in order."""
        return DataLoader(self.val_windows(), batch_size=self.val_batch_size)

    def train_windows(self) -> Windows:
        """Every window of the training part that starts at a multiple of a quarter of the context."""
        text = self._loaded().train
        last = len(text) - self.context - 1
        return Windows(text, torch.arange(0, last + 1, max(1, self.context // 4)), self.context + 1)

    def val_windows(self) -> Windows:
        """Windows of the held-out part that do not overlap, evenly spread."""
        text = self._loaded().val
        starts = validation_starts(len(text), self.context, self.val_bytes)
        return Windows(text, starts, self.context + 1)

    def __getstate__(self) -> dict[str, Any]:
        """Without the text: each process loads its own."""
        return {**self.__dict__, "corpus": None}

    def _loaded(self) -> Corpus:
        self.setup()
        assert self.corpus is not None
        return self.corpus


def validation_starts(num_bytes: int, context: int, val_bytes: int) -> Tensor:
    """Where validation windows start: as many as fit, at most ``val_bytes // context``, evenly spread; int64.

    A window's last byte is only predicted, so it may be the first one of the next window.
    """
    fitting = (num_bytes - 1) // context
    count = max(1, min(fitting, val_bytes // context))
    return torch.arange(count) * (num_bytes - 1 - context) // max(1, count - 1)


def is_held_out(relative_path: str) -> bool:
    """Whether a file is for validation: its path's hash decides, with "/" between the parts on every system."""
    digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_OF == 0


def check_path(path: str) -> None:
    """Find out at once, without reading a text, whether there can be one.

    Raises:
        ConfigurationError: nothing is there, or it is empty.
    """
    remedy = "name a text file or a folder of text files, or leave data.path out to train on Python's standard library."
    if not os.path.exists(path):
        raise ConfigurationError(f"data.path={path!r}: there is no such file or folder; {remedy}")
    if os.path.isdir(path):
        if next(text_files(Path(path)), None) is None:
            raise ConfigurationError(f"data.path={path!r}: the folder has no text file that is not empty; {remedy}")
    elif os.path.getsize(path) == 0:
        raise ConfigurationError(f"data.path={path!r}: the file is empty; {remedy}")


def load_corpus(path: str | None, *, min_bytes: int) -> Corpus:
    """Read a text and hold a part of it out.

    Args:
        path: a file, a folder, or None for the standard library.
        min_bytes: each part must hold so many.

    Raises:
        ConfigurationError: a part is shorter.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        corpus = _split_files(root, list(library_files(root)))
    elif os.path.isdir(path):
        corpus = _split_files(Path(path), list(text_files(Path(path))))
    else:
        corpus = _split_tail(Path(path).read_bytes())
    for part, text in zip(Corpus._fields, corpus, strict=True):
        if len(text) < min_bytes:
            raise ConfigurationError(
                f"data.path={path!r}: the part for {part} has {len(text)} bytes, and one window needs {min_bytes}; "
                f"give at least {HELD_OUT_OF * min_bytes} bytes of text."
            )
    return corpus


def library_files(root: Path) -> Iterator[Path]:
    """Python sources of the standard library, sorted by path, without tests, tables and what was installed beside it."""
    return (p for p in _walk(root, SKIPPED_FOLDERS) if p.suffix == ".py" and p.stat().st_size > 0)


def text_files(root: Path) -> Iterator[Path]:
    """Files of a folder that look like text, sorted by path: not hidden, not empty, no zero byte in the first 8 KiB."""
    for path in _walk(root, frozenset()):
        with path.open("rb") as file:
            head = file.read(8192)
        if head and b"\0" not in head:
            yield path


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    """Ordinary files below a folder in sorted order; hidden ones are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(n for n in subfolders if n not in skipped and not n.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _split_files(root: Path, paths: list[Path]) -> Corpus:
    """Whole files to either part; if the hash holds out none (or all) of a few files, the last one is held out."""
    if len(paths) == 1:
        return _split_tail(paths[0].read_bytes())
    held_out = [is_held_out(p.relative_to(root).as_posix()) for p in paths]
    if len(set(held_out)) == 1:
        held_out = [False] * (len(paths) - 1) + [True]
    train = b"\n".join(p.read_bytes() for p, out in zip(paths, held_out, strict=True) if not out)
    val = b"\n".join(p.read_bytes() for p, out in zip(paths, held_out, strict=True) if out)
    return Corpus(_as_tensor(train), _as_tensor(val))


def _split_tail(text: bytes) -> Corpus:
    cut = len(text) - len(text) // HELD_OUT_OF
    return Corpus(_as_tensor(text[:cut]), _as_tensor(text[cut:]))


def _as_tensor(text: bytes) -> Tensor:
    """A uint8 tensor; the bytearray is writable, as torch asks of a buffer that it shares."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
