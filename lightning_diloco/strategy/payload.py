"""The payload: everything a learner process needs to run the user's fit, as one file that each of them reads.

cloudpickle carries what plain pickle cannot: classes of ``__main__`` and of functions, closures, notebooks. So a script needs no main
guard, and nothing of it runs a second time. Modules that a fresh interpreter could not import (test files, for example) are carried
by value. Beside the call itself travel settings of the interpreter that training depends on and that a new process would not have:
random states, default dtype, matmul precision, warning filters, logging levels, and hydra's singletons if hydra is running.

The file is made and read by processes of one user on one machine, in a directory that only that user can enter.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot
from torch.utils.data import DataLoader

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.strategy.compiled import CompiledModule, note_compiled, uncompiled
from lightning_diloco.strategy.unpicklable import find_unpicklable

__all__ = ["InterpreterState", "Payload", "load_payload", "save_payload"]


@dataclass(kw_only=True)
class InterpreterState:
    """Settings of the calling process that its learners take over."""

    snapshot: _GlobalStateSnapshot
    default_dtype: torch.dtype
    matmul_precision: str
    warning_filters: list[Any]
    log_levels: dict[str, int]
    restore_calls: list[tuple[Callable[[Any], Any], Any]]
    """Functions of other packages with the state that they restore."""

    @classmethod
    def capture(cls) -> InterpreterState:
        """Read the settings of this process."""
        return cls(
            snapshot=_GlobalStateSnapshot.capture(),
            default_dtype=torch.get_default_dtype(),
            matmul_precision=torch.get_float32_matmul_precision(),
            warning_filters=list(warnings.filters),
            log_levels=_log_levels(),
            restore_calls=_foreign_state(),
        )

    def restore(self) -> None:
        """Set this process as the captured one was."""
        for function, state in self.restore_calls:
            function(state)
        torch.set_default_dtype(self.default_dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        warnings.filters[:] = self.warning_filters  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]
        for name, level in self.log_levels.items():
            logging.getLogger(name or None).setLevel(level)
        self.snapshot.restore()


@dataclass(kw_only=True)
class Payload:
    """One call of a Trainer's entry point."""

    trainer: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: InterpreterState
    compiled: list[CompiledModule] = field(default_factory=list)


def save_payload(payload: Payload, path: Path) -> None:
    """Write a payload.

    Raises:
        ConfigurationError: something cannot be pickled; the sentence names the attribute.
    """
    payload.compiled = note_compiled((*payload.args, *payload.kwargs.values()))
    with uncompiled(payload.compiled), _unimportable_by_value(payload), path.open("wb") as file:
        try:
            _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(payload)
        except (RecursionError, MemoryError, OSError):
            raise
        except Exception as error:
            raise ConfigurationError(_sentence(payload, error)) from error


def load_payload(path: Path) -> Payload:
    """Read a payload that `save_payload` of the calling process wrote."""
    with path.open("rb") as file:
        payload = pickle.load(file)
    assert isinstance(payload, Payload)
    for note in payload.compiled:
        note.compile()
    return payload


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Leaves behind what belongs to this process: the iterators of loaders, with their worker processes."""

    def reducer_override(self, obj: Any) -> Any:
        """A loader without its iterator; everything else as cloudpickle has it."""
        if isinstance(obj, DataLoader) and getattr(obj, "_iterator", None) is not None:
            return _bare_loader, (type(obj), {**vars(obj), "_iterator": None})
        return super().reducer_override(obj)


def _bare_loader(kind: type[DataLoader[Any]], state: dict[str, Any]) -> DataLoader[Any]:
    loader = kind.__new__(kind)
    loader.__dict__.update(state)
    return loader


def _is_picklable(obj: Any) -> bool:
    try:
        with open("/dev/null", "wb") as sink:
            _Pickler(sink, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
    except Exception:
        return False
    return True


def _sentence(payload: Payload, error: Exception) -> str:
    names = ("model", "train_dataloaders", "val_dataloaders", "datamodule")
    roots: dict[str, Any] = dict(zip(names, payload.args, strict=False)) | {k: v for k, v in payload.kwargs.items() if v is not None}
    roots |= {f"trainer.callbacks[{i}]": callback for i, callback in enumerate(payload.trainer.callbacks)}
    roots |= {f"trainer.loggers[{i}]": logger for i, logger in enumerate(payload.trainer.loggers)}
    roots["trainer"] = payload.trainer
    found = find_unpicklable(roots, _is_picklable)
    where = "Something in the fit" if found is None else f"{found[0]} (type {found[1]})"
    return (
        f"{where} cannot be sent to the learner processes: {error}. Create it in a hook that runs in each learner (setup, configure_model, "
        "on_fit_start), drop it in __getstate__, or use launch='inline' for one learner in this process."
    )


def _log_levels() -> dict[str, int]:
    levels = {"": logging.getLogger().level}
    for name, logger in sorted(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET:
            levels[name] = logger.level
    return levels


def _foreign_state() -> list[tuple[Callable[[Any], Any], Any]]:
    """Hydra's singletons (its configuration, OmegaConf's resolvers), if this is a hydra job; hydra itself is not imported for it."""
    module = sys.modules.get("hydra.core.singleton")
    if module is None:
        return []
    singleton = module.Singleton
    return [(singleton.set_state, singleton.get_state())]


@contextlib.contextmanager
def _unimportable_by_value(payload: Payload) -> Iterator[None]:
    """Let cloudpickle carry modules by value that a new interpreter with this one's path would not find."""
    modules = [module for module in _modules_of(payload) if not _is_importable(module)]
    registered: list[ModuleType] = []
    try:
        for module in modules:
            if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                registered.append(module)
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _modules_of(payload: Payload) -> list[ModuleType]:
    """Modules with code of the user's own: whatever is loaded from outside of the installed packages."""
    names = set()
    prefixes = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix})
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and isinstance(module, ModuleType) and file and file.endswith(".py") and not file.startswith(prefixes):
            names.add(name)
    return [sys.modules[name] for name in sorted(names) if sys.modules[name].__name__ == name]


def _find_spec(name: str, path: list[str] | None) -> importlib.machinery.ModuleSpec | None:
    """Where a new interpreter finds a module: by every finder of this one, since editable installs put one beside the path's.

    (`importlib.util.find_spec` would look at what is loaded already.)
    """
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None
        if spec is not None:
            return spec
    return None


def _is_importable(module: ModuleType) -> bool:
    """Whether a new interpreter of this environment, with this one's path, finds this very module."""
    path: list[str] | None = None
    parts = module.__name__.split(".")
    for depth in range(len(parts)):
        try:
            spec = _find_spec(".".join(parts[: depth + 1]), path)
        except (ImportError, ValueError, OSError):
            return False
        if spec is None:
            return False
        path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
        if path is None and depth + 1 < len(parts):
            return False
    return spec is not None and (spec.origin is None or spec.origin == getattr(module, "__file__", None))
