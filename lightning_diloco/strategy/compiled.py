"""A LightningModule that was compiled as a whole, on its way to learner processes.

``trainer.fit(torch.compile(module))`` puts compiled functions in the place of the module's own, and compiled code belongs to one process.
So the module travels as it was before, with a note of how it was compiled, and is compiled anew where it arrives. The note is read from
what torch keeps in the compiled functions; where a release of torch keeps it otherwise, there is none, and the caller is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.compile import from_compiled, to_uncompiled

from lightning_diloco.errors import ConfigurationError

__all__ = ["CompiledModule", "note_compiled", "uncompiled"]

_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""What Lightning replaces on a compiled module, beside setting `_compiler_ctx`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledModule:
    """How one module was compiled."""

    module: pl.LightningModule
    backend: Callable[..., Any]
    fullgraph: bool
    dynamic: bool | None

    def compile(self) -> None:
        """Compile the module again, in place."""
        from_compiled(torch.compile(self.module, backend=self.backend, fullgraph=self.fullgraph, dynamic=self.dynamic))  # type: ignore[arg-type]


def note_compiled(values: Iterable[Any]) -> list[CompiledModule]:
    """The notes of those values that are compiled modules.

    Args:
        values: what a call of ``fit`` was given.

    Raises:
        ConfigurationError: a module is compiled in a way that cannot be read.
    """
    return [_note(value) for value in values if isinstance(value, pl.LightningModule) and value._compiler_ctx is not None]


@contextmanager
def uncompiled(notes: list[CompiledModule]) -> Iterator[None]:
    """The modules are as they were before they were compiled, inside."""
    kept = [{name: vars(note.module)[name] for name in (*_METHODS, "_compiler_ctx") if name in vars(note.module)} for note in notes]
    try:
        for note in notes:
            to_uncompiled(note.module)
            for name in _METHODS:
                # Lightning leaves the class's own methods behind as attributes of the instance.
                method = getattr(vars(note.module).get(name), "__func__", None)
                if method is not None and method is getattr(type(note.module), name, None):
                    del vars(note.module)[name]
        yield
    finally:
        for note, values in zip(notes, kept, strict=True):
            vars(note.module).update(values)


def _note(module: pl.LightningModule) -> CompiledModule:
    context = module._compiler_ctx
    assert context is not None
    try:
        dynamo = context["dynamo_ctx"]
        backend = dynamo.callback
        while hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        return CompiledModule(module=module, backend=backend, fullgraph=bool(dynamo.fullgraph), dynamic=dynamo._dynamic)
    except (KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"{type(module).__name__} was compiled as a whole, and how cannot be read in torch {torch.__version__} ({error}), so it cannot "
            "be sent to the learner processes. Compile its parts in configure_model (self.net = torch.compile(self.net)), run in each."
        ) from error
