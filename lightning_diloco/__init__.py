"""Decoupled DiLoCo for PyTorch Lightning: learners that never wait for one another, and one global model.

``import lightning_diloco``, before or after Lightning, makes ``Trainer(strategy="decoupled_diloco")`` work. The import itself starts
nothing and imports neither torch nor Lightning: the syncer process imports this package too and must stay small. The public names
below are loaded when they are first used (PEP 562); the registration waits for Lightning (`lightning_diloco.strategy.registration`).

References:
    Decoupled DiLoCo, arXiv 2604.21428.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import (
    ConfigurationError,
    DiLoCoError,
    FencedError,
    JoinRefusedError,
    LearnerFailedError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    SyncerUnavailableError,
)
from lightning_diloco.strategy.registration import install

if TYPE_CHECKING:
    from lightning_diloco.strategy.progress import LineProgress
    from lightning_diloco.strategy.strategy import DecoupledDiLoCoStrategy

__all__ = [
    "ConfigurationError",
    "DecoupledDiLoCoStrategy",
    "DiLoCoError",
    "FencedError",
    "JoinRefusedError",
    "LearnerFailedError",
    "LineProgress",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "SyncConfig",
    "SyncerUnavailableError",
    "__version__",
]

__version__ = "0.1.0.dev0"

_LAZY = {
    "DecoupledDiLoCoStrategy": "lightning_diloco.strategy.strategy",
    "LineProgress": "lightning_diloco.strategy.progress",
}


def __getattr__(name: str) -> Any:
    """Load a public name that needs Lightning when it is first used."""
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})


install()
